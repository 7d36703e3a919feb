"""Runs that are stopped, killed, short of memory or of ranks: each promise of docs/reliability.md broken on purpose.

Each test ends with a line of its own: how many trials there were, all of which held.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from itertools import cycle, product
from pathlib import Path
from typing import Any

import facts
import pytest
import torch
from conftest import metrics
from injected import Shortage, not_a_number, run_struck, run_while
from micro import steps_told
from small_runs import Rows, evaluations, going_on, losses, of_kind, run, small_errand, stopping_at, weights
from test_checkpoint import FILES, ORIGIN, flipped, new_state, saved, tensors
from test_ranks import after_steps, alive, launched, rank_processes, run_together
from tiers import some, trials

from autotune.errands import Train
from autotune.errors import MachineError
from trainer import manifest
from trainer.checkpoint import restore, save
from trainer.manifest import find
from trainer.progress import Best, Progress, Watch

STEPS = 60
EPOCHS = 20
"""Of three steps each."""


@pytest.mark.parametrize("micro_batch_size", [2, 8])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_stop_and_resume_at_every_step(family: str, micro_batch_size: int, tmp_path: Path, tell: Any) -> None:
    whole = small_errand(tmp_path, family, micro_batch_size=micro_batch_size, epochs=EPOCHS, eval_every=7)
    rows = run(whole)
    assert losses(rows)[-1][0] == STEPS
    stops = some(range(1, STEPS + 1), 2)
    for step in stops:
        errand = whole.model_copy(update={"output_dir": str(tmp_path / f"stopped-{step}")})
        first = run(errand, stopping_at(step))
        second = run(going_on(errand))
        assert losses(first) + losses(second) == losses(rows)
        assert evaluations(first) + evaluations(second) == evaluations(rows)
        assert weights(Path(errand.output_dir)) == weights(Path(whole.output_dir))
        shutil.rmtree(errand.output_dir)
    tell(len(stops))


def shortages(
    wheres: tuple[str, ...], rank_sets: tuple[tuple[int, ...], ...], trials: int
) -> list[tuple[Shortage, int]]:
    """At the first step, in the middle, near the end; every second one in a run that was stopped and resumed before."""
    drawn = []
    for number, (where, ranks) in zip(range(trials), cycle(product(wheres, rank_sets)), strict=False):
        # Of what fails once in a save, the last save is left out: it ends a run that nothing would be left of.
        after = 0 if number < len(wheres) * len(rank_sets) else random.randrange(9 if where == "save" else 12)
        drawn.append((Shortage(where, after, ranks), after // 2 if number % 2 else 0))
    return drawn


def check_struck(struck: list[tuple[Shortage, int]], all_rows: list[Rows], whole: Rows) -> None:
    """The samples and the losses are those of a run that had its memory, and each shortage was told."""
    for (shortage, _), rows in zip(struck, all_rows, strict=True):
        assert of_kind(rows, "save_failed" if shortage.where == "save" else "out_of_memory"), shortage
        assert [row["samples"] for row in of_kind(rows, "train")] == [row["samples"] for row in of_kind(whole, "train")]
        for kind in ("train", "validation"):
            got, expected = ([row["loss"] for row in of_kind(r, kind)] for r in (rows, whole))
            assert got == pytest.approx(expected, rel=1e-5), shortage
        assert rows[-1]["event"] == "finished"


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_memory_runs_out_anywhere(family: str, tmp_path: Path, tell: Any) -> None:
    random.seed(1)
    errand = small_errand(tmp_path, family, micro_batch_size=8, dropout=0.0, layout="fixed", eval_every=4,
                          saving=facts.saving(every_steps=3))  # fmt: skip
    whole = run(errand.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    struck = shortages(("forward", "backward", "evaluation", "save"), ((0,),), trials(6, 50))
    rows = []
    for shortage, resumed_at in struck:
        rows.append(run_struck(errand, shortage, resumed_at))
        shutil.rmtree(errand.output_dir)
    check_struck(struck, rows, whole)
    tell(len(struck))


@pytest.mark.parametrize("family", some(["t5", "llama"], 1))
def test_memory_runs_out_on_one_rank_or_on_all(family: str, tmp_path: Path, tell: Any) -> None:
    random.seed(3)
    errand = small_errand(tmp_path, family, samples=46, effective_batch_size=16, micro_batch_size=8, dropout=0.0,
                          layout="fixed", eval_every=4, saving=facts.saving(every_steps=3))  # fmt: skip
    whole = run(errand.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    struck = shortages(("forward", "backward", "evaluation", "sum"), ((0,), (1,), (0, 1)), trials(3, 45))
    struck += shortages(("save",), ((0,),), trials(1, 5))
    errands = [errand.model_copy(update={"output_dir": str(tmp_path / f"{i}")}) for i in range(len(struck))]
    check_struck(struck, run_together(errands, 2, tmp_path, struck), whole)
    tell(len(struck))


@pytest.mark.parametrize("where", ["activation", "loss", "gradient"])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_no_number_reaches_the_weights(family: str, where: str, tmp_path: Path, tell: Any) -> None:
    """At 17 steps each: 102 in all."""
    steps = some(range(2, 19), 2)
    saving = facts.saving(every_steps=1, keep_last=99)
    for step in steps:
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
    tell(len(steps))


def test_damage_is_named_and_the_one_before_is_used(tmp_path: Path, tell: Any) -> None:
    random.seed(2)
    saved(tmp_path, 5, 10)
    newest, older = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (10, 5))
    kept = tmp_path / "kept"
    shutil.copytree(newest, kept)
    for _ in range(trials(60, 500)):
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
    tell(trials(60, 500))


def test_what_is_restored_is_what_was_saved(tmp_path: Path, tell: Any) -> None:
    """Weights, moments, the loss scale, and all that is known of the way."""
    random.seed(10)
    for step in range(1, trials(4, 60)):
        family, optimizer = random.choice(("llama", "t5")), random.choice(("adamw", "adafactor"))
        before, after = (new_state(family, optimizer, seed) for seed in (step, step + 1))
        watch = Watch([random.random() for _ in range(step)], [random.random()], random.randrange(5))
        kept = Progress(
            step,
            8 * step + 1,
            step - 1,
            random.random(),
            random.random(),
            Best(step - 1, random.random(), random.randrange(5)),
            watch,
        )
        save(tmp_path / manifest.FOLDER, before, kept, ORIGIN, 2)
        found = find(tmp_path)
        assert found is not None
        assert restore(found, after) == kept
        assert all(torch.equal(value, tensors(after)[name]) for name, value in tensors(before).items())
    tell(step)


def killed_or_ended(errand: Train, ranks: int, at_step: int | None, delay: float) -> bool:
    """Train until the end (True), until it kills itself, or until this step and a moment after."""
    with launched(errand, ranks) as worker:
        for event in worker.events():
            row = event.get("row", {})
            if row.get("event") == "finished":
                return worker.exit_code == 0
            if at_step is not None and row.get("kind") == "train" and row["step"] >= at_step:
                time.sleep(delay)
                worker.kill()
                return False
        assert worker.was_killed, worker.last_words()
    return False


@pytest.mark.parametrize("ranks", some([1, 2], 1))
def test_killed_whole_again_and_again(ranks: int, tmp_path: Path, monkeypatch: Any, tell: Any) -> None:
    """Signal 9 to all at 50 places: before the first checkpoint, at a step or a moment after, at any place of a save.

    Each run is killed, resumed and killed again until it has come to its end, which is to be that of one left alone.
    """
    random.seed(ranks)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "struck"))
    samples = trials(40, 200)
    whole = small_errand(
        tmp_path, "t5", samples=samples, epochs=2, world_size=ranks, saving=facts.saving(every_steps=3)
    )
    apart = whole.model_copy(update={"output_dir": str(tmp_path / "whole")})
    assert killed_or_ended(apart, ranks, None, 0.0)
    expected = told_losses(tmp_path / "whole")
    assert len(expected) == 2 * samples / 8
    kills, runs, in_saves = 0, 0, 0
    while kills < trials(2, 50) or runs == 0:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        ended, first = False, True
        while not ended:
            before = steps_told(tmp_path / "run")
            if first or random.random() < 0.5:
                at_step = random.choice((1, 2)) if first else before + random.randint(1, 6)
                ended = killed_or_ended(whole if first else going_on(whole), ranks, at_step, random.random() / 50)
            else:
                with monkeypatch.context() as inside:
                    inside.setenv("KILLED_AT", str(random.randint(1, 30)))
                    ended = killed_or_ended(going_on(whole), ranks, None, 0.0)
                in_saves += not ended
            first = False
            kills += not ended
        assert told_losses(tmp_path / "run") == expected
        assert weights(tmp_path / "run") == weights(tmp_path / "whole")
        runs += 1
    assert in_saves > trials(0, 10)
    tell(kills)


def told_losses(folder: Path) -> list[tuple[int, str, str]]:
    return [(row["step"], row["loss"].hex(), row["gradient_norm"].hex()) for row in metrics(folder)]


@pytest.mark.parametrize("world_size", some([2, 3], 1))
def test_ranks_are_one_for_any_batch(world_size: int, tmp_path: Path, tell: Any) -> None:
    """Effective batches of 1, 2, 5, 32 and 33 of 40 samples, last steps smaller; all, or one encoder frozen."""
    cases = [
        {"family": family, "effective_batch_size": effective, "frozen": frozen}
        for effective in (1, 2, 5, 32, 33)
        for family, frozen in (("llama", ()), ("t5", ()), ("t5", ("encoder",)))
    ]
    cases = some(cases, 3)
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


@pytest.mark.parametrize("what", some(["killed", "aborted", "raises", "stopped"], 2))
def test_a_rank_that_ends_ends_all_in_time_and_is_named(what: str, tmp_path: Path, monkeypatch: Any, tell: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "struck"))
    number = {"killed": signal.SIGKILL, "aborted": signal.SIGABRT, "raises": signal.SIGUSR2, "stopped": signal.SIGSTOP}[
        what
    ]
    count = trials(1, 5)
    for trial in range(count):
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
    tell(count)
