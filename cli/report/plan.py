"""A plan as part of a page: what would run and why, its memory item by item, its sizes. Pure."""

from __future__ import annotations

from operator import attrgetter

from rich.text import Text

from autotune.plan import Plan, SizeRow
from autotune.speed import rows_per_second
from cli.render.explain import trials_in_force
from cli.render.plan import KINDS, plan_rows
from cli.render.sentences import batch_line
from cli.render.units import duration, gib, size
from cli.report.bars import Bar, Bars, bars
from cli.report.charts import Axis, Point, Rule, Series, chart
from cli.report.measures import percent, scaled, unit_of_bytes
from cli.report.page import Section, beside, details, figure, figures, pairs, paragraph, table

ROWS = "rows in a micro-batch"


def plan_title(plan: Plan) -> str:
    """Return what a page about a plan is called."""
    return f"Plan: {plan.workload.model} on {plan.hardware.device_name}"


def plan_lead(plan: Plan) -> list[str]:
    """Say in sentences what would run, and what it would take."""
    line = batch_line(plan)
    said = [f"{line[:1].upper()}{line[1:]}."]
    if plan.forecast is not None:
        said.append(
            f"It would take {plan.forecast.total_steps:,} steps, about {duration(plan.forecast.total_seconds)}."
        )
    return said


def plan_facts(plan: Plan) -> list[tuple[str, str]]:
    """Return the figures that sum a plan up."""
    facts = [
        ("Rows in a micro-batch", f"{plan.batching.micro_batch_size:,}"),
        ("Effective batch", f"{plan.batching.effective_batch_size:,}"),
        ("Peak memory", gib(planned_peak(plan))),
        ("Budget", gib(plan.memory.budget_bytes)),
    ]
    if plan.speed is not None:
        facts.append(("At full length", f"{plan.speed.tokens_per_second:,.0f} tokens/s"))
    if plan.forecast is not None:
        facts.append(("Time", duration(plan.forecast.total_seconds)))
    return facts


def planned_peak(plan: Plan) -> int:
    """Return the bytes that the plan says are held at most."""
    return plan.memory.measured_peak_bytes or plan.memory.predicted_peak_bytes or 0


def plan_section(plan: Plan) -> Section:
    """Return what a page says of a plan."""
    drawn = [beside(_against_budget(plan), _account(plan)), beside(_peaks(plan), _speeds(plan))]
    tables = details("All sizes, and what was measured", _sizes(plan) + _trials(plan) + _phases(plan))
    told = pairs(plan_rows(plan, None, None)) + paragraph(_rests_on(plan))
    return Section("The plan", told + figures(drawn) + tables)


def _rests_on(plan: Plan) -> str:
    return Text.from_markup(KINDS[plan.evidence.kind]).plain


def _stacked(plan: Plan, unit: float) -> list[Bar]:
    """Return what the peak is made of, each item from where the one before ended."""
    items = sorted(plan.memory.items.items(), key=lambda item: -item[1])
    total, start, made = sum(held for _, held in items) or 1, 0.0, []
    for i, (item, held) in enumerate(items):
        look = "c0" if i % 2 == 0 else "c0 second"
        said = f"{size(held)}, {percent(held / total)}"
        made.append(Bar(item.replace("_", " "), start, start + held / unit, said, look))
        start += held / unit
    return made


def limits(plan: Plan, unit: float, name: str) -> list[Rule]:
    """Return what a peak is held against: budget, limit, and all that the device has."""
    memory, whole = plan.memory, plan.hardware.device_memory_total_bytes
    what = "card" if plan.hardware.device == "cuda" else "all memory"
    rules = [
        Rule(f"budget {memory.budget_bytes / unit:,.2f} {name}", memory.budget_bytes / unit, "limit d1"),
        Rule(
            f"limit {memory.limit_bytes / unit:,.2f} {name} ({memory.limit_from})", memory.limit_bytes / unit, "c5 d4"
        ),
    ]
    if whole > memory.limit_bytes:
        rules.append(Rule(f"{what} {whole / unit:,.2f} {name}", whole / unit, "c5"))
    return rules


def _against_budget(plan: Plan) -> str:
    name, unit = unit_of_bytes(plan.memory.limit_bytes)
    stacked, peak = _stacked(plan, unit), planned_peak(plan)
    if not stacked:
        return ""
    label = f"Peak of {gib(peak)}, stacked by item, against a budget of {gib(plan.memory.budget_bytes)}"
    note = f"The peak takes {percent(peak / plan.memory.budget_bytes)} of the budget."
    made = Bars(name, stacked, limits(plan, unit, name), in_one_row=True)
    return figure("Memory against the budget", bars(label, made), note)


def _account(plan: Plan) -> str:
    name, unit = unit_of_bytes(planned_peak(plan))
    stacked = _stacked(plan, unit)
    if not stacked:
        return ""
    label = "What the peak is made of: " + ", ".join(f"{bar.name} {bar.said}" for bar in stacked)
    note = "Each bar begins where the one above it ends: together they are the peak."
    return figure("What the peak is made of", bars(label, Bars(name, stacked)), note)


