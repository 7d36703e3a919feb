"""A run in small before the run: two real steps on its longest samples, all that comes between, a kill and a resume.

Yields numbered checks as they end; what one that failed makes pointless is not tried. Prints nothing, leaves nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from autotune.disk import remove, sync
from autotune.errands import Preprocessed, Resume, Saving, Train
from autotune.errors import MachineError, UserError
from autotune.plan import Hardware, Plan, Workload
from autotune.process import Event, Worker, WorkerCrashedError
from cli.render.notes import UNKNOWN_SHARE
from cli.render.units import count, gib
from cli.runs import SCRATCH, RunPlace, check_disk, disk_needed
from cli.training import Job, make_errand

Metrics = dict[str, Any]
Verdict = Literal["ok", "look", "FAILED", "not tried"]
STEPS = 2
ANSWERS = 8
"""Rows that are answered at most: an evaluation answers more, as the plan's hours say."""
MUCH_TOO_LONG = 8
"""Times the limit: a row of so many tokens is rather a file that is broken than a sample."""
CHANCE = 0.95
"""Of the loss of guessing, from which on pretrained weights know nothing of what they are given."""
SAME_SHARE = 1e-3
"""By which a step may differ on a card, whose kernels need not add in one order."""
WORDS_BYTES = 2**20
"""Written to see whether a folder takes anything."""


class Check(NamedTuple):
    """What was looked at, and what was seen."""

    name: str
    verdict: Verdict
    told: str
    seconds: float = 0.0
    bytes: int | None = None


def check_folder(folder: Path) -> Check:
    """Write, sync, rename and read in the folder of a run; raises MachineError where the disk refuses."""
    began, file = time.perf_counter(), folder / f"{SCRATCH}.bin"
    try:
        partial = file.with_suffix(".partial")
        partial.write_bytes(bytes(WORDS_BYTES))
        sync(partial)
        partial.replace(file)
        file.unlink()
    except OSError as error:
        raise MachineError(
            f"{folder}: {error.strerror or error}", "free some of the disk, or give another --output-dir"
        ) from None
    return Check("folder", "ok", f"{folder} can be written, synced and renamed in", time.perf_counter() - began)


def check_rows(facts: Preprocessed) -> Check:
    """Look for rows that are cut, and for one that can be no sample."""
    data = facts.data
    assert data is not None
    # Documents are split, whatever they hold, and none of that is lost.
    (tokens, place), cut = data.longest_row, sum(rows for rule, rows in data.cuts.items() if rule != "split")
    limit = sum(data.longest(side) for side in range(len(data.lengths)))
    told = f"longest: {tokens:,} tokens ({place})"
    if cut and tokens > MUCH_TOO_LONG * limit:
        return Check("rows", "FAILED", f"{told}, {tokens / limit:.0f} times what a sample may have: look at that row")
    if cut:
        return Check("rows", "look", f"{told}; {count(cut, 'row')} of {data.rows:,} are cut, the longest kept {limit}")
    return Check("rows", "ok", f"{told}; none is cut")


def check_tokenizer(facts: Preprocessed) -> Check:
    """See whether the tokenizer knows the data's words."""
    data = facts.data
    assert data is not None
    share = data.unknown_share
    if share > UNKNOWN_SHARE:
        told = f"{share:.0%} of the data's tokens are unknown to it: another tokenizer, or none, which trains one"
        return Check("tokenizer", "FAILED", told)
    told = f"{facts.model.vocabulary_size:,} entries, {share:.1%} of the data's tokens unknown to it"
    return Check("tokenizer", "ok", told)


def check_room_on_disk(folder: Path, workload: Workload, keep_last: int, hardware: Hardware) -> Check:
    """Hold what all checkpoints and models take against the disk; raises MachineError where there is less."""
    check_disk(folder, workload, keep_last, hardware)
    needed = disk_needed(workload, keep_last)
    told = f"checkpoints and models take {gib(needed)}, {gib(hardware.disk_free_bytes)} are free"
    return Check("disk", "ok", told, bytes=needed)


def check_memory(plan: Plan) -> Check:
    """Tell the plan's own account, which planning has held against the machine."""
    memory = plan.memory
    peak = memory.measured_peak_bytes or memory.predicted_peak_bytes or 0
    told = f"the plan's peak of {gib(peak)} is within {gib(memory.budget_bytes)}"
    if plan.hardware.device == "cuda":
        told += f"; on the host {gib(memory.host_peak_bytes)} within {gib(memory.host_budget_bytes)}"
    return Check("memory", "ok", told, bytes=peak)


def attempt(name: str, look: Callable[[], Check]) -> Check:
    """Make a check; what the user can mend is its failure, in words."""
    began = time.perf_counter()
    try:
        return look()
    except UserError as error:
        told = error.message + (f"; {error.hint}" if error.hint else "")
        return Check(name, "FAILED", told, time.perf_counter() - began)


