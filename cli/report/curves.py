"""How one run went, as charts, each beside what its plan says. Pure but for what the run's history holds."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from autotune.bottleneck import Spent
from cli.render.run import waiting_line
from cli.render.units import duration, gib
from cli.report.charts import MANY, Axis, Point, Rule, Series, chart
from cli.report.measures import loss, scaled, unit_of_bytes, unit_of_seconds
from cli.report.page import Section, figure, figures, nothing, paragraph
from cli.report.plan import limits, planned_peak
from cli.report.told import Told

SPREAD = 100
"""Largest over the middle one from which a chart has a logarithmic side."""
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
        if all(map(math.isfinite, values)) and values[3]:
            spent.add(values[0], values[1], int(values[2]), int(values[3]), int(values[4]))
    said = waiting_line(spent, plan) if plan and spent.steps else ""
    return paragraph(f"{said[:1].upper()}{said[1:]}.") if said else ""


def step_axis(run: Told) -> Axis:
    """Return the steps of the whole run, those that are to come too."""
    return Axis("step", covers=(0.0, float(max(run.history.total_steps, run.history.steps, 1))))


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
    first, last = run.losses or (math.nan, math.nan)
    label = f"Loss over {run.history.steps} steps, from {loss(first)} to {loss(last)}"
    return figure("Loss", chart(label, step_axis(run), Axis("loss"), series), _smoothed_note(run))


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
        Series("smoothed", run.smoothed("tokens_per_second"), "c0"),
    ]
    planned = run.planned_tokens_per_second
    rules = [Rule(f"the plan's forecast {planned:,.0f}", planned, "plan d4")] if planned else []
    label = f"Tokens a second over steps, {run.tokens_per_second:,.0f} on the whole"
    drawn = chart(label, step_axis(run), Axis("tokens/s", covers=(0.0,)), series, rules)
    return figure("Speed", drawn, "Real tokens, without padding; steps alone, without evaluation.")


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
    label = f"Peak memory of each step, at most {gib(round(run.peak_bytes))}"
    drawn = chart(label, step_axis(run), Axis(name, covers=(0.0,)), series, rules)
    return figure("Memory", drawn, "The planned peak is that of the worst case: the longest rows there are.")


def _time_chart(run: Told) -> str:
    """Draw time over steps: the run's own, evaluations and checkpoints included, beside the forecast."""
    cast = run.forecast
    longest = max(run.seconds, cast.total_seconds if cast else 0.0)
    name, unit = unit_of_seconds(longest)
    real = [(0.0, 0.0), *zip(run.history.columns["step"], run.course.seconds, strict=True)]
    series = [Series("this run", scaled(real, unit), "c0")]
    if cast is not None:
        planned = [(0.0, 0.0), (float(cast.total_steps), cast.total_seconds / unit)]
        series.append(Series(f"forecast, {duration(cast.total_seconds)}", planned, "plan d4"))
    label = f"Time over steps: {duration(run.seconds)}" + (
        f", forecast {duration(cast.total_seconds)} for all" if cast else ""
    )
    drawn = chart(label, step_axis(run), Axis(name, covers=(0.0,)), series)
    return figure(
        "Time", drawn, "With evaluations, answers and checkpoints; without what lay between a stop and going on."
    )
