"""Work in a forked child, and what it and its own children ran, reached, opened and changed.

Python's audit hooks tell of what Python does; inotify of files that are opened by anything.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNS = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "pty.spawn",
    "pickle.find_class", "socket.connect", "socket.bind", "socket.getaddrinfo", "ctypes.dlopen",
)  # fmt: skip
"""Events by which a program begins, code that was data is run, or the network is reached."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {
    "os.mkdir": ((0, 2),), "os.rmdir": ((0, 1),), "os.remove": ((0, 1),), "os.rename": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),), "os.link": ((1, 3),), "os.chmod": ((0, 2),), "os.chown": ((0, 3),), "os.utime": ((0, 3),),
    "os.truncate": ((0, None),), "os.setxattr": ((0, None),), "os.removexattr": ((0, None),),
}  # fmt: skip
"""Events that change a folder: which of what they are given is a path, and which the folder that it begins from."""
IN_OPEN = 0x20


@dataclass(frozen=True)
class Witnessed:
    """What became of a child."""

    code: int
    """Its exit code; negative is a signal."""
    said: Any
    """What its work returned, as JSON has it."""
    seen: list[str]
    """What it ran, reached, changed outside, or opened where nothing is to be read."""
    most_bytes: int
    """That it, or one of its own children, held."""
    seconds: float


def watched(
    work: Callable[[], Any], inside: Path, stranger: Path | None = None, unread: Path | None = None
) -> Witnessed:
    """Do work in a child that may change one folder alone, open nothing in another, and run nothing of a stranger's.

    Raises what it raised, but as text.
    """
    events, report = os.memfd_create("events"), os.memfd_create("report")  # which its children have too
    opened = _Opened(unread) if unread is not None else None
    began = time.monotonic()
    with warnings.catch_warnings():  # of threads beside us: pytest-xdist's, which only waits
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        code = 1
        sys.dont_write_bytecode = True  # of libraries, beside them; and its children neither
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        try:
            sys.addaudithook(lambda event, given: _judge(event, given, events, inside.resolve(), stranger))
            code = _report(work, report)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - began
    told = json.loads(_content(report) or '{"said": null, "most_bytes": 0}')
    seen = _content(events).decode().splitlines() + (opened.names() if opened else [])
    code = os.waitstatus_to_exitcode(status)
    assert code != 1, told["said"]
    return Witnessed(code, seen=seen, seconds=seconds, **told)


def _report(work: Callable[[], Any], report: int) -> int:
    """Do work; write what it said and held. Returns the exit code."""
    code, said = 0, None
    try:
        said = work()
    except BaseException:  # noqa: BLE001 # whatever it is, the parent has to hear of it
        code, said = 1, traceback.format_exc()
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    most = max(usage.ru_maxrss for usage in used) * 1024
    os.write(report, json.dumps({"said": said, "most_bytes": most}, default=str).encode())
    return code


def _content(file: int) -> bytes:
    content = os.pread(file, os.fstat(file).st_size, 0)
    os.close(file)
    return content


def _judge(event: str, given: tuple[Any, ...], events: int, inside: Path, stranger: Path | None) -> None:
    for seen in _found(event, given, inside, stranger):
        os.write(events, seen.replace("\n", " ").encode("utf-8", "backslashreplace") + b"\n")


def _found(event: str, given: tuple[Any, ...], inside: Path, stranger: Path | None) -> Iterator[str]:
    if event in RUNS and given != (None,):  # the program itself, as a library: what is in it is there already
        yield f"{event} {given!r:.200}"
    elif event == "open" and isinstance(given[0], str | bytes) and given[2] & WRITES:
        path = Path(os.path.realpath(os.fsdecode(given[0])))
        if not path.is_relative_to(inside) and not path.is_relative_to("/dev"):
            yield f"wrote {path}"
    elif event in CHANGES:
        for name, folder in CHANGES[event]:
            path = _path(given[name], given[folder] if folder is not None else -1)
            if not path.is_relative_to(inside):
                yield f"{event} {path}"
    elif event in ("exec", "compile", "import") and stranger is not None:
        file = given[0].co_filename if event == "exec" else given[1]
        if isinstance(file, str) and file.startswith(str(stranger)):
            yield f"{event} {file}"


def _path(name: str | bytes | int | os.PathLike[str], folder: int) -> Path:
    """Return what a call changes: the name itself, not what it may link to."""
    if isinstance(name, int):
        return Path(os.path.realpath(f"/proc/self/fd/{name}"))
    start = Path.cwd() if folder < 0 else Path(f"/proc/self/fd/{folder}")
    path = start / os.fsdecode(name)
    return Path(os.path.realpath(path.parent)) / path.name


class _Opened:
    """What is opened in a folder, by whatever means; see inotify(7)."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None)
        self._file = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert libc.inotify_add_watch(self._file, os.fsencode(folder), IN_OPEN) > 0

    def names(self) -> list[str]:
        try:
            content = os.read(self._file, 2**16)
        except BlockingIOError:
            content = b""
        os.close(self._file)
        names, header = [], struct.Struct("iIII")
        while content:
            size = header.size + header.unpack_from(content)[3]
            names.append(f"opened {content[header.size : size].rstrip(bytes(1)).decode()}")
            content = content[size:]
        return names