@dataclass
class Act:
    """What one worker did: its rows by kind, and how it ended where it should not have."""

    rows: list[Metrics] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0

    def take(self, event: Event) -> None:
        """Take in what the worker says."""
        if event["event"] == "metrics":
            self.rows.append(event["row"])
        elif event["event"] == "out_of_memory":
            self.failure = f"memory ran out: {event['message']}"

    def of(self, kind: str, event: str = "") -> list[Metrics]:
        """Return its rows of a kind, or its events of a name."""
        return [row for row in self.rows if row["kind"] == kind and (not event or row.get("event") == event)]

    def step(self, number: int) -> Metrics | None:
        """Return the row of a step; None where it was not taken."""
        return next((row for row in self.of("train") if row["step"] == number), None)

    @property
    def evaluation(self) -> Metrics | None:
        """The last row of an evaluation, with validation data or without."""
        return next(iter(reversed(self.of("validation") + self.of("event", "sampled"))), None)


def rehearse(job: Job, place: Path, lock: int) -> Iterator[Check]:
    """Take two steps on the longest samples, evaluate, answer, save, be killed; go on from the first step, compare."""
    scratch = place / SCRATCH
    remove(scratch)
    try:
        first, second = scratch / "first", scratch / "second"
        for folder in (first, second):
            folder.mkdir(parents=True)
        errand = _errand(job, first)
        act = _play(job, errand, lock, until_saved=STEPS)
        failed = False
        for check in of_first(act, job.plan, job.facts):
            failed = failed or check.verdict == "FAILED"
            yield check
        if failed:
            yield Check("resume", "not tried", "mend what failed first")
            return
        begun = Resume(place=str(first / "checkpoints" / "step-00000001"), weights_only=False)
        going_on = errand.model_copy(update={"output_dir": str(second), "resume": begun})
        again = _play(job, going_on, lock)
        yield resumed(act, again, exact=job.hardware.device == "cpu")
        yield _model(again, second)
    finally:
        remove(scratch)


def of_first(act: Act, plan: Plan, facts: Preprocessed) -> Iterator[Check]:
    """Say what became of each thing that the first worker had to do."""
    yield from _proof(act)
    yield from _steps(act, plan, facts)
    yield from _evaluation(act)
    yield from _save(act)


def _errand(job: Job, folder: Path) -> Train:
    """Return what the run would be asked, of its longest samples alone and with a checkpoint after each step."""
    whole = make_errand(job, RunPlace(folder, None), None)
    return whole.model_copy(
        update={
            "recipe": whole.recipe.model_copy(
                update={
                    "epochs": float(STEPS),
                    "max_steps": STEPS,
                    "bleu_rows": min(ANSWERS, whole.recipe.bleu_rows),
                    "early_stopping": None,
                    "eval_every": STEPS,
                }
            ),
            "saving": Saving(every_steps=1, every_seconds=None, each_epoch=False, keep_last=STEPS),
            "longest": STEPS * job.plan.batching.effective_batch_size,
            "tensorboard": False,
        }
    )


def _play(job: Job, errand: Train, lock: int, until_saved: int | None = None) -> Act:
    """Run a worker and keep its rows; kill it, as a machine dies, once the checkpoint of a step is there."""
    act, allocator = Act(), job.plan.workload.cpu_allocator
    log = Path(errand.output_dir) / "log.txt"
    with (
        log.open("w+b") as words,
        Worker(job.hardware.cores, allocator, words, (lock,), job.plan.batching.world_size) as worker,
    ):
        worker.give(errand)
        try:
            for event in worker.events():
                act.take(event)
                saved = act.of("event", "checkpoint")
                if until_saved and saved and saved[-1]["step"] == until_saved:
                    worker.kill()
                    break
            else:
                if not act.of("event", "finished") and not act.failure:
                    raise WorkerCrashedError(f"it ended with exit code {worker.exit_code}: {_last_line(log)}")
        except (UserError, WorkerCrashedError) as error:
            act.failure = act.failure or str(error)
        act.seconds = worker.seconds
    return act


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _proof(act: Act) -> Iterator[Check]:
    for row in act.of("event", "verified"):
        yield Check("proof", "ok", f"{row['layout']} rows have the gradient of each sample by itself")
    for row in act.of("event", "unverified"):
        yield Check("proof", "FAILED", f"{row['layout']} rows change this model's gradient")
    if not act.rows:
        yield Check("proof", "FAILED", act.failure, act.seconds)


