"""The promises of docs/reliability.md, each broken on purpose as often as its table says: `make faults`.

Each test ends with a line of its own: how many trials there were, all of which held.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any

import facts
import pytest
from conftest import metrics
from small_runs import Rows, evaluations, going_on, losses, of_kind, run, small_errand, weights
from test_checkpoint import FILES, flipped, saved
from test_ranks import after_steps, alive, launched, rank_processes, run_together
from test_resume import memory_runs_out, not_a_number, run_while, stopping_at

from autotune.errors import MachineError
from trainer import manifest
from trainer.manifest import find

STEPS = 60
EPOCHS = 20
"""Of three steps each."""


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Any:
    """Say how many trials held: a line that `pytest -rP` shows."""

    def told(trials: int) -> None:
        sys.stdout.write(f"{request.node.name}: {trials} of {trials}\n")

    return told


@pytest.mark.parametrize("micro_batch_size", [2, 8])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_stop_and_resume_at_every_step(family: str, micro_batch_size: int, tmp_path: Path, tell: Any) -> None:
    whole = small_errand(tmp_path, family, micro_batch_size=micro_batch_size, epochs=EPOCHS, eval_every=7)
    rows = run(whole)
    assert losses(rows)[-1][0] == STEPS
    for step in range(1, STEPS + 1):
        errand = whole.model_copy(update={"output_dir": str(tmp_path / f"stopped-{step}")})
        first = run(errand, stopping_at(step))
        second = run(going_on(errand))
        assert losses(first) + losses(second) == losses(rows)
        assert evaluations(first) + evaluations(second) == evaluations(rows)
        assert weights(Path(errand.output_dir)) == weights(Path(whole.output_dir))
        shutil.rmtree(errand.output_dir)
    tell(STEPS)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_memory_runs_out_anywhere(family: str, tmp_path: Path, tell: Any) -> None:
    """In forward, backward and evaluation; in the first step, in the middle, after a resume: 100 for each family."""
    random.seed(1)
    errand = small_errand(tmp_path, family, micro_batch_size=8, dropout=0.0, layout="fixed", eval_every=4)
    whole = run(errand.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    expected = [row["loss"] for row in whole if row["kind"] in ("train", "validation")]
    places = list(product(("forward", "backward", "evaluation"), range(12)))
    trials = [*places, *random.choices(places, k=100 - len(places))]
    for number, (where, step) in enumerate(trials):
        resumed_at = step // 2 if number >= len(places) else 0
        struck = errand.model_copy(update={"output_dir": str(tmp_path / "struck")})
        first: Rows = run(struck, stopping_at(resumed_at)) if resumed_at else []

        def full(rows: Rows, where: str = where, step: int = step, before: Rows = first) -> AbstractContextManager[Any]:
            def when(count: int, training: bool) -> bool:
                done = len(of_kind(before, "train")) + len(of_kind(rows, "train"))
                began = bool(of_kind(rows, "started"))
                return began and count > 4 and training == (where != "evaluation") and done >= step

            return memory_runs_out(when, backward=where == "backward")

        second = run_while(going_on(struck) if first else struck, full)
        both = [*first, *second]
        assert of_kind(second, "out_of_memory"), (where, step)
        assert [row["samples"] for row in of_kind(both, "train")] == [8, 8, 7] * 4
        got = [row["loss"] for row in both if row["kind"] in ("train", "validation")]
        assert got == pytest.approx(expected, rel=1e-5), (where, step)
        shutil.rmtree(struck.output_dir)
    tell(len(trials))


@pytest.mark.parametrize("where", ["activation", "loss", "gradient"])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_no_number_reaches_the_weights(family: str, where: str, tmp_path: Path, tell: Any) -> None:
    """At 17 steps each: 102 in all."""
    saving = facts.saving(every_steps=1, keep_last=99)
    for step in range(2, 19):
        errand = small_errand(tmp_path, family, epochs=7, saving=saving, output_dir=str(tmp_path / "run"))
        rows = run_while(errand, lambda rows, step=step: not_a_number(step, where, rows))  # type: ignore[misc]
        assert [row["step"] for row in of_kind(rows, "skipped_step")] == [step]
        folder = tmp_path / "run" / "checkpoints"
        for name in ("model.safetensors", "optimizer.safetensors"):
            before, after, later = (
                manifest.verify(folder / manifest.name_of(s)).files[name].sha256 for s in (step - 1, step, step + 1)
            )
            assert before == after != later
        shutil.rmtree(errand.output_dir)
    tell(17)


def test_damage_is_named_and_the_one_before_is_used(tmp_path: Path, tell: Any) -> None:
    random.seed(2)
    saved(tmp_path, 5, 10)
    newest, older = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (10, 5))
    kept = tmp_path / "kept"
    shutil.copytree(newest, kept)
    for _ in range(500):
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
        name = random.choice(FILES)
        file = newest / name
        match random.choice(("bit", "bit", "cut", "missing", "swapped")):
            case "bit":
                flipped(file, random.randrange(file.stat().st_size * 8))
            case "cut":
                os.truncate(file, random.randrange(file.stat().st_size))
            case "missing":
                file.unlink()
            case "swapped":
                shutil.copy(older / name, file)
        found = find(tmp_path)
        assert found is not None
        assert (found.folder, len(found.damaged)) == (older, 1)
        assert name in found.damaged[0] or "another name" in found.damaged[0]
    tell(500)


PROGRAM = """
import sys
from pathlib import Path
from autotune.errands import ERRAND
from trainer.worker import Events, _train
_train(ERRAND.validate_json(Path(sys.argv[1]).read_bytes()), Events(), lambda: False)
"""


def started(errand: Any, file: Path) -> subprocess.Popen[bytes]:
    Path(errand.output_dir).mkdir(exist_ok=True)
    file.write_text(errand.model_dump_json(by_alias=True))
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(file)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


@pytest.mark.parametrize("part", range(2))
def test_killed_at_a_step_or_in_a_save(part: int, tmp_path: Path, tell: Any) -> None:
    """Signal 9 at 50 places of two epochs: as a row is told, or a moment after, when it may be saving."""
    random.seed(part)
    whole = small_errand(tmp_path, "t5", samples=200, epochs=2, saving=facts.saving(every_steps=3))
    expected = losses(run(whole.model_copy(update={"output_dir": str(tmp_path / "whole")})))
    assert len(expected) == 50
    for step in range(1 + 25 * part, 26 + 25 * part):
        for delay in (0.0, 0.002):
            process = started(whole, tmp_path / "errand.json")
            assert process.stdout is not None
            for line in process.stdout:
                if b'"kind": "train", "step": %d,' % step in line:
                    break
            time.sleep(delay)
            process.kill()
            process.communicate()
            again = started(going_on(whole), tmp_path / "errand.json")
            again.communicate()
            assert again.returncode == 0
            got = [(r["step"], r["loss"].hex(), r["gradient_norm"].hex()) for r in metrics(tmp_path / "run")]
            assert got == expected, (step, delay)
            assert weights(tmp_path / "run") == weights(tmp_path / "whole")
            shutil.rmtree(tmp_path / "run")
    tell(50)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_one_for_any_batch(world_size: int, tmp_path: Path, tell: Any) -> None:
    """Effective batches of 1, 2, 5, 32 and 33 of 40 samples, last steps smaller; all, or one encoder frozen."""
    cases = [
        {"family": family, "effective_batch_size": effective, "frozen": frozen}
        for effective in (1, 2, 5, 32, 33)
        for family, frozen in (("llama", ()), ("t5", ()), ("t5", ("encoder",)))
    ]
    errands = [
        small_errand(
            tmp_path, **case, samples=40, dropout=0.0, epochs=2, max_steps=12, output_dir=str(tmp_path / f"{i}")
        )
        for i, case in enumerate(cases)
    ]
    together = run_together(
        [e.model_copy(update={"output_dir": f"{e.output_dir}-together"}) for e in errands], world_size, tmp_path
    )
    for errand, rows in zip(errands, together, strict=True):
        alone = [row["loss"] for row in of_kind(run(errand), "train")]
        assert [row["loss"] for row in of_kind(rows, "train")] == pytest.approx(alone, rel=1e-5)
    tell(len(cases))


@pytest.mark.parametrize("what", ["killed", "aborted", "stopped"])
def test_a_rank_that_ends_ends_all_in_time_and_is_named(what: str, tmp_path: Path, tell: Any) -> None:
    number = {"killed": signal.SIGKILL, "aborted": signal.SIGABRT, "stopped": signal.SIGSTOP}[what]
    trials = 6 if what == "stopped" else 7
    for trial in range(trials):
        errand = small_errand(
            tmp_path, "llama", world_size=2, epochs=100_000, validation_store=None, heartbeat_seconds=3.0
        )
        with launched(errand, 2) as worker:
            after_steps(worker, 2 + trial)
            processes, struck, began = rank_processes(worker), trial % 2, time.monotonic()
            os.kill(processes[struck], number)
            named: list[int] = []
            try:
                for event in worker.events():
                    named += [event["rank"]] if event["event"] == "rank_failed" else []
            except MachineError as error:
                named.append(int(error.message.split()[1]))
            assert time.monotonic() - began < 10
            assert named == [struck]
        assert not any(map(alive, processes.values()))
        shutil.rmtree(errand.output_dir)
    tell(trials)
