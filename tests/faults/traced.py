"""A piece of work in a forked child, written down or struck by strace at its system calls."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

Work = Callable[[], object]
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
FAILED = 99
"""Exit code of work that raised."""
MOST_SAID = 2**16


@dataclass(frozen=True)
class Ended:
    """How a child came to its end."""

    code: int
    """Its exit code: 0 where its work returned; negative is a signal."""
    said: str
    """What its work returned."""
    calls: list[str]
    """Its system calls, as strace writes them."""

    @property
    def struck(self) -> bool:
        """Whether it came to the call that was to fail."""
        return any("(INJECTED)" in call for call in self.calls)


def strace(work: Work, options: Sequence[str], folder: Path) -> Ended:
    """Do work in a child under strace. Raises what it raised, but as text."""
    with mmap.mmap(-1, MOST_SAID) as shared:  # no system call, which might be struck, tells how it was
        child = _forked(work, shared)
        log = folder / "calls"
        with subprocess.Popen(
            ["strace", "-p", str(child), "-o", log, *options], stderr=subprocess.PIPE, text=True
        ) as watching:
            assert watching.stderr is not None
            first = watching.stderr.readline()
            assert "attached" in first, first
            os.kill(child, signal.SIGCONT)
            _, status = os.waitpid(child, 0)
            watching.communicate()
        said = shared[:].rstrip(b"\0").decode()
    calls = [line for line in log.read_text().splitlines() if not line.startswith(("---", "+++"))]
    ended = Ended(os.waitstatus_to_exitcode(status), said, calls)
    assert ended.code != FAILED, said
    return ended


def _forked(work: Work, shared: mmap.mmap) -> int:
    """Fork a child that stops itself, and once it is told to go on works, and leaves."""
    with warnings.catch_warnings():  # of threads beside us: pytest-xdist's, which only waits
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        code, said = FAILED, ""
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            said, code = str(work()), 0
        except BaseException:  # noqa: BLE001 # whatever it is, the parent has to hear of it
            said = traceback.format_exc()
        finally:
            shared.write(said.encode()[-MOST_SAID:])
            os._exit(code)
    os.waitpid(child, os.WUNTRACED)
    return child


def each_call(calls: Sequence[str]) -> list[tuple[str, int]]:
    """Name each call as strace counts them: the first openat, the second openat ..."""
    seen: Counter[str] = Counter()
    places = []
    for line in calls:
        name = line.partition("(")[0]
        seen[name] += 1
        places.append((name, seen[name]))
    return places


def inject(calls: str, what: str, place: int, *, onwards: bool = False, until: int | None = None) -> list[str]:
    """Options of strace: strike at this one of each of the calls; from it on, or up to another."""
    last = "+" if onwards else f"..{until}" if until else ""
    return ["-e", f"trace={calls}", "-e", f"inject={calls}:{what}:when={place}{last}"]
