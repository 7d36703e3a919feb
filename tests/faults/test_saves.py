"""A save that is broken at each of its system calls: killed, refused by the disk, or without power."""

from __future__ import annotations

import random
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import facts
import pytest
from power import Disk, Operation, recorded
from small_runs import Rows, going_on, losses, run, small_errand, weights
from tiers import FULL, some, trials
from traced import Ended, Work, each_call, inject, needs_strace, strace

from autotune.errands import Train
from autotune.errors import MachineError
from trainer import checkpoint, manifest
from trainer.manifest import find, name_of

pytestmark = needs_strace
STEP, BEFORE = 8, 6
"""The save that is broken, and the one before it."""
SAVED = "saved"
THERE = {"the one before": BEFORE, "a damaged one of its step too": BEFORE, "nothing": 0}
"""What may lie in the folder, and the step that is gone on from where nothing of the save is there."""
ERRORS = ("ENOSPC", "EROFS", "EIO", "EDQUOT")
WRITING = ("openat", "write", "ftruncate", "fsync", "rename,renameat", "mkdir", "unlinkat,rmdir")
"""Calls by which a save changes the disk, as strace names them."""
CHANGING = ",".join(WRITING).replace("openat,", "").split(",")
READING = ("newfstatat", "read", "getdents64", "statfs", "close", "lseek")


@dataclass
class Saving:
    """A run in the moment when it saves: what it is of, and its save into a copy of its folder."""

    errand: Train
    rows: Rows
    """Of the same run, left alone."""
    weights: str
    folder: Path
    commit: Callable[[Path], Path]

    def copy(self, name: str, there: str = "the one before") -> Path:
        """Copy the run as it lies; where nothing is there, not even its folder is."""
        folder = self.folder.with_name(name)
        shutil.rmtree(folder, ignore_errors=True)
        if there == "nothing":
            return folder
        shutil.copytree(self.folder, folder)
        if there == "a damaged one of its step too":
            last = folder / manifest.FOLDER
            shutil.copytree(last / name_of(BEFORE), last / name_of(STEP))
        return folder

    def into(self, folder: Path) -> Work:
        """Return the save as work, which says SAVED, or the sentence of a save that failed."""

        def work() -> str:
            try:
                self.commit(folder / manifest.FOLDER)
            except MachineError as error:
                return f"{error.message}; hint: {error.hint}"
            return SAVED

        return work

    def check_goes_on(self, folder: Path, there: str = "the one before") -> None:
        """Resume: every further loss and the weights are those of the run that was left alone."""
        rows = run(going_on(self.errand.model_copy(update={"output_dir": str(folder)})))
        done = rows[0]["step"]
        assert done in (THERE[there], STEP)
        assert losses(rows) == [row for row in losses(self.rows) if row[0] > done]
        assert weights(folder) == self.weights


@pytest.fixture
def in_a_save(tmp_path: Path) -> Callable[[Callable[[Saving], None]], None]:
    """Run to a save, and do something there."""
    errand = small_errand(tmp_path, "llama", saving=facts.saving(every_steps=2, keep_last=2))
    alone = errand.model_copy(update={"output_dir": str(tmp_path / "alone")})
    rows = run(alone)
    reached: list[int] = []

    def begin(work: Callable[[Saving], None]) -> None:
        real = checkpoint.save

        def save(checkpoints: Path, state: Any, progress: Any, origin: Any, keep_last: int) -> Path:
            if progress.step == STEP and not reached:  # the runs that go on save too
                reached.append(STEP)
                saved_into = lambda place: real(place, state, progress, origin, keep_last)  # noqa: E731
                work(Saving(errand, rows, weights(tmp_path / "alone"), checkpoints.parent, saved_into))
            return real(checkpoints, state, progress, origin, keep_last)

        with patch.object(checkpoint, "save", save):
            run(errand)
        assert reached

    return begin


@pytest.mark.parametrize("there", THERE)
def test_killed_at_every_system_call_of_a_save(there: str, in_a_save: Any, tmp_path: Path, tell: Any) -> None:
    """And again as it clears up what was left. The short tier has what changes the disk."""

    def strike(saving: Saving) -> None:
        calls = strace(saving.into(saving.copy("seen", there)), [], tmp_path).calls
        places = [(call, place) for call, place in each_call(calls) if FULL or call in CHANGING]
        places = some(places, 5) if there == "nothing" else places
        left: set[frozenset[object]] = set()
        again = 0
        for call, place in places:
            folder = saving.copy("killed", there)
            killed = strace(saving.into(folder), inject(call, "signal=KILL", place), tmp_path)
            assert killed.code == -signal.SIGKILL, (call, place)
            what = frozenset((str(path), path.stat().st_size) for path in folder.rglob("*"))
            if what and what not in left:
                left.add(what)
                again += kill_as_it_clears_up(saving, folder, there, len(left))
            saving.check_goes_on(folder, there)
        assert again
        tell(len(places) + again)

    in_a_save(strike)


