"""A run as it goes: a live line on a terminal, a plain line every half minute elsewhere. Counts in optimizer steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from autotune.bottleneck import Spent
from autotune.plan import Plan
from autotune.remaining import Pace
from cli.render.console import err, say
from cli.render.units import duration, gib, number

Metrics = dict[str, Any]
QUIET_SECONDS = 30.0
MUCH, SETTLED_STEPS = 0.1, 16
"""Change of a run's steps that people are told of, once its process has taken so many."""
SHOWN = 60
"""Characters of a prompt and of its answer that a line has room for."""


def verified_line(row: Metrics) -> str:
    """Say what was proven of the layout, on this model and its first samples."""
    layout, asked, errors = row["layout"], row["asked"], row["errors"]
    if row["event"] == "unverified":
        return f"NOT verified: {layout} rows change this model's gradient by {errors[layout]:.0e}, and so does all else"
    proven = f"{layout} rows have the gradient of each sample by itself (within {errors[layout]:.0e})"
    if layout == asked:
        return f"verified: {proven}"
    return f"{asked} rows change this model's gradient by {errors[asked]:.0e} and are not used; verified: {proven}"


def validation_line(row: Metrics) -> str:
    """Say what an evaluation came to."""
    bleu = f", BLEU {row['bleu']:.2f}" if "bleu" in row else ""
    best = "; the best so far" if row["best"] else ""
    return (
        f"step {row['step']}: validation loss {number(row['loss'], '.4f')}, "
        f"perplexity {number(row['perplexity'], '.2f')}, {row['accuracy']:.1%} of tokens right{bleu}{best}"
    )


def sample_line(row: Metrics) -> str:
    """Show how a prompt was answered, on a line."""
    prompt, answer = (_shortened(row[name] or "") for name in ("prompt", "answer"))
    return f"step {row['step']}: {prompt} -> {answer}"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."


def resumed_lines(row: Metrics) -> list[str]:
    """Say what a run goes on from, what of it was verified, and what is not as it was."""
    how = "its weights alone" if row["weights_only"] else f"step {row['step']}"
    lines = [f"{name}, so it is passed over" for name in row["damaged"]]
    lines.append(f"going on from {row['checkpoint']}, {how}: {gib(row['verified_bytes'])} verified to the byte")
    if row["given_up"]:
        lines.append(
            f"later checkpoints were moved aside, to {Path(row['given_up'][0]).parent}: {len(row['given_up'])}"
        )
    if row["changed"]:
        lines.append(f"changed since it was saved: {', '.join(row['changed'])}")
    if not row["same_plan"]:
        lines.append("under another plan: the same samples go into every step, losses may differ in their last digits")
    return lines


def out_of_memory_lines(row: Metrics) -> list[str]:
    """Say that memory ran out in spite of the plan, and what became of it."""
    if row["where"] == "answers":
        return [f"step {row['step']}: no memory for answers ({row['message']}): left out this time"]
    if row["rows_now"] is None:
        return []
    return [
        f"step {row['step']}: memory ran out in the {row['where']} ({row['message']}); taken again in micro-batches of "
        f"{row['rows_now']} rows instead of {row['rows']}, with the same samples"
    ]


def spike_lines(row: Metrics) -> list[str]:
    """Say what leapt."""
    names = [name for name in ("loss", "gradient_norm") if name in row]
    leapt = " and ".join(f"{name.replace('_', ' ')} {row[name]:.4g} (mean {row[f'mean_{name}']:.4g})" for name in names)
    return [f"step {row['step']}: a leap in {leapt}"]


EVENTS: dict[str, Callable[[Metrics], list[str]]] = {
    "resumed": resumed_lines,
    "out_of_memory": out_of_memory_lines,
    "spike": spike_lines,
    "rows_wait": lambda row: [f"step {row['step']}: {row['message']}; rows wait until it can be written"],
    "curves_end": lambda row: [
        f"step {row['step']}: {row['message']}; TensorBoard's curves end here, training goes on"
    ],
    "save_failed": lambda row: [f"step {row['step']}: {row['message']}; training goes on"],
}


