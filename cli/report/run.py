"""One run as part of a page: how it went beside its plan, its data, its samples, its configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from autotune.errands import DataSummary
from autotune.plan import Plan
from cli.history import Metrics, RunData
from cli.render.data import data_line, histogram_bars, sides
from cli.render.units import count, duration, gib
from cli.report.bars import Bar, Bars, bars, histogram
from cli.report.measures import difference, figure_of, loss
from cli.report.page import Section, details, figure, figures, pairs, paragraph, quoted, table
from cli.report.plan import planned_peak
from cli.report.text import shortened
from cli.report.told import Told, total

DECIDED = ("rule", "plan", "this run")
"""Origins of what nobody gave."""
MOST_PROMPTS, MOST_ANSWERS, MOST_CHARACTERS = 12, 10, 1200
LENGTHS = 24
"""Bars of a histogram of lengths."""


STATES = {
    "running": "Still running",
    "finished": "Finished",
    "stopped": "Stopped, to go on with --resume",
    "died": "Ended without a word",
}


def run_title(run: Told) -> str:
    """Return what a page about a run is called."""
    plan = run.history.plan
    return f"{run.name}: {plan.workload.model} on {plan.hardware.device_name}" if plan else run.name


def run_lead(run: Told) -> list[str]:
    """Say in sentences what was trained on what, how it ended, and how true the plan was."""
    return [line for line in (_trained(run), _ended(run), _truth(run)) if line]


def _trained(run: Told) -> str:
    plan, values = run.history.plan, {name: value for name, value, _ in run.history.settings()}
    if plan is None:
        return "The folder has no plan that can be read."
    work, cast = plan.workload, plan.forecast
    what = "Fine-tuning" if work.stage == "sft" else "Pretraining"
    amount = f", {count(cast.rows, 'sample')}, {_epochs(values.get('epochs', ''), cast.epochs)}" if cast else ""
    return (
        f"{what} of {work.model} ({work.parameters / 1e6:.1f} M parameters, {work.precision}) on "
        f"{_files(values.get('data', ''))}{amount}; {_batch(plan)}."
    )


def _batch(plan: Plan) -> str:
    batching = plan.batching
    return (
        f"{count(batching.effective_batch_size, 'sample')} a step, in micro-batches of at most "
        f"{count(batching.micro_batch_size, 'row')}"
    )


def _epochs(value: str, planned: float) -> str:
    """Name the epochs that the run was given last: it may have gone on with more than its plan was asked for."""
    with suppress(ValueError):
        if math.isfinite(epochs := float(value)):
            return count_of(epochs, "epoch")
    return count_of(planned, "epoch")


def count_of(number: float, noun: str) -> str:
    """Render a number of things that need not be whole: 1.5 epochs."""
    return f"{number:g} {noun}" + "s" * (number != 1)


def _files(value: str) -> str:
    """Name data files by what their folders hold."""
    files = None
    with suppress(ValueError, RecursionError):
        files = json.loads(value)
    if files == []:
        return "the demo data"
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        return "data that its configuration does not name"
    names = [Path(file).name for file in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _ended(run: Told) -> str:
    history = run.history
    of_all = f" of {history.total_steps:,}" if history.total_steps else ""
    state = STATES[history.state]
    if run.losses is None:
        return f"{state}; no step was taken yet."
    first, last = run.losses
    taken = f" in {duration(run.seconds)}" if run.seconds else ""
    said = f"{state} after {history.steps:,}{of_all} steps{taken}: loss {loss(first)} to {loss(last)}"
    if run.best is not None:
        before = next(y for _, y in run.validation())
        said += f"; on held-out data {loss(before)} to {loss(run.validation()[-1][1])}"
        said += f", best {loss(run.best[1])} at step {run.best[0]:,.0f}"
    return said + "."


def _truth(run: Told) -> str:
    plan = run.history.plan
    if plan is None or run.losses is None:
        return ""
    peak, held = planned_peak(plan), round(run.peak_bytes)
    said = [f"a peak of at most {gib(peak)}, really {gib(held)} ({difference(held, peak)})"] if peak and held else []
    speed, real, seconds = run.planned_tokens_per_second, run.tokens_per_second, run.planned_seconds
    if speed and math.isfinite(real):
        said.append(f"{speed:,.0f} tokens/s, really {real:,.0f} ({difference(real, speed)})")
    if seconds and run.seconds:
        said.append(f"{duration(seconds)}, really {duration(run.seconds)} ({difference(run.seconds, seconds)})")
        answers = run.generation_seconds
        said[-1] += f", of which {duration(answers)} went into answers" if answers >= 1 else ""
    return f"The plan said {'; '.join(said)}." + _extended(run) if said else _extended(run).strip()


def _extended(run: Told) -> str:
    """Say that a plan is of fewer steps than the run: it went on with more than the plan was asked for."""
    if run.forecast is None or not run.was_extended:
        return ""
    return (
        f" The plan is of {run.forecast.asked_steps:,} steps, the run has {run.steps_in_all:,}: "
        "its time is held against that of as many at the plan's pace."
    )


def run_facts(run: Told) -> list[tuple[str, str]]:
    """Return the figures that sum a run up."""
    if run.losses is None:
        return []
    plan, best = run.history.plan, run.best
    facts = [("Loss", " → ".join(loss(value, ".3f") for value in run.losses))]
    if best is not None:
        facts.append(("Best held-out loss", loss(best[1], ".3f")))
    facts += [("Steps", f"{run.history.steps:,}"), ("Time", duration(run.seconds or math.nan))]
    facts.append(("Speed", figure_of(run.tokens_per_second, ",.0f", " tokens/s")))
    of = f", of {gib(plan.memory.budget_bytes)}" if plan else ""
    return [*facts, (f"Peak{of}", gib(round(run.peak_bytes) or None))]


def data_section(run: Told) -> Section:
    """Return what a page says of a run's data: its lengths, and what each layout would pad."""
    kept = run.history.data()
    if kept is None:
        return Section("The data", "")
    told = [("Trained on", data_line(kept.data))]
    if kept.validation is not None:
        told.append(("Held out", data_line(kept.validation)))
    drawn = [_lengths(kept.data, side, name) for side, name in enumerate(sides(kept.data))]
    return Section("The data", pairs(told) + figures([*drawn, _padding(run, kept)]))