def _steps(act: Act, plan: Plan, facts: Preprocessed) -> Iterator[Check]:
    taken = act.of("train")
    if not act.rows:
        return
    ran_out = [row for row in act.of("event", "out_of_memory") if row["where"] == "step"]
    seconds = sum(row["seconds"] for row in taken)
    if ran_out or len(taken) < STEPS:
        why = ran_out[0]["message"] if ran_out else act.failure
        yield Check("steps", "FAILED", f"after {count(len(taken), 'step')} of the longest samples: {why}", seconds)
        return
    peak, planned = max(row["peak_memory_bytes"] for row in taken), plan.memory
    most = planned.measured_peak_bytes or planned.predicted_peak_bytes or 0
    told = f"{STEPS} optimizer steps of the longest samples, {taken[-1]['samples']} each: peak {gib(peak)}"
    told += f", planned {gib(most)}"
    over = peak > planned.limit_bytes
    verdict: Verdict = "FAILED" if over else "look" if peak > 1.05 * most else "ok"
    yield Check("steps", verdict, told, seconds, peak)
    yield _loss(taken, facts)


def _loss(taken: Sequence[Metrics], facts: Preprocessed) -> Check:
    """Hold the first loss against that of guessing: weights to which these tokens say nothing had another tokenizer."""
    loss, guessing = taken[0]["loss"], math.log(facts.model.vocabulary_size)
    if any(row["loss"] is None or row["gradient_norm"] is None for row in taken):
        return Check("loss", "FAILED", "it is not finite: a lower --learning-rate, or --precision bf16 or fp32")
    told = f"{loss:.2f} at first, guessing has {guessing:.2f}"
    if not facts.model.random_weights and loss > CHANCE * guessing:
        return Check("loss", "FAILED", f"{told}: were these weights trained with this tokenizer?")
    return Check("loss", "ok", told)


def _evaluation(act: Act) -> Iterator[Check]:
    if len(act.of("train")) < STEPS:
        return
    ran_out = [row for row in act.of("event", "out_of_memory") if row["where"] != "step"]
    row = act.evaluation
    for where in ("evaluation", "answers"):
        message = next((event["message"] for event in ran_out if event["where"] == where), None)
        if message is not None:
            yield Check(where, "FAILED", f"memory ran out: {message}")
    if row is None:
        if not ran_out:
            yield Check("evaluation", "FAILED", act.failure)
        return
    answering = row.get("generation_seconds", 0.0)
    failed = {event["where"] for event in ran_out}
    if row["kind"] == "validation" and "evaluation" not in failed:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.2f}"
        told = f"{row['samples']} of the longest rows: loss {loss}"
        yield Check("evaluation", "ok", told, row["seconds"] - answering, row["peak_memory_bytes"])
    if "generation_seconds" in row and "answers" not in failed:
        answers = len(act.of("sample")) + row.get("bleu_rows", 0)
        yield Check("answers", "ok", f"{count(answers, 'prompt')} answered", answering)


def _save(act: Act) -> Iterator[Check]:
    if act.evaluation is None:
        return
    saved = act.of("event", "checkpoint")
    if len(saved) < STEPS:
        failed = [row["message"] for row in act.of("event", "save_failed")]
        yield Check("save", "FAILED", failed[0] if failed else act.failure)
        return
    seconds = max(row["seconds"] for row in saved)
    yield Check("save", "ok", f"a checkpoint after each step, in {seconds:.1f} s at most", seconds, saved[-1]["bytes"])
    yield Check("kill", "ok", "the worker was killed with signal 9 as its last checkpoint was there")


def resumed(act: Act, again: Act, *, exact: bool) -> Check:
    """Hold the second step, taken again from the first one's checkpoint, against what it was."""
    before, after = act.step(STEPS), again.step(STEPS)
    if before is None or after is None:
        return Check("resume", "FAILED", again.failure or "the second step was not taken again", again.seconds)
    names = ("loss", "gradient_norm")
    pairs = [(before[name], after[name]) for name in names]
    evaluated = [row.get("loss") for act in (act, again) if (row := act.evaluation) is not None]
    if len(evaluated) == 2 and None not in evaluated:
        pairs.append((evaluated[0], evaluated[1]))
    apart = max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs)
    if apart > (0.0 if exact else SAME_SHARE):
        return Check("resume", "FAILED", f"the second step, taken again, differs by {apart:.1e}", again.seconds)
    how = "to the last bit" if apart == 0 else f"within {apart:.0e}"
    told = f"gone on from step 1: loss, gradient and evaluation of step {STEPS} are the same, {how}"
    return Check("resume", "ok", told, again.seconds)


def _model(again: Act, folder: Path) -> Check:
    files = [file for file in (folder / "model").glob("*") if file.is_file()]
    if again.failure or not any(file.suffix == ".safetensors" for file in files):
        return Check("model", "FAILED", again.failure or "no model was left")
    held = sum(file.stat().st_size for file in files)
    return Check("model", "ok", f"{count(len(files), 'file')} that transformers loads", bytes=held)