def _peaks(plan: Plan) -> str:
    """Draw the peak over the micro-batch: measured, predicted, and what the trace alone had said."""
    name, unit = unit_of_bytes(max(row.peak_bytes for row in plan.sizes) if plan.sizes else 0)
    chosen = plan.batching.micro_batch_size
    trials = sorted(trials_in_force(plan), key=attrgetter("micro_batch_size"))
    died = [
        (float(t.micro_batch_size), float(t.predicted_peak_bytes or plan.memory.limit_bytes))
        for t in trials
        if not t.completed
    ]
    traced = [(float(t.micro_batch_size), float(t.predicted_peak_bytes)) for t in trials if t.predicted_peak_bytes]
    series = [
        *_by_kind(plan, [(row, float(row.peak_bytes), row.peak_measured) for row in plan.sizes], unit),
        Series("the trace alone had said", scaled(traced, unit), "c2", "triangle", line=False),
        Series("tried, did not fit", scaled(died, unit), "limit", "cross", line=False),
    ]
    rules = limits(plan, unit, name)[:1]
    label = f"Peak memory over {ROWS}; chosen: {chosen} with {gib(planned_peak(plan))}"
    note = f"At full length. Chosen: {chosen}; the largest safe one is {plan.batching.largest_safe_micro_batch_size}."
    return figure(
        "Peak memory by micro-batch", chart(label, _size_axis(plan), Axis(name, covers=(0.0,)), series, rules), note
    )


def _speeds(plan: Plan) -> str:
    known = [(row, row.samples_per_second, row.speed_measured) for row in plan.sizes if row.samples_per_second]
    if len(known) < 2:  # of one size there is nothing to see
        return ""
    label = f"Samples a second over {ROWS}; chosen: {plan.batching.micro_batch_size}"
    axis = Axis("samples/s", covers=(0.0,))
    drawn = chart(label, _size_axis(plan), axis, _by_kind(plan, known, 1.0))
    return figure("Speed by micro-batch", drawn, "Of this data where it was known, else of rows at full length.")


def _size_axis(plan: Plan) -> Axis:
    """Return the sizes along the lower side."""
    chosen = float(plan.batching.micro_batch_size)
    sizes = sorted({float(row.micro_batch_size) for row in plan.sizes} | {chosen})
    return Axis(ROWS, log=True, at=tuple(sizes))


def _by_kind(plan: Plan, sizes: list[tuple[SizeRow, float, bool]], unit: float) -> list[Series]:
    """Return a thin line through all sizes, and on it the measured, the predicted and the chosen."""
    chosen = plan.batching.micro_batch_size

    def points(wanted: list[tuple[SizeRow, float, bool]]) -> list[Point]:
        return [(float(row.micro_batch_size), value / unit) for row, value, _ in wanted]

    sizes = sorted(sizes, key=lambda one: one[0].micro_batch_size)
    line = [Series("", points(sizes), "plan d2")] if len(sizes) > 1 else []
    is_measured = all(measured for row, _, measured in sizes if row.micro_batch_size == chosen)
    return [
        *line,
        Series(
            "measured",
            points([one for one in sizes if one[2] and one[0].micro_batch_size != chosen]),
            "c0",
            "circle",
            line=False,
        ),
        Series(
            "predicted",
            points([one for one in sizes if not one[2] and one[0].micro_batch_size != chosen]),
            "c0",
            "ring",
            line=False,
        ),
        Series(
            "chosen, measured" if is_measured else "chosen, predicted",
            points([one for one in sizes if one[0].micro_batch_size == chosen]),
            "c1",
            "diamond",
            line=False,
        ),
    ]


def _sizes(plan: Plan) -> str:
    rows = [
        (
            f"{row.micro_batch_size:,}" + " (chosen)" * (row.micro_batch_size == plan.batching.micro_batch_size),
            gib(row.peak_bytes) + ("" if row.peak_measured else ", predicted"),
            percent(row.peak_bytes / plan.memory.budget_bytes),
            f"{row.samples_per_second:,.1f}" + ("" if row.speed_measured else ", predicted")
            if row.samples_per_second
            else "-",
        )
        for row in plan.sizes
    ]
    return table(("rows", "peak", "of budget", "samples/s"), rows, "numbers")


def _trials(plan: Plan) -> str:
    trials = sorted(trials_in_force(plan), key=attrgetter("micro_batch_size"))
    rows = [
        (
            f"{t.micro_batch_size:,}",
            f"{len(t.timings)}",
            t.outcome.replace("_", " "),
            gib(t.peak_bytes),
            gib(t.predicted_peak_bytes),
            f"{rows_per_second(t):,.1f}" if rows_per_second(t) else "-",
        )
        for t in trials
    ]
    head = ("rows tried", "dry steps", "outcome", "peak", "by the trace", "rows/s")
    return table(head, rows, "numbers") if rows else ""


def _phases(plan: Plan) -> str:
    rows = [(name.replace("_", " "), size(held)) for name, held in plan.memory.phases.items()]
    return table(("phase", "peak"), rows, "numbers") if rows else ""
