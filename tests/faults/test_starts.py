"""Two to twenty that start at once on one folder: exactly one runs, the others are told, the next has it at once."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from conftest import metrics
from micro import Command, kill_all, make_home, refused, steps_told
from tiers import trials

from autotune.errors import RunExistsError
from cli.lock import hold

HELD, TOLD = b"1", RunExistsError.exit_code


def forked(function: Callable[[], None]) -> int:
    """Fork a process that does this; it exits with 0, with the code of a user's error, or with 1."""
    with warnings.catch_warnings():  # of threads beside us: pytest-xdist's, which only waits
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except RunExistsError as error:
            code = error.exit_code
        except BaseException:  # noqa: BLE001 # it must not return into the test
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def starts(folder: Path, go: int, said: int, stay: int) -> None:
    """Start when told to, hold the folder if it can be had, and stay until the end is closed."""
    os.read(go, 1)
    with hold(folder):
        os.write(said, HELD)
        os.read(stay, 1)


def test_of_those_that_start_at_once_exactly_one_runs(tmp_path: Path, tell: Any) -> None:
    """The one that has it is killed in every second round, and leaves in order in the others."""
    random.seed(9)
    count = trials(10, 100)
    for trial in range(count):
        folder = tmp_path / "runs" / f"{trial // 4}"
        pipes = [os.pipe() for _ in range(3)]
        (go, begin), (heard, said), (stay, leave) = pipes
        number = 2 + trial % 19
        children = [forked(partial(starts, folder, go, said, stay)) for _ in range(number)]
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


def takes_turns(folder: Path, held: Path, turns: int) -> None:
    """Hold the folder so many times, whenever it is free, alone, and leave it at once."""
    for _ in range(turns):
        while True:
            try:
                with hold(folder):
                    held.touch(exist_ok=False)
                    held.unlink()
                    break
            except RunExistsError:
                continue


def test_one_that_leaves_hands_it_over_to_those_that_start(tmp_path: Path, tell: Any) -> None:
    """Each makes the folder and the one above it, and removes them when it leaves, as the next ones look for it."""
    turns = trials(300, 5000)
    turn = partial(takes_turns, tmp_path / "runs" / "one", tmp_path / "held", turns)
    children = [forked(turn) for _ in range(6)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    tell(6 * turns)


@contextmanager
def started_together(command: Command, number: int, *more: object) -> Iterator[subprocess.Popen[bytes]]:
    """Start so many trainings; yields the one that is left when all others were told that the folder is in use."""
    said = [command.folder / f"{i}.said" for i in range(number)]
    with ExitStack() as files:
        left = {
            subprocess.Popen(
                command.arguments("train", *more), cwd=command.folder, env=command.environment,
                stdout=subprocess.DEVNULL, stderr=files.enter_context(file.open("w")),
            ): file
            for file in said
        }  # fmt: skip
        try:
            while len(left) > 1:
                for process in [process for process in left if process.poll() is not None]:
                    words = left.pop(process).read_text()
                    refused(subprocess.CompletedProcess([], process.returncode, None, words), 5, "is in use by ")
                time.sleep(0.01)
            (process,) = left
            yield process
        finally:
            for process in left:
                kill_all(process)


def test_of_commands_that_start_at_once_exactly_one_trains(tmp_path: Path, tell: Any) -> None:
    """Two to eight; what trains is killed, or told to stop, and as it leaves as many start that go on with it."""
    make_home(tmp_path)
    command, plan = Command(tmp_path, tmp_path), tmp_path / "plan.json"
    plan.write_text(command("plan", "--json").stdout)
    count = trials(1, 12)
    for trial in range(count):
        run, number = tmp_path / f"run-{trial}", 2 + 3 * trial % 7
        more = ("--plan", plan, "--epochs", 12, "--save-every", 5, "--output-dir", run)
        with started_together(command, number, *more) as process:
            while steps_told(run) < trial % 4 * 5:
                assert process.poll() is None
                time.sleep(0.002)
            process.terminate() if trial % 2 == 0 else kill_all(process)
            code = RunExistsError.exit_code
            while code == RunExistsError.exit_code:
                with started_together(command, number, *more, "--resume") as successor:
                    code = successor.wait(120)
        assert code == 0
        assert [row["step"] for row in metrics(run)] == list(range(1, 49))
    tell(count)
