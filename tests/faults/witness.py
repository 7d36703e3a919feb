"""Work in a forked child, and what it ran, reached and wrote, as Python's audit hooks tell."""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNS = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "pty.spawn",
    "pickle.find_class", "socket.connect", "socket.bind", "socket.getaddrinfo", "ctypes.dlopen",
)  # fmt: skip
"""Events by which a program begins, code that was data is run, or the network is reached."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Witnessed:
    """What became of a child."""

    code: int
    """Its exit code; negative is a signal."""
    said: Any
    """What its work returned, as JSON has it."""
    seen: list[str]
    """What it ran, reached, or wrote outside."""
    most_bytes: int
    """That it held."""


def watched(work: Callable[[], Any], inside: Path, stranger: Path | None = None) -> Witnessed:
    """Do work in a child that may write inside a folder alone, and may run nothing, least of all from a stranger's.

    Raises what it raised, but as text.
    """
    report = inside / "witness.json"
    report.unlink(missing_ok=True)
    with warnings.catch_warnings():  # of threads beside us: pytest-xdist's, which only waits
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        code, said = 0, None
        seen: list[str] = []
        try:
            sys.addaudithook(lambda event, given: _judge(event, given, seen, inside, stranger))
            said = work()
        except BaseException:  # noqa: BLE001 # whatever it is, the parent has to hear of it
            code, said = 1, traceback.format_exc()
        finally:
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            report.write_text(json.dumps({"said": said, "seen": seen, "most_bytes": most}))
            os._exit(code)
    _, status = os.waitpid(child, 0)
    told = json.loads(report.read_text()) if report.exists() else {"said": None, "seen": [], "most_bytes": 0}
    code = os.waitstatus_to_exitcode(status)
    assert code != 1, told["said"]
    return Witnessed(code, **told)


def _judge(event: str, given: tuple[Any, ...], seen: list[str], inside: Path, stranger: Path | None) -> None:
    if event in RUNS:
        seen.append(f"{event} {given!r:.200}")
    elif event == "open" and isinstance(given[0], str | bytes) and given[2] & WRITES:
        path = Path(os.fsdecode(given[0])).absolute()
        if not path.is_relative_to(inside) and not path.is_relative_to("/dev"):
            seen.append(f"wrote {path}")
    elif event in ("exec", "compile", "import") and stranger is not None:
        file = given[0].co_filename if event == "exec" else given[1]
        if isinstance(file, str) and file.startswith(str(stranger)):
            seen.append(f"{event} {file}")
