"""What each lever does: the same plan with one thing changed, by the trace. Pure but for the trace it is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from autotune.errands import DataSummary, Recipe, TraceReport
from autotune.errors import NothingFitsError
from autotune.estimate import estimate
from autotune.explore import TraceSizes
from autotune.forecast import roofline_speed
from autotune.plan import Hardware, Plan, Rates, Request, Traced, Workload

FLOPS_PER_BYTE = 10.0
"""Of a processor, between what it multiplies and what it moves: 5 (fp32) to 20 (bf16) on those at hand."""


class Scene(NamedTuple):
    """All that a plan is made from."""

    workload: Workload
    hardware: Hardware
    request: Request
    recipe: Recipe
    data: DataSummary | None


class Varied(NamedTuple):
    """One row of a table: what was changed, and what becomes of the plan."""

    change: str
    plan: Plan | None
    """None where it does not fit."""
    refusal: str
    """Why not, with the numbers."""


def vary(
    scenes: Mapping[str, Scene],
    validation: DataSummary | None,
    rates_of: Callable[[Workload], Rates | None],
    trace: TraceSizes,
) -> list[Varied]:
    """Estimate each scene, with its name for the change; one worker traces what they all need."""
    once = _traced_once(trace, [scene.workload for scene in scenes.values()])
    return [_estimated(change, scene, validation, rates_of(scene.workload), once) for change, scene in scenes.items()]


def _estimated(
    change: str, scene: Scene, validation: DataSummary | None, rates: Rates | None, trace: TraceSizes
) -> Varied:
    workload, hardware, request, recipe, data = scene
    try:
        plan = estimate(workload, hardware, request, recipe, data, validation, rates, trace)
    except NothingFitsError as error:
        return Varied(change, None, error.message)
    return Varied(change, plan, "")


def _traced_once(trace: TraceSizes, workloads: Sequence[Workload]) -> TraceSizes:
    """Return a trace that asks one worker for all of these workloads as soon as it is asked for any.

    Two sizes each: memory is a maximum of affine pieces, so that a line between two of them errs to the safe side.
    """
    known: dict[tuple[Workload, tuple[int, ...]], TraceReport] = {}

    def lookup(asked: Sequence[Workload], hardware: Hardware, sizes: tuple[int, ...]) -> list[TraceReport]:
        ends = (sizes[0], sizes[-1])
        missing = [workload for workload in asked if (workload, sizes) not in known]
        if missing:
            everything = list(dict.fromkeys([*missing, *workloads])) if missing[0] in workloads else missing
            reports = trace(everything, hardware, tuple(dict.fromkeys(ends)))
            known.update({(w, sizes): report for w, report in zip(everything, reports, strict=False)})
        return [known[workload, sizes] for workload in asked if (workload, sizes) in known]

    return lookup


def measured_rates(plan: Plan, traced: Sequence[Traced]) -> Rates | None:
    """Return the rates at which the traced work takes as long as was measured; None where nothing was."""
    if plan.speed is None or not traced:
        return None
    unit = Rates(flops=FLOPS_PER_BYTE, bytes=1.0)
    at_unit = roofline_speed(traced, unit, plan.workload, plan.batching)
    micro_batches = plan.speed.seconds_per_step - plan.speed.update_seconds
    faster = (at_unit.seconds_per_step - at_unit.update_seconds) / micro_batches
    return Rates(flops=faster * FLOPS_PER_BYTE, bytes=faster)


def with_rows(data: DataSummary, rows: int) -> DataSummary:
    """Return data of the same mix of lengths with so many rows."""
    times = rows / data.rows
    lengths = tuple(tuple((length, round(times * count)) for length, count in side) for side in data.lengths)
    return data.model_copy(update={"rows": rows, "samples": max(1, round(times * data.samples)), "lengths": lengths})


def with_length(data: DataSummary, longest: int, target: int) -> DataSummary:
    """Return the data with its samples cut at these limits, those of the source and of the target."""
    sides = []
    for side, limit in zip(data.lengths, (longest, target), strict=False):
        short = [(length, count) for length, count in side if length < limit]
        cut = sum(count for length, count in side if length >= limit)
        sides.append((*short, (limit, cut)) if cut else tuple(short))
    return data.model_copy(update={"lengths": tuple(sides)})
