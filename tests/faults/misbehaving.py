"""A worker that misbehaves in the way that it is told: `python misbehaving.py WAY`. It is given an errand like any."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time

MIB = 2**20
NUMBERS = {
    "verified": True, "peak_bytes": 10 * MIB, "phases": {"forward_backward": 5}, "resident_bytes": 5,
    "host_peak_bytes": 5, "timings": [], "timed": [], "evaluation_seconds": 0.1, "expected_peak_bytes": None,
    "inexact": [], "matrix_flops": {}, "answering": None,
}  # fmt: skip
"""Of a report that could be one."""


def say(**event: object) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def report(**changed: object) -> None:
    say(event="result", result=NUMBERS | changed)


def shout(descriptor: int, words: bytes, much: int) -> None:
    piece = words * (MIB // len(words))
    for _ in range(much // MIB):
        os.write(descriptor, piece)


def leave_a_child(*, free: bool) -> None:
    """Leave what holds our pipes for a minute, perhaps in a session of its own."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=free)


WAYS = {
    "dies at once": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "dies with its errand": lambda: (sys.stdin.read(), os.kill(os.getpid(), signal.SIGKILL)),
    "segfaults": lambda: ctypes.string_at(0),
    "aborts": os.abort,
    "ends well, without a word": lambda: os._exit(0),
    "ends with a code": lambda: os._exit(42),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hangs": lambda: time.sleep(3600),
    "hangs, deaf to signals": lambda: (signal.signal(signal.SIGTERM, signal.SIG_IGN), time.sleep(3600)),
    "computes without end": lambda: [None for _ in iter(int, 1)],
    "speaks without end": lambda: [say(event="progress", rows=i) for i in iter(int, 1)],
    "shouts on stderr": lambda: (shout(2, b"no!", MUCH), report()),
    "shouts lines on stdout": lambda: (shout(1, b"no!" * 1000 + b"\n", MUCH), report()),
    "shouts a line without end on stdout": lambda: (shout(1, b"no!", MUCH), report()),
    "says what is no JSON": lambda: (sys.stdout.write("\x00{]\n\n[[[\n"), os._exit(0)),
    "says what is no text": lambda: (os.write(1, bytes(range(256)) * 9), os._exit(0)),
    "says what is no event": lambda: (sys.stdout.write('5\n"result"\n[]\n{}\nnull\n'), os._exit(0)),
    "says lists in lists": lambda: (os.write(1, b"[" * 10**6 + b"\n"), os._exit(0)),
    "a result of nothing": lambda: say(event="result"),
    "a result of null": lambda: say(event="result", result=None),
    "a result that is a list": lambda: say(event="result", result=[1, 2]),
    "peak of NaN": lambda: report(peak_bytes=float("nan")),
    "peak of nothing": lambda: report(peak_bytes=0),
    "peak below nothing": lambda: report(peak_bytes=-1),
    "peak as a text": lambda: report(peak_bytes="much"),
    "seconds of NaN": lambda: report(evaluation_seconds=float("nan")),
    "seconds without end": lambda: report(evaluation_seconds=float("inf")),
    "a phase that is NaN": lambda: report(phases={"forward_backward": float("nan")}),
    "a word too many": lambda: report(surprise=1),
    "a result, and then it dies": lambda: (say(event="result", result={}), os.kill(os.getpid(), signal.SIGSEGV)),
    "an error of no kind": lambda: say(event="error", type="KeyboardInterrupt", message="no"),
    "an error without a word": lambda: say(event="error", type="MachineError"),
    "memory without a word": lambda: say(event="out_of_memory"),
    "a rank that failed, without a number": lambda: say(event="rank_failed"),
    "leaves a child that holds its pipes": lambda: leave_a_child(free=False),
    "leaves a child that is free, and hangs": lambda: (leave_a_child(free=True), time.sleep(3600)),
    "leaves a child that is free": lambda: leave_a_child(free=True),
    "closes its pipes, and hangs": lambda: (os.close(1), os.close(2), time.sleep(3600)),
}
MUCH = int(os.environ.get("MUCH", 10 * MIB))

if __name__ == "__main__":
    WAYS[sys.argv[1]]()  # type: ignore[no-untyped-call]
