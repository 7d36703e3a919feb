"""Two to twenty that start at once on one folder: exactly one runs, the others are told, the next has it at once."""

from __future__ import annotations

import os
import random
import select
import signal
import warnings
from pathlib import Path
from typing import Any

from tiers import trials

from autotune.errors import RunExistsError
from cli.lock import hold

HELD, TOLD = b"1", RunExistsError.exit_code


def starts(folder: Path, go: int, said: int, stay: int) -> int:
    """Fork one that starts when it is told to, holds the folder if it can, and stays until its end is closed."""
    with warnings.catch_warnings():  # of threads beside us: pytest-xdist's, which only waits
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        code = 1
        try:
            os.read(go, 1)
            with hold(folder):
                os.write(said, HELD)
                os.read(stay, 1)
                code = 0
        except RunExistsError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return child


def test_of_those_that_start_at_once_exactly_one_runs(tmp_path: Path, tell: Any) -> None:
    """The one that has it is killed in every second round, and leaves in order in the others."""
    random.seed(9)
    count = trials(10, 100)
    for trial in range(count):
        folder = tmp_path / "runs" / f"{trial // 4}"
        pipes = [os.pipe() for _ in range(3)]
        (go, begin), (heard, said), (stay, leave) = pipes
        number = 2 + trial % 19
        children = [starts(folder, go, said, stay) for _ in range(number)]
        os.write(begin, b"." * number)
        codes, holding = [], b""
        try:
            while len(codes) < number - 1 or not holding:
                if select.select([heard], [], [], 0.002)[0]:
                    holding += os.read(heard, 99)
                child, status = os.waitpid(-1, os.WNOHANG) if len(codes) < number - 1 else (0, 0)
                if child:
                    children.remove(child)
                    codes.append(os.waitstatus_to_exitcode(status))
                assert holding in (b"", HELD), "two hold it"
        except AssertionError:
            for child in children:
                os.kill(child, signal.SIGKILL)
            raise
        assert codes == [TOLD] * (number - 1)
        os.kill(children[0], signal.SIGKILL) if trial % 2 else os.write(leave, b".")
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == (-signal.SIGKILL if trial % 2 else 0)
        with hold(folder):
            pass
        for one in pipes:
            for end in one:
                os.close(end)
    tell(count)
