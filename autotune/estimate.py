"""Plans without the machine: by the trace and a card's rates alone. Nothing is run but the trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from autotune.account import GIB, Budget, estimated_account, process_bytes, set_budget
from autotune.alternatives import advise, checkpointed, estimated_largest, estimated_peak, size_rows, what_would_fit
from autotune.batching import largest_share, reach, useful_sizes
from autotune.errands import DataSummary, Recipe, TraceReport
from autotune.errors import ConfigurationError, NothingFitsError
from autotune.evidence import MemoryModel, fit
from autotune.explore import TraceSizes
from autotune.forecast import forecast_run, roofline_speed
from autotune.plan import (
    SCHEMA,
    Alternative,
    Batching,
    EvidenceSummary,
    Hardware,
    LimitedBy,
    Plan,
    Rates,
    Request,
    Speed,
    Workload,
)
from autotune.search import sizes_to_trace

ERROR = 0.15
"""By which an estimated peak may be wrong, for people: the published runs it was held against lie within."""


def estimate(
    workload: Workload,
    hardware: Hardware,
    request: Request,
    recipe: Recipe,
    data: DataSummary | None,
    validation: DataSummary | None,
    rates: Rates | None,
    trace: TraceSizes,
    *,
    advising: bool = True,
) -> Plan:
    """Plan for hardware that need not be here; without `rates` it says nothing of time.

    Raises NothingFitsError, when `advising` with the changes that would fit.
    """
    budget = set_budget(hardware, request.memory_limit_bytes, request.headroom)
    samples = min(request.effective_batch_size, data.samples) if data else request.effective_batch_size
    sizes = useful_sizes(largest_share(samples, hardware.world_size))
    to_trace = sizes_to_trace(max(sizes[-1], request.micro_batch_size or 1))

    def look_at(work: Workload) -> list[_Way]:
        reports = trace([work], hardware, to_trace)
        return [_Way.of(work, report, hardware, budget, request, samples, sizes, rates) for report in reports]

    ways = look_at(workload)
    if not ways:
        raise ConfigurationError(
            f"the model {workload.model} cannot be traced, so nothing is known of a card that is not here",
            "plan on a machine that has the card",
        )
    fits_at_once = ways[0].fits and ways[0].batching.gradient_accumulation_steps == 1
    if request.checkpointing == "auto" and not fits_at_once:
        ways += look_at(checkpointed(workload))
    fits = [way for way in ways if way.fits]
    if not fits:
        _refuse(ways[0], hardware, budget, sizes, trace if advising else None)
    best = min(fits, key=lambda way: way.speed.seconds_per_step if way.speed else 0.0)
    return Plan(
        schema_name=SCHEMA,
        workload=best.workload,
        hardware=hardware,
        batching=best.batching,
        memory=estimated_account(budget, hardware, best.report, best.batching.micro_batch_size, best.peak_bytes),
        speed=best.speed,
        forecast=forecast_run(recipe, data, validation, best.workload, best.batching, best.speed, None)
        if data and best.speed
        else None,
        alternatives=tuple(way.alternative for way in ways) if len(ways) > 1 else (),
        sizes=size_rows(
            lambda rows: estimated_peak(best.model, rows, hardware),
            best.batching.largest_safe_micro_batch_size,
            best.batching.micro_batch_size,
            sizes,
            {},
            lambda rows: _seconds_per_sample(best, rates, rows),
        ),
        evidence=NOTHING_TRIED,
    )


NOTHING_TRIED = EvidenceSummary(
    kind="estimated", dry_steps=0, timing_steps=0, trials=(), out_of_memory_count=0, seconds=0.0
)


@dataclass(frozen=True)
class _Way:
    """A way to take the step, with what it would come to."""

    workload: Workload
    report: TraceReport
    model: MemoryModel
    batching: Batching
    peak_bytes: int
    fits: bool
    speed: Speed | None

    @classmethod
    def of(
        cls,
        workload: Workload,
        report: TraceReport,
        hardware: Hardware,
        budget: Budget,
        request: Request,
        samples: int,
        sizes: Sequence[int],
        rates: Rates | None,
    ) -> _Way:
        model = fit((), report.traced, process_bytes(report, hardware))
        assert model is not None
        largest = estimated_largest(model, budget.budget_bytes, sizes, hardware) or 1
        rows = request.micro_batch_size or largest
        limited_by: LimitedBy = "memory"
        if request.micro_batch_size:
            limited_by = "user"
        elif rows == sizes[-1]:
            limited_by = "effective_batch" if samples == request.effective_batch_size else "data"
        batching = reach(samples, hardware.world_size, rows, max(rows, largest), limited_by)
        speed = roofline_speed(report.traced, rates, workload, batching) if rates else None
        peak = estimated_peak(model, rows, hardware)
        return cls(workload, report, model, batching, peak, peak <= budget.budget_bytes, speed)

    @property
    def alternative(self) -> Alternative:
        return Alternative(
            change=f"--gradient-checkpointing {self.workload.gradient_checkpointing}",
            largest_micro_batch_size=self.batching.micro_batch_size if self.fits else 0,
            gradient_accumulation_steps=self.batching.gradient_accumulation_steps,
            peak_bytes=self.peak_bytes,
            seconds_per_step=self.speed.seconds_per_step if self.speed else None,
            measured=False,
        )


def _seconds_per_sample(way: _Way, rates: Rates | None, rows: int) -> tuple[float, bool] | None:
    if rates is None:
        return None
    ranks = way.batching.world_size
    speed = roofline_speed(way.report.traced, rates, way.workload, reach(rows * ranks, ranks, rows, rows, "user"))
    return speed.seconds_per_step / (rows * ranks), False


def _refuse(way: _Way, hardware: Hardware, budget: Budget, sizes: Sequence[int], trace: TraceSizes | None) -> NoReturn:
    rows, workload = way.batching.micro_batch_size, way.workload
    raise NothingFitsError(
        f"{rows} rows of {workload.tokens_per_row} tokens would take {way.peak_bytes / GIB:.2f} GiB by the trace; "
        f"{budget}",
        advise(what_would_fit(trace, workload, hardware, budget.budget_bytes, sizes)) if trace else "",
    )
