"""Several runs side by side: a column each, and their curves in one chart. Others are held against the first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from cli.render.units import count, duration, gib
from cli.report.charts import MANY, Axis, Point, Series, chart
from cli.report.curves import loss_axis, speed_axis
from cli.report.measures import figure_of, loss, scaled, unit_of_bytes, unit_of_seconds
from cli.report.page import Section, figure, figures, table
from cli.report.plan import planned_peak
from cli.report.run import STATES
from cli.report.told import Told

AxisOf = Callable[[Sequence[float]], tuple[Axis, str]]
"""What makes of a chart's values the axis for them, and a sentence on how it is read."""
LOOKS = (
    ("c0", "circle"),
    ("c1 d1", "diamond"),
    ("c2 d3", "square"),
    ("c3 d2", "triangle"),
    ("c4 d5", "ring"),
    ("c5 d4", "cross"),
    ("c0", "square"),
    ("c1 d1", "triangle"),
    ("c2 d3", "ring"),
    ("c3 d2", "circle"),
    ("c4 d5", "cross"),
    ("c5 d4", "diamond"),
)
"""Of each run in turn: dash and mark together are those of one alone."""
PLAIN = 6
"""Runs that their dashes alone tell apart; the lines of those after have marks, however many points they have."""
MARKS = 12
"""Along a line that needs them to be known by."""


def several_title(runs: Sequence[Told]) -> str:
    """Return what a page about several runs is called."""
    return f"{count(len(runs), 'run')} side by side"


def several_lead(runs: Sequence[Told]) -> list[str]:
    """Say in a sentence for each run what it came to beside the first."""
    first, *others = runs
    return [_beside(first, other) for other in others]


def _beside(first: Told, other: Told) -> str:
    if not _factor(first, other):
        return f"{other.name} has no steps to hold against those of {first.name}."
    said = f"{other.name} took {_factor(first, other):.2f} times the tokens of {first.name} each second"
    losses = [loss(_last_loss(run)) for run in (other, first)]
    said += f"; its loss came to {losses[0]}, that of {first.name} to {losses[1]}"
    if other.best and first.best:
        said += f"; on held-out data {other.best[1]:.4f} at best, against {first.best[1]:.4f}"
    return said + "."


def _factor(first: Told, other: Told) -> float:
    factor = other.tokens_per_second / first.tokens_per_second if first.tokens_per_second else math.nan
    return factor if math.isfinite(factor) else 0.0


def _last_loss(run: Told) -> float:
    smoothed = run.smoothed("loss")
    return smoothed[-1][1] if smoothed else math.nan


def comparison_section(runs: Sequence[Told]) -> Section:
    """Return the figures of each run in a column of its own."""
    head = ("", *(run.name for run in runs))
    rows = [(name, *(of(run) for run in runs)) for name, of in FIGURES]
    factors = [f"{_factor(runs[0], run):.2f} x" if _factor(runs[0], run) else "-" for run in runs]
    return Section("Side by side", table(head, [*rows, ("tokens/s beside the first", *factors)], "numbers"))


def _of_plan(run: Told, what: str) -> str:
    plan = run.history.plan
    if plan is None:
        return "-"
    batching, work = plan.batching, plan.workload
    seconds = run.planned_seconds
    return {
        "model": work.model,
        "rows": f"{batching.micro_batch_size:,}",
        "accumulation": f"{batching.expected_micro_batches_per_step:.3g} x {count(batching.world_size, 'rank')}",
        "effective": f"{batching.effective_batch_size:,}",
        "layout": work.layout,
        "precision": work.precision,
        "peak": gib(planned_peak(plan)),
        "budget": gib(plan.memory.budget_bytes),
        "seconds": duration(seconds) if seconds is not None else "-",
    }[what]


