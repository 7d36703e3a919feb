"""How one run went, as charts, each beside what its plan says. Pure but for what the run's history holds."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from autotune.bottleneck import Spent
from cli.render.run import waiting_line
from cli.render.units import count, duration, gib
from cli.report.charts import MANY, Axis, Point, Rule, Series, chart, number
from cli.report.measures import figure_of, loss, scaled, unit_of_bytes, unit_of_seconds
from cli.report.page import Section, figure, figures, nothing, paragraph
from cli.report.plan import limits, planned_peak
from cli.report.told import FEW, Told

SPREAD = 100
"""Largest over the middle one from which a chart has a logarithmic side."""
BEYOND = 4.0
"""A chart ends below a few values where the largest of them is so many times all others."""
ROOM = 1.25
"""A chart that ends below some has so much of the largest of the others."""
TROUBLE = {
    "spike": ("a leap", "triangle"),
    "skipped_step": ("skipped step", "cross"),
    "out_of_memory": ("memory ran out", "square"),
    "resumed": ("resumed", "ring"),
}
"""What is marked on the curve of the loss."""


def run_section(run: Told) -> Section:
    """Return what a page says of how a run went."""
    if run.losses is None:
        return Section("The run", nothing("No step was taken yet."))
    drawn = [
        _loss_chart(run),
        _speed_chart(run),
        _memory_chart(run),
        _time_chart(run),
        _norm_chart(run),
        _rate_chart(run),
    ]
    return Section("The run", _waits(run) + figures(drawn))


def _waits(run: Told) -> str:
    plan, spent = run.history.plan, Spent()
    names = ("seconds", "data_seconds", "tokens", "padded_tokens", "micro_batches")
    for values in zip(*(run.history.columns[name] for name in names), strict=True):
        if all(map(math.isfinite, values)) and min(values) >= 0 and values[0] and values[3]:
            spent.add(values[0], values[1], int(values[2]), int(values[3]), int(values[4]))
    said = waiting_line(spent, plan) if plan and spent.steps else ""
    return paragraph(f"{said[:1].upper()}{said[1:]}.") if said else ""


def step_axis(run: Told) -> Axis:
    """Return the steps of the whole run, those that are to come too."""
    return Axis("step", covers=(0.0, float(max(run.history.total_steps, run.history.steps, 1))))


def clipped(title: str, values: Iterable[float], highest: float, covers: tuple[float, ...] = ()) -> tuple[Axis, str]:
    """Return an axis that values far above the highest of the others do not press flat, and the sentence on them."""
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite or not 0 < BEYOND * highest < finite[-1]:
        return Axis(title, covers=covers), ""
    above = len(finite) - bisect_right(finite, ROOM * highest)
    said = f"{count(above, 'value')} above the chart, drawn on its edge: up to {number(finite[-1])}."
    return Axis(title, covers=covers, most=ROOM * highest), said


def speed_axis(runs: Sequence[Told], values: Iterable[float]) -> tuple[Axis, str]:
    """Return an axis for speeds on which what next to no time was spent at does not count."""
    usual = [run.usual_speed for run in runs if math.isfinite(run.usual_speed)]
    return clipped("tokens/s", values, max(usual, default=math.nan), covers=(0.0,))


def loss_axis(values: Iterable[float]) -> tuple[Axis, str]:
    """Return an axis that shows a loss when it leaps: without a few values far above, else by its logarithm."""
    finite = sorted(value for value in values if math.isfinite(value))
    # Of three values on: of two, either may be the one that is out of the common.
    highest = finite[min(len(finite) - 2, int((1 - FEW) * len(finite)))] if len(finite) > 2 else math.nan
    axis, said = clipped("loss", finite, highest)
    if not said and finite and finite[0] > 0 and finite[-1] > SPREAD * finite[len(finite) // 2]:
        return Axis("loss", log=True), "On a logarithmic scale."
    return axis, said


def _smoothed_note(run: Told) -> str:
    return f"Smoothed: the mean of {run.width} steps."


def _loss_chart(run: Told) -> str:
    smoothed = run.smoothed("loss")
    series = [
        Series("each step", run.curve("loss"), "c0 faint"),
        Series("smoothed", smoothed, "c0"),
        Series("held-out data", run.validation(), "c1 d1", "diamond" if len(run.validation()) < MANY else ""),
        *_marked(run, smoothed),
    ]
    axis, edge = loss_axis([*run.history.columns["loss"], *(y for _, y in run.validation())])
    first, last = run.losses or (math.nan, math.nan)
    label = f"Loss over {run.history.steps} steps, from {loss(first)} to {loss(last)}"
    return figure("Loss", chart(label, step_axis(run), axis, series), f"{_smoothed_note(run)} {edge}".strip())


def _marked(run: Told, curve: Sequence[Point]) -> list[Series]:
    """Return what went wrong, each where it happened on the curve."""
    steps, made = [x for x, _ in curve], []
    for kind, (name, shape) in TROUBLE.items():
        at = {one.step for one in run.course.happened if one.kind == kind}
        points = [(float(step), curve[max(0, bisect_right(steps, step) - 1)][1]) for step in sorted(at)]
        made.append(Series(name, points, "limit", shape, line=False))
    return made


def _rate_chart(run: Told) -> str:
    rates = run.curve("learning_rate")
    most = max((y for _, y in rates if math.isfinite(y)), default=0.0)
    label = f"Learning rate over steps, at most {most:g}"
    drawn = chart(label, step_axis(run), Axis("learning rate", covers=(0.0,)), [Series("learning rate", rates, "c0")])
    return figure("Learning rate", drawn)


def _norm_chart(run: Told) -> str:
    norms = run.curve("gradient_norm")
    finite = sorted(y for _, y in norms if math.isfinite(y) and y > 0)
    log = bool(finite) and finite[-1] > SPREAD * finite[len(finite) // 2]
    axis = Axis("gradient norm", log=log) if log else Axis("gradient norm", covers=(0.0,))
    series = [Series("each step", norms, "c0 faint"), Series("smoothed", run.smoothed("gradient_norm"), "c0")]
    drawn = chart("Norm of the gradient over steps, before it is clipped", step_axis(run), axis, series)
    return figure("Gradient norm", drawn, "Before it is clipped." + " On a logarithmic scale." * log)


def _speed_chart(run: Told) -> str:
    series = [
        Series("each step", run.curve("tokens_per_second"), "c0 faint"),
        Series("smoothed", run.smoothed_speed(), "c0"),
    ]
    axis, edge = speed_axis([run], (y for one in series for _, y in one.points))
    planned = run.planned_tokens_per_second
    rules = [Rule(f"the plan's forecast {planned:,.0f}", planned, "plan d4")] if planned else []
    label = f"Tokens a second over steps, {figure_of(run.tokens_per_second, ',.0f')} on the whole"
    drawn = chart(label, step_axis(run), axis, series, rules)
    note = f"Real tokens of steps alone, without padding. Smoothed over {run.width} steps. {edge}"
    return figure("Speed", drawn, note.strip())


def _memory_chart(run: Told) -> str:
    plan = run.history.plan
    held = run.curve("peak_memory_bytes")
    evaluated = run.validation("peak_memory_bytes")
    name, unit = unit_of_bytes(run.peak_bytes)
    few = len(evaluated) < MANY
    series = [
        Series("peak of each step", scaled(held, unit), "c0"),
        Series("of evaluations", scaled(evaluated, unit), "c1 d1", "diamond" if few else "", line=not few),
    ]
    rules = []
    if plan is not None:
        peak = planned_peak(plan)
        rules = [Rule(f"planned peak {peak / unit:,.2f} {name}", peak / unit, "plan d4"), limits(plan, unit, name)[0]]
    label = f"Peak memory of each step, at most {gib(round(run.peak_bytes) or None)}"
    drawn = chart(label, step_axis(run), Axis(name, covers=(0.0,)), series, rules)
    return figure("Memory", drawn, "The planned peak is that of the worst case: the longest rows there are.")


def _time_chart(run: Told) -> str:
    """Draw time over steps: the run's own, evaluations and checkpoints included, beside the forecast."""
    cast, steps = run.forecast, 0
    if cast is not None:
        steps = run.steps_in_all if run.was_extended else cast.total_steps
    planned = run.planned_seconds_of(steps) or 0.0
    longest = max(run.seconds, planned)
    name, unit = unit_of_seconds(longest)
    real = [(0.0, 0.0), *zip(run.history.columns["step"], run.course.seconds, strict=True)]
    series = [Series("this run", scaled(real, unit), "c0")]
    if cast is not None:
        of_steps = f" for {steps:,} of {run.steps_in_all:,} steps" if steps < run.steps_in_all else ""
        if run.was_extended:
            of_steps = f" at the pace of the plan, which is of {cast.asked_steps:,} steps"
        line = [(0.0, 0.0), (float(steps), planned / unit)]
        series.append(Series(f"forecast, {duration(planned)}{of_steps}", line, "plan d4"))
    label = f"Time over steps: {duration(run.seconds)}" + (f", forecast {duration(planned)}" if cast else "")
    drawn = chart(label, step_axis(run), Axis(name, covers=(0.0,)), series)
    return figure(
        "Time", drawn, "With evaluations, answers and checkpoints; without what lay between a stop and going on."
    )