def _lengths(data: DataSummary, side: int, name: str) -> str:
    longest, half = data.longest(side), data.percentile(side, 0.5)
    label = f"Histogram of {name} in tokens: half up to {half}, longest {longest}"
    drawn = histogram(label, "tokens", "samples", histogram_bars(data.lengths[side], LENGTHS))
    title = "Length of samples" if name == "length" else f"Length of each {name}"
    note = f"Half of them up to {half:,} tokens, 95 % up to {data.percentile(side, 0.95):,}, the longest {longest:,}."
    return figure(title, drawn, note)


def _padding(run: Told, kept: RunData) -> str:
    chosen = run.history.plan.workload.layout if run.history.plan else None
    made = [
        Bar(
            layout + " (chosen)" * (layout == chosen),
            0.0,
            100 * share,
            f"{100 * share:.0f} %",
            "c1" if layout == chosen else "c0",
        )
        for layout, share in kept.padding.items()
    ]
    label = "Padding by layout: " + ", ".join(f"{bar.name} {bar.said}" for bar in made)
    padded, tokens = (total(run.history.columns[name]) for name in ("padded_tokens", "tokens"))
    real = f" In this run: {100 * (1 - tokens / padded):.0f} %." if padded else ""
    drawn = bars(label, Bars("% of what is computed", made, least_high=100.0))
    return figure("Padding by layout", drawn, f"Share of what is computed that is no token, as expected.{real}")


class Answer(NamedTuple):
    """An answer to a prompt, after a step."""

    step: int
    text: str


def samples_section(run: Told) -> Section:
    """Return how fixed prompts were answered, step by step."""
    prompts: dict[str, list[Metrics]] = {}
    for row in run.history.samples():
        if isinstance(row.get("prompt"), str):
            prompts.setdefault(row["prompt"], []).append(row)
    body = "".join(_prompt(prompt, rows) for prompt, rows in list(prompts.items())[:MOST_PROMPTS])
    left = len(prompts) - MOST_PROMPTS
    return Section("Samples over time", body + (paragraph(f"{count(left, 'prompt')} more.") if left > 0 else ""))


def _prompt(prompt: str, rows: Sequence[Metrics]) -> str:
    shown = _spread([Answer(int(row["step"]), str(row.get("answer") or "")) for row in rows], MOST_ANSWERS)
    answers = "".join(f"<span>step {one.step:,}</span>{_answer(one.text)}" for one in shown)
    body = quoted(shortened(prompt, MOST_CHARACTERS), "prompt") + f'<div class="answers">{answers}</div>'
    reference = rows[-1].get("reference")
    if len(shown) < len(rows):
        body += f'<p class="empty">{len(shown)} of {len(rows)} answers, spread over the run.</p>'
    if isinstance(reference, str):
        body += details("What the data answers", quoted(shortened(reference, MOST_CHARACTERS), "reference"))
    return body


def _answer(text: str) -> str:
    return quoted(shortened(text, MOST_CHARACTERS), "answer") if text.strip() else '<div class="empty">(nothing)</div>'


def _spread(answers: Sequence[Answer], most: int) -> list[Answer]:
    """Return so many at most, the first and the last among them, evenly between."""
    if len(answers) <= most:
        return list(answers)
    return [answers[round(i * (len(answers) - 1) / (most - 1))] for i in range(most)]


def configuration_section(run: Told) -> Section:
    """Return what the run was given: by the user first, then what was decided, defaults where they are asked for."""
    settings = run.history.settings()
    head = ("setting", "value", "from")
    given = [one for one in settings if one[2] != "default" and one[2] not in DECIDED]
    decided = [one for one in settings if one[2] in DECIDED]
    defaults = [one for one in settings if one[2] == "default"]
    body = table(head, given) if given else ""
    for title, rows in (("Decided by rule or by the plan", decided), ("Defaults", defaults)):
        if rows:
            body += details(f"{title}: {len(rows)}", table(head, rows))
    return Section("Configuration", body)