def kill_as_it_clears_up(saving: Saving, left: Path, there: str, turn: int) -> int:
    """Strike before each of its changes of the disk, in the short tier of every second before one; return how many."""
    folder = left.with_name("again")

    def clear_up(options: list[str]) -> Ended:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(left, folder)
        return strace(partial(checkpoint.recover, folder / manifest.FOLDER), options, left.parent)

    changes = each_call(clear_up(["-e", "trace=unlinkat,rmdir,rename"]).calls)
    if not FULL and changes:
        changes = [changes[turn // 2 % len(changes)]] if turn % 2 else []
    for call, place in changes:
        assert clear_up(inject(call, "signal=KILL", place)).code == -signal.SIGKILL, (call, place)
        saving.check_goes_on(folder, there)
    return len(changes)


@pytest.mark.parametrize(
    ("error", "there"), [(e, "the one before") for e in some(ERRORS, 2)] + [(e, "nothing") for e in some(ERRORS, 1)]
)
def test_a_disk_that_refuses_any_call_of_a_save(
    error: str, there: str, in_a_save: Any, tmp_path: Path, tell: Any
) -> None:
    """Once, or from then on: what was there is whole, the sentence says why, and the next save succeeds."""
    calls = WRITING + (READING if error == "EIO" else ())
    if there == "nothing" and not FULL:
        calls = ("mkdir", "fsync")  # which alone are others in a first save

    def strike(saving: Saving) -> None:
        struck = 0
        for call in calls:
            for place in range(1, trials(3, 1000)):
                if not refuse(saving, call, place, onwards=False):
                    break
                refuse(saving, call, place, onwards=True)
                struck += 2
        assert struck > 3 * len(calls)
        tell(struck)

    def refuse(saving: Saving, call: str, place: int, *, onwards: bool) -> bool:
        """Return whether the save has such a call at all."""
        folder = saving.copy("refused", there)
        ended = strace(saving.into(folder), inject(call, f"error={error}", place, onwards=onwards), tmp_path)
        assert ended.struck or ended.said == SAVED
        found = find(folder)
        # One whose name could not be synced is said to have failed, and is there.
        allowed = {STEP} if ended.said == SAVED else {THERE[there], STEP}
        assert (found.manifest.step if found else 0) in allowed, (call, place)
        if ended.said != SAVED:
            check_sentence(ended.said, folder)
            assert saving.into(folder)() == SAVED
            assert manifest.verify(folder / manifest.FOLDER / name_of(STEP))
        if ended.struck:
            saving.check_goes_on(folder, there)
        return ended.struck

    in_a_save(strike)


def test_a_disk_that_takes_a_part_of_what_is_written(in_a_save: Any, tmp_path: Path, tell: Any) -> None:
    """Files of at most so many bytes (RLIMIT_FSIZE): the kernel takes a short write, then refuses the rest."""

    def strike(saving: Saving) -> None:
        saving.into(saving.copy("seen"))()
        largest = max(p.stat().st_size for p in (saving.folder.with_name("seen") / manifest.FOLDER).glob("*/*"))
        sizes = [largest * i // trials(12, 60) for i in range(1, trials(12, 60))]
        for size in sizes:
            folder = saving.copy("short")

            def limited(folder: Path = folder, size: int = size) -> object:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
                return saving.into(folder)()

            check_sentence(strace(limited, [], tmp_path).said, folder)
            found = find(folder)
            assert found is not None
            assert found.folder.name == name_of(BEFORE)
            saving.check_goes_on(folder)
        tell(len(sizes))

    in_a_save(strike)


@pytest.mark.parametrize("there", [name for name in THERE if name != "nothing"])
def test_power_that_is_lost_at_any_moment_of_a_save(there: str, in_a_save: Any, tmp_path: Path, tell: Any) -> None:
    def strike(saving: Saving) -> None:
        folder = saving.copy("seen", there)
        before = Disk(folder)
        operations = recorded(saving.into(folder), folder, tmp_path)
        tell(check_states(before, operations, folder, "", tmp_path))

    in_a_save(strike)


@pytest.mark.parametrize("made", ["", "runs/first", "runs/first/checkpoints"])
def test_power_that_is_lost_at_any_moment_of_a_first_save(made: str, in_a_save: Any, tmp_path: Path, tell: Any) -> None:
    """On a disk that has not one of its folders, or some, which whoever made them was killed before he synced."""

    def strike(saving: Saving) -> None:
        above = tmp_path / "above"
        above.mkdir()
        before = Disk(above)

        def work() -> object:
            (above / made).mkdir(parents=True, exist_ok=True)
            return saving.into(above / "runs/first")()

        tell(check_states(before, recorded(work, above, tmp_path), above / "runs/first", "runs/first", tmp_path))

    in_a_save(strike)


def check_states(before: Disk, operations: list[Operation], saved: Path, run: str, folder: Path) -> int:
    """Look at what may be there after every operation: all that was not synced, none of it, and any part of it.

    `run` is where on the disk the run lies. Returns how many states there were.
    """
    random.seed(5)
    drawn = trials(10, 200)
    known = (BEFORE, STEP) if (saved / manifest.FOLDER / name_of(BEFORE)).exists() else (STEP,)
    whole = {name: contents(saved / manifest.FOLDER / name) for name in map(name_of, known)}
    states = {state for length in range(len(operations) + 1) for state in before.states(operations[:length], drawn)}
    after = set(before.states(operations, drawn))
    for state in states | after:
        lost = folder / "lost"
        shutil.rmtree(lost, ignore_errors=True)
        state.lay_out(lost)
        checkpoint.recover(lost / run / manifest.FOLDER)
        found = find(lost / run)
        assert found is not None or (len(known) == 1 and state not in after)
        if found is not None:
            assert contents(found.folder) == whole[found.folder.name], "a mix"
            assert state not in after or found.folder.name == name_of(STEP), "it was said to be saved"
    assert len(states) > trials(50, 300)
    return len(states | after)


def check_sentence(said: str, folder: Path) -> None:
    assert said.startswith(f"{folder / manifest.FOLDER / name_of(STEP)} could not be saved: "), said
    assert said.endswith("what was saved before is still there")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}
