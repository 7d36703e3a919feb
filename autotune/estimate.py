"""Plans without the machine: by the trace and a card's rates alone. Nothing is run but the trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from autotune.account import GIB, estimated_account, process_bytes
from autotune.alternatives import advise, checkpointed, estimated_largest, estimated_peak, size_rows, what_would_fit
from autotune.batching import reach
from autotune.errands import TraceReport
from autotune.errors import ConfigurationError, NothingFitsError
from autotune.evidence import MemoryModel, fit
from autotune.explore import TraceSizes
from autotune.forecast import forecast_run
from autotune.inputs import PlanInputs
from autotune.plan import SCHEMA, Alternative, Batching, EvidenceSummary, Plan, Rates, Speed, Workload
from autotune.search import sizes_to_trace
from autotune.shapes import expect
from autotune.speed import roofline_speed

ERROR = 0.15
"""By which an estimated peak may be wrong, for people: the published runs it was held against lie within."""
NOTHING_TRIED = EvidenceSummary(
    kind="estimated", dry_steps=0, timing_steps=0, trials=(), out_of_memory_count=0, seconds=0.0
)


def estimate(inputs: PlanInputs, rates: Rates | None, trace: TraceSizes, *, advising: bool = True) -> Plan:
    """Plan for hardware that need not be here; without `rates` it says nothing of time.

    Raises NothingFitsError, when `advising` with the changes that would fit.
    """
    ways = _look_at(inputs.workload, inputs, rates, trace)
    if not ways:
        raise ConfigurationError(
            f"the model {inputs.workload.model} cannot be traced, so nothing is known of a card that is not here",
            "plan on a machine that has the card",
        )
    fits_at_once = ways[0].fits and ways[0].batching.gradient_accumulation_steps == 1
    if inputs.request.checkpointing == "auto" and not fits_at_once:
        ways += _look_at(checkpointed(inputs.workload), inputs, rates, trace)
    fits = [way for way in ways if way.fits]
    if not fits:
        _refuse(ways[0], inputs, trace if advising else None)
    best = min(fits, key=lambda way: way.speed.seconds_per_step if way.speed else 0.0)
    return _write(best, ways, inputs, rates)


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


def _look_at(workload: Workload, inputs: PlanInputs, rates: Rates | None, trace: TraceSizes) -> list[_Way]:
    """Trace a workload, and say what its largest size would come to; empty where it cannot be traced."""
    hardware, given = inputs.hardware, inputs.request.micro_batch_size
    ways, budget_bytes = [], inputs.budget.budget_bytes
    for report in trace([workload], hardware, sizes_to_trace(max(inputs.sizes[-1], given or 1))):
        model = fit((), report.traced, process_bytes(report, hardware))
        assert model is not None
        largest = estimated_largest(model, budget_bytes, inputs.sizes, hardware) or 1
        rows = given or largest
        batching = inputs.reach(rows, max(rows, largest), "user" if given else inputs.limited_by(rows))
        batching = expect(batching, inputs.data, workload)
        speed = roofline_speed(report.traced, rates, workload, batching) if rates else None
        peak = estimated_peak(model, rows, hardware)
        ways.append(_Way(workload, report, model, batching, peak, peak <= budget_bytes, speed))
    return ways


def _write(best: _Way, ways: list[_Way], inputs: PlanInputs, rates: Rates | None) -> Plan:
    hardware, rows = inputs.hardware, best.batching.micro_batch_size
    forecast = None
    if best.speed:
        forecast = forecast_run(inputs.course, best.workload, best.batching, best.speed, None, None, measured=False)
    return Plan(
        schema_name=SCHEMA,
        workload=best.workload,
        hardware=hardware,
        batching=best.batching,
        memory=estimated_account(inputs.budget, hardware, best.report, rows, best.peak_bytes),
        speed=best.speed,
        forecast=forecast,
        alternatives=tuple(way.alternative for way in ways) if len(ways) > 1 else (),
        sizes=size_rows(
            lambda size: estimated_peak(best.model, size, hardware),
            best.batching.largest_safe_micro_batch_size,
            rows,
            inputs.sizes,
            {},
            lambda size: _seconds_per_sample(best, rates, size),
        ),
        evidence=NOTHING_TRIED,
    )


def _seconds_per_sample(way: _Way, rates: Rates | None, rows: int) -> tuple[float, bool] | None:
    if rates is None:
        return None
    ranks = way.batching.world_size
    speed = roofline_speed(way.report.traced, rates, way.workload, reach(rows * ranks, ranks, rows, rows, "user"))
    return speed.seconds_per_step / (rows * ranks), False


def _refuse(way: _Way, inputs: PlanInputs, trace: TraceSizes | None) -> NoReturn:
    rows, workload, budget = way.batching.micro_batch_size, way.workload, inputs.budget
    changes = what_would_fit(trace, workload, inputs.hardware, budget.budget_bytes, inputs.sizes) if trace else None
    raise NothingFitsError(
        f"{rows} rows of {workload.tokens_per_row} tokens would take {way.peak_bytes / GIB:.2f} GiB by the trace; "
        f"{budget}",
        "" if changes is None else advise(changes),
    )