FIGURES: tuple[tuple[str, Callable[[Told], str]], ...] = (
    ("model", lambda run: _of_plan(run, "model")),
    ("how it ended", lambda run: STATES[run.history.state].split(",")[0].lower()),
    ("rows in a micro-batch, at most", lambda run: _of_plan(run, "rows")),
    ("micro-batches a step", lambda run: _of_plan(run, "accumulation")),
    ("effective batch", lambda run: _of_plan(run, "effective")),
    ("layout", lambda run: _of_plan(run, "layout")),
    ("precision", lambda run: _of_plan(run, "precision")),
    ("steps", lambda run: f"{run.history.steps:,}"),
    ("time", lambda run: duration(run.seconds or math.nan)),
    ("time by the plan", lambda run: _of_plan(run, "seconds")),
    ("tokens/s", lambda run: figure_of(run.tokens_per_second, ",.0f")),
    ("samples/s", lambda run: figure_of(run.samples_per_second, ",.1f")),
    ("peak", lambda run: gib(round(run.peak_bytes) or None)),
    ("peak by the plan", lambda run: _of_plan(run, "peak")),
    ("budget", lambda run: _of_plan(run, "budget")),
    ("loss, first", lambda run: figure_of(run.losses[0], ".4f") if run.losses else "-"),
    ("loss, last smoothed", lambda run: figure_of(_last_loss(run), ".4f")),
    ("held-out loss, best", lambda run: f"{run.best[1]:.4f} at step {run.best[0]:,.0f}" if run.best else "-"),
)


def curves_section(runs: Sequence[Told]) -> Section:
    """Return the curves of all runs in one chart for each thing."""
    longest, steps = max(run.seconds for run in runs), max(run.history.steps for run in runs)
    of_time, seconds = unit_of_seconds(longest)
    of_memory, in_bytes = unit_of_bytes(max(run.peak_bytes for run in runs))
    along = Axis("step", covers=(0.0, float(steps or 1)))
    by_time = Axis(of_time, covers=(0.0, longest / seconds or 1.0))

    def drawn(title: str, note: str, x: Axis, of: AxisOf, curve: Callable[[Told], Sequence[Point]]) -> str:
        label = f"{title} of {', '.join(run.name for run in runs)}"
        series = [_series(i, run, curve(run)) for i, run in enumerate(runs)]
        y, edge = of([y for one in series for _, y in one.points])
        return figure(title, chart(label, x, y, series), f"{note} {edge}".strip())

    def of_steps(_: Sequence[float]) -> tuple[Axis, str]:
        # One leap is as many values of a smoothed curve as it is wide: few steps would look like many.
        return loss_axis([loss for run in runs for loss in run.history.columns["loss"]])

    def memory_axis(_: Sequence[float]) -> tuple[Axis, str]:
        return Axis(of_memory, covers=(0.0,)), ""

    made = [
        drawn("Loss over steps", "Smoothed.", along, of_steps, lambda run: run.smoothed("loss")),
        drawn("Loss over time", WITH_ALL, by_time, of_steps, lambda run: _over_time(run, seconds)),
        drawn("Speed", "Smoothed.", along, partial(speed_axis, runs), Told.smoothed_speed),
        drawn("Memory", "Peak of each step.", along, memory_axis, lambda run: _memory(run, in_bytes)),
    ]
    if any(run.history.validations for run in runs):
        made.insert(2, drawn("Held-out loss", "Of each evaluation.", along, loss_axis, Told.validation))
    return Section("Curves", figures(made))


WITH_ALL = "Smoothed; evaluations and checkpoints count."


def _over_time(run: Told, unit: float) -> list[Point]:
    return [(at / unit, y) for at, (_, y) in zip(run.course.seconds, run.smoothed("loss"), strict=True)]


def _memory(run: Told, unit: float) -> list[Point]:
    return scaled(run.curve("peak_memory_bytes"), unit)


def _series(place: int, run: Told, curve: Sequence[Point]) -> Series:
    """Return a run's curve in the look of its place; marks stand where there is room between them."""
    look, shape = LOOKS[place]
    if len(curve) < MANY:
        return Series(run.name, curve, look, shape)
    return Series(run.name, curve, look, shape, marks=MARKS) if place >= PLAIN else Series(run.name, curve, look)


def differences_section(runs: Sequence[Told]) -> Section:
    """Return the settings that are not the same in all runs."""
    settings = [{name: value for name, value, _ in run.history.settings()} for run in runs]
    names = dict.fromkeys(name for values in settings for name in values if name != "output_dir")
    rows = [
        (name, *(values.get(name, "-") for values in settings))
        for name in names
        if len({values.get(name, "-") for values in settings}) > 1
    ]
    return Section("What was set otherwise", table(("setting", *(run.name for run in runs)), rows) if rows else "")
