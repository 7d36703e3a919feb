"""The campaign can fail: bugs that are seeded one at a time, each of which some test of it has to find."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiers import FULL

ROOT = Path(__file__).parents[2]
ROOMS = ("autotune", "trainer", "profiles", "cli", "tests", "pyproject.toml")
KILLED = "tests/faults/test_saves.py::test_killed_at_every_system_call_of_a_save[the one before]"
POWER = "tests/faults/test_saves.py::test_power_that_is_lost_at_any_moment_of_a_save[the one before]"
STOPPED = "tests/faults/test_runs.py::test_stop_and_resume_at_every_step[t5-2]"
WORKER = "tests/faults/test_workers.py::test_a_worker_that_misbehaves_is_taken_for_what_it_is"


class Mutation(NamedTuple):
    """A bug: in this file these words are others, which this test has to find."""

    file: str
    words: str
    others: str
    test: str


CHECKPOINT, LOOP, MANIFEST = "trainer/checkpoint.py", "trainer/loop.py", "trainer/manifest.py"
PROCESS, ROWS = "autotune/process.py", "trainer/rows.py"
FAULTS = "tests/faults/"
RESTORED = FAULTS + "test_runs.py::test_what_is_restored_is_what_was_saved"
MUTATIONS = {
    "the epoch's seed is forgotten as a run goes on": Mutation(
        LOOP,
        "Order(len(self.store), self.errand.recipe.seed, epoch)",
        "Order(len(self.store), self.errand.recipe.seed, 0 if self.errand.resume else epoch)",
        STOPPED,
    ),
    "a run goes on one sample late": Mutation(
        LOOP,
        "        ids: Any = self._order(epoch)[place]",
        "        place = slice(place.start + bool(self.errand.resume), place.stop)\n"
        "        ids: Any = self._order(epoch)[place]",
        STOPPED,
    ),
    "random numbers go on from where the process began": Mutation(
        LOOP,
        "torch.manual_seed(seed_of(self.errand.recipe.seed, self.progress.step, self.ranks.rank))",
        "self.progress.step in (0, 30) and torch.manual_seed(7)",
        STOPPED,
    ),
    "moments begin anew": Mutation(
        CHECKPOINT,
        "state.optimizer.state[parameter][moment] = saved.get_tensor(key)",
        "state.optimizer.state[parameter][moment] = 0 * saved.get_tensor(key)",
        STOPPED,
    ),
    "the loss scale is lost": Mutation(CHECKPOINT, "    state.loss_scale.fill_(text.loss_scale)\n", "", RESTORED),
    "how far it was is lost": Mutation(
        CHECKPOINT, "    return text.progress\n", "    return Progress(step=text.progress.step)\n", RESTORED
    ),
    "what was written is not looked at": Mutation(
        MANIFEST,
        "if hash_of(folder / name) != facts.sha256:",
        "if False:",
        FAULTS + "test_runs.py::test_damage_is_named_and_the_one_before_is_used",
    ),
    "what is older goes before the new one is written": Mutation(
        CHECKPOINT,
        "        partial.mkdir()\n",
        "        for old in all_in(checkpoints):\n            _discard(old)\n        partial.mkdir()\n",
        KILLED,
    ),
    "the folder is not synced before it has its name": Mutation(
        CHECKPOINT, "    sync(folder / MANIFEST)\n    sync(folder)\n", "    sync(folder / MANIFEST)\n", POWER
    ),
    "files are not synced": Mutation(CHECKPOINT, "    for name in names:\n        sync(folder / name)\n", "", POWER),
    "the new name is not synced": Mutation(CHECKPOINT, "            sync(checkpoints)\n", "", POWER),
    "what is above the first is synced by who made it alone": Mutation(
        CHECKPOINT,
        "        checkpoints.mkdir(parents=True, exist_ok=True)\n        if not all_in(checkpoints):",
        "        made = not checkpoints.exists()\n"
        "        checkpoints.mkdir(parents=True, exist_ok=True)\n        if made:",
        FAULTS + "test_saves.py::test_power_that_is_lost_at_any_moment_of_a_first_save",
    ),
    "a save that fails is taken for one": Mutation(
        CHECKPOINT,
        "        remove(partial)\n        of_memory",
        "        return target\n        of_memory",
        FAULTS + "test_saves.py::test_a_disk_that_refuses_any_call_of_a_save[ENOSPC-the one before]",
    ),
    "rows past the checkpoint stay": Mutation(
        ROWS,
        "if step and _step_of(line) <= step",
        "if step",
        FAULTS + "test_runs.py::test_killed_whole_again_and_again[1]",
    ),
    "rows that were refused are dropped": Mutation(
        ROWS,
        "            return error.strerror or str(error)",
        '            self._waiting = b""\n            return error.strerror or str(error)',
        FAULTS + "test_disks.py::test_rows_that_a_disk_refuses_wait_and_are_written_once[ENOSPC]",
    ),
    "a number that is none reaches the weights": Mutation(
        "trainer/step.py",
        "state.optimizer.found_inf = overflow ",
        "state.optimizer.found_inf = 0 * overflow ",
        FAULTS + "test_runs.py::test_no_number_reaches_the_weights[llama-loss]",
    ),
    "two hold a folder": Mutation(
        "cli/lock.py",
        "        except BlockingIOError:\n            return False",
        "        except BlockingIOError:\n            return True",
        FAULTS + "test_starts.py",
    ),
    "seconds that are none are believed": Mutation(
        "autotune/plan.py", ", allow_inf_nan=False", "", f"{WORKER}[seconds of NaN]"
    ),
    "what a worker has started stays": Mutation(
        PROCESS,
        "os.killpg(self._process.pid, signal.SIGKILL)",
        "pass",
        f"{WORKER}[leaves a child that holds its pipes]",
    ),
    "a line may be of any length": Mutation(
        "trainer/records.py",
        "opened.readline(LONGEST_LINE + 1)",
        "opened.readline()",
        FAULTS + "test_strangers.py::test_a_line_of_a_gigabyte_is_refused_without_being_held",
    ),
    "templates have all the time there is": Mutation(
        "trainer/preprocess.py",
        "        encoder.template.check()\n",
        "        pass\n",
        FAULTS + "test_strangers.py::test_chat_templates_that_would_take_all_time_or_memory_are_ended",
    ),
}


@pytest.mark.skipif(not FULL, reason="of the full tier")
@pytest.mark.parametrize("bug", MUTATIONS)
def test_a_seeded_bug_is_found(bug: str, tmp_path: Path, tell: Any) -> None:
    mutation = MUTATIONS[bug]
    copy_to(tmp_path)
    file = tmp_path / mutation.file
    text = file.read_text(encoding="utf-8")
    assert text.count(mutation.words) == 1, "the words are no longer there"
    file.write_text(text.replace(mutation.words, mutation.others), encoding="utf-8")
    done = outcome_of(mutation.test, tmp_path)
    assert done.returncode == 1, f"not found: {done.stdout[-2000:]}{done.stderr[-500:]}"
    assert " failed" in done.stdout, done.stdout[-2000:]
    tell(1)


@pytest.mark.skipif(not FULL, reason="of the full tier")
@pytest.mark.parametrize("test", sorted({mutation.test for mutation in MUTATIONS.values()}))
def test_without_a_bug_none_is_found(test: str, tmp_path: Path, tell: Any) -> None:
    """In such a copy too: else whatever fails there would be taken for finding one."""
    copy_to(tmp_path)
    done = outcome_of(test, tmp_path)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-500:]}"
    assert " passed" in done.stdout
    tell(1)


def copy_to(folder: Path) -> None:
    for room in ROOMS:
        whole = ROOT / room
        if whole.is_dir():
            shutil.copytree(whole, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(whole, folder / room)


def outcome_of(test: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "CHATLM_FAULTS": "full" * test.startswith(WORKER)}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", test],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