class RunProgress:
    """Shows the rows of a run as they come, and remembers the few that its summary needs."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._pace = plan, Pace()
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.validation_loss: float | None = None
        self.peak_bytes = 0
        self.steps = self.tokens = self.skipped = self.saved = 0
        self._own_steps = 0
        self.seconds = self.flops_share = 0.0
        self.spent = Spent()
        self.against: Metrics = {}
        self.ended = ""
        self.model = ""
        self.best: Metrics = {}
        self._sampled = 0
        self._total = self._told_total = 0
        self._told = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if err.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                console=err,
            )

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, row: Metrics) -> None:
        """Take in one row of metrics."""
        self._pace.add(row)
        if row["kind"] == "train":
            self._show_step(row)
        elif row["kind"] == "validation":
            self.validation_loss = row["loss"]
            self.peak_bytes = max(self.peak_bytes, row["peak_memory_bytes"])
            say(validation_line(row))
        elif row["kind"] == "sample":
            if row["step"] != self._sampled:  # the first of them: all are in samples.jsonl
                say(sample_line(row))
            self._sampled = row["step"]
        elif row["event"] == "started":
            self._total = self._told_total = row["total_steps"]
            if row["step"] and row.get("schedule_done") is not None:
                done = f"{row['schedule_done']:.0%}"
                say(f"its schedule is done to {done}: the steps that are left take what is left of it")
            if self._bar is not None:
                self._task = self._bar.add_task("", total=self._total)
        elif row["event"] == "rescheduled":
            self._reschedule(row)
        elif row["event"] in ("verified", "unverified"):
            say(verified_line(row))
        elif row["event"] == "data_changed":
            say(f"{row['file']} has changed since it was tokenized: this run trains on what it was")
        elif row["event"] == "skipped_step":
            self.skipped += 1
        elif row["event"] == "sampled":
            self.peak_bytes = max(self.peak_bytes, row["peak_memory_bytes"])
        elif row["event"] == "early_stopping":
            best = f"less than step {row['best_step']} with {row['best_loss']:.4f}" if "best_step" in row else "finite"
            say(f"step {row['step']}: early stopping, the last {row['evaluations']} losses were not {best}")
        elif row["event"] == "plan_against_real":
            self.against = row
        elif row["event"] == "checkpoint":
            self.saved = row["step"]
        elif row["event"] in EVENTS:
            for line in EVENTS[row["event"]](row):
                say(line)
        else:
            self.ended, self.model = row["event"], row.get("model", "")
            self.best = row if "best_step" in row else {}

    def _reschedule(self, row: Metrics) -> None:
        """Take in that other steps fit the time than did; tell of it where it is much."""
        self._total = row["total_steps"]
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)
        if self._own_steps >= SETTLED_STEPS and abs(self._total - self._told_total) > MUCH * self._told_total:
            say(f"step {row['step']}: {self._total:,} steps fit the time, by what they take, not {self._told_total:,}")
            self._told_total = self._total

    def _show_step(self, row: Metrics) -> None:
        if not self._own_steps:
            self.first_loss = row["loss"]
        self._own_steps += 1
        self.steps, self.last_loss = row["step"], row["loss"]
        self.tokens += row["tokens"]
        self.seconds += row["seconds"]
        self.flops_share += row.get("model_flops_utilization", 0.0) * row["seconds"]
        names = ("seconds", "data_seconds", "tokens", "padded_tokens", "micro_batches")
        self.spent.add(*(row[name] for name in names))
        self.peak_bytes = max(self.peak_bytes, row["peak_memory_bytes"])
        left = self._pace.left(self._plan)
        eta = f"  ETA {duration(left.seconds)}" if left else ""
        text = (
            f"loss {number(row['loss'], '.4f')}  lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tok/s  "
            f"peak {gib(self.peak_bytes)}{eta}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=self.steps, description=text)
        elif self._own_steps == 1 or self.steps == self._total or time.monotonic() - self._told >= QUIET_SECONDS:
            self._told = time.monotonic()
            say(f"step {self.steps}/{self._total}  {text}")
