"""One run at a time in a folder, however its holder ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from autotune.errors import MachineError, RunExistsError
from cli.lock import LOCK, hold

HOLDER = """
import sys
from pathlib import Path
from cli.lock import hold
with hold(Path(sys.argv[1])):
    print(1, flush=True)
    input()
"""


def holder(folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdin=-1, stdout=-1, stderr=-1)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_second_holder_is_told_of_the_first_and_has_the_folder_when_that_is_killed(tmp_path: Path) -> None:
    first = holder(tmp_path)
    with pytest.raises(RunExistsError, match=f"in use by process {first.pid} on .* since") as error, hold(tmp_path):
        pass
    assert error.value.exit_code == 5
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert (tmp_path / LOCK).exists(), "what it left does not matter"
    with hold(tmp_path), pytest.raises(RunExistsError, match=f"process {os.getpid()} "), hold(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_start_at_once_exactly_one_holds(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    processes = [subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1) for _ in range(5)]
    try:
        running = [p for p in processes if p.stdout is not None and p.stdout.readline() == b"1\n"]
        assert len(running) == 1
    finally:
        for process in processes:
            process.communicate(b"\n")


def test_a_folder_that_was_made_for_nothing_goes_again_and_one_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with hold(tmp_path / "runs" / "one"):
        pass
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "runs" / "one"):
        (tmp_path / "runs" / "one" / "kept").touch()
    assert (tmp_path / "runs" / "one" / "kept").exists()
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=r"Not a directory|File exists"), hold(tmp_path / "file" / "run"):
        pass


def test_a_folder_that_its_last_holder_removes_as_another_looks_for_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, opening = tmp_path / "runs" / "one", os.open
    left = [folder, folder.parent]

    def open_late(path: Path, *how: int) -> int:
        while left:
            left.pop(0).rmdir()
        return opening(path, *how)

    with monkeypatch.context() as inside:
        inside.setattr("cli.lock.os.open", open_late)
        with hold(folder):
            assert (folder / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
