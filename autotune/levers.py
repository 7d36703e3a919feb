"""What each lever does: the same plan with one thing changed, by the trace. Pure but for the trace it is handed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from autotune.errands import DataSummary, TraceReport
from autotune.errors import NothingFitsError
from autotune.estimate import estimate
from autotune.evidence import traced_work
from autotune.explore import TraceSizes
from autotune.inputs import PlanInputs
from autotune.plan import Hardware, Plan, Rates, Traced, Workload
from autotune.shapes import Histogram

FLOPS_PER_BYTE = 10.0
"""Of a processor, between what it multiplies and what it moves: 5 (fp32) to 20 (bf16) on those at hand."""


class Varied(NamedTuple):
    """One row of a table: what was changed, and what becomes of the plan."""

    change: str
    plan: Plan | None
    """None where it does not fit."""
    refusal: str
    """Why not, with the numbers."""


def vary(
    scenes: Mapping[str, PlanInputs], rates_of: Callable[[Workload], Rates | None], trace: TraceSizes
) -> list[Varied]:
    """Estimate each scene, with its name for the change; one worker traces what they all need."""
    once = _traced_once(trace, [scene.workload for scene in scenes.values()])
    return [_estimated(change, scene, rates_of(scene.workload), once) for change, scene in scenes.items()]


def _estimated(change: str, scene: PlanInputs, rates: Rates | None, trace: TraceSizes) -> Varied:
    try:
        return Varied(change, estimate(scene, rates, trace, advising=False), "")
    except NothingFitsError as error:
        return Varied(change, None, error.message)


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
    """Return the rates at which the plan's traced work takes as long as was measured; None where nothing was."""
    if plan.speed is None or not traced:
        return None
    rows, speed = plan.batching.micro_batch_size, plan.speed
    work = traced_work(traced, rows)
    at_unit = work.flops / FLOPS_PER_BYTE + work.moved_bytes
    working = speed.beta_seconds_per_token * rows * plan.workload.tokens_per_row
    if working <= 0:
        return None
    return Rates(
        flops=FLOPS_PER_BYTE * at_unit / working,
        bytes=at_unit / working,
        operator_seconds=speed.alpha_seconds / max(1, work.operators),
        overlaps=False,
    )


def with_rows(data: DataSummary, rows: int) -> DataSummary:
    """Return data of the same mix of lengths with so many rows: of histograms, only shares are used."""
    return data.model_copy(update={"rows": rows, "samples": max(1, round(rows * data.samples / data.rows))})


def with_length(data: DataSummary, source: int, target: int) -> DataSummary:
    """Return the data with its samples cut at these limits; documents are split, and become more samples."""
    sides = tuple(
        _split(side, limit) if data.stage == "pretrain" else _cut(side, limit)
        for side, limit in zip(data.lengths, (source, target), strict=False)
    )
    samples = sum(count for _, count in sides[0]) if data.stage == "pretrain" else data.samples
    return data.model_copy(update={"lengths": sides, "samples": samples})


def _cut(side: Histogram, limit: int) -> tuple[tuple[int, int], ...]:
    cut: Counter[int] = Counter()
    for length, count in side:
        cut[min(length, limit)] += count
    return tuple(sorted(cut.items()))


def _split(side: Histogram, limit: int) -> tuple[tuple[int, int], ...]:
    pieces: Counter[int] = Counter()
    for length, count in side:
        whole, rest = divmod(length, limit)
        pieces[limit] += whole * count
        pieces[rest] += count
    return tuple(sorted((length, count) for length, count in pieces.items() if length and count))
