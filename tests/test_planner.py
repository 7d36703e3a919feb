"""The planner: the promises of a plan, on machines that are curves, and replayed from evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import facts
import pytest
from tiny_models import workload

from autotune.batching import balanced_cuts
from autotune.errands import DataSummary, Excerpt, TraceReport
from autotune.errors import ConfigurationError, NothingFitsError
from autotune.evidence import Evidence
from autotune.measure import TIME_LIMIT_SECONDS
from autotune.plan import Hardware, Plan, Timed, Timing, Trial, Workload
from autotune.planner import AMPLE, Budget, Planner, Request, check_room

MIB = 2**20
GIB = 2**30
CARD = facts.hardware(
    world_size=1,
    device_memory_free_bytes=7 * GIB,
    device_memory_total_bytes=8 * GIB,
    host_memory_total_bytes=16 * GIB,
    host_memory_available_bytes=12 * GIB,
)
PROCESSOR = CARD.model_copy(update={"device": "cpu", "device_name": "a processor"})


class Machine:
    """Memory that is affine in rows, and seconds too; counts what was tried of it."""

    def __init__(self, fixed: int, per_row: int, seconds_per_row: Callable[[int], float] = lambda rows: 0.01) -> None:
        self.fixed, self.per_row, self.seconds_per_row = fixed, per_row, seconds_per_row
        self.host_bytes = GIB
        self.tried: list[tuple[str, int]] = []
        self.time_limits: list[float | None] = []

    def measure(
        self,
        work: Workload,
        hardware: Hardware,
        rows: int,
        limit: int,
        predicted: int | None,
        seconds: float | None,
        excerpt: Excerpt | None,
    ) -> Trial:
        self.tried.append((work.cpu_allocator, rows))
        self.time_limits.append(seconds)
        peak = round((self.fixed + self.grown(work, rows)) * (1.3 if work.cpu_allocator == "fast" else 1.0))
        fits = peak <= limit
        tokens, took = rows * work.tokens_per_row, rows * self.seconds_per_row(rows)
        return Trial(
            micro_batch_size=rows,
            cpu_allocator=work.cpu_allocator,
            outcome="completed" if fits else "out_of_memory",
            peak_bytes=peak if fits else None,
            predicted_peak_bytes=predicted,
            phases={"forward_backward": peak, "optimizer": self.fixed} if fits else {},
            resident_bytes=self.fixed if fits else None,
            host_peak_bytes=self.host_bytes if fits else None,
            timings=tuple(
                Timing(padded_tokens=round(tokens * s), seconds=took * s, update_seconds=0)
                for s in (1, 0.5, 0.75, 1, 1)
            ),
            timed=tuple(
                Timed(rows=size, samples=rows, seconds=(rows * self.seconds_per_row(size),) * 3)
                for size in (excerpt.sizes if excerpt else ())
            ),
            evaluation_seconds=took / 4,
            seconds=1.0,
            message="" if fits else "no more",
        )

    def grown(self, work: Workload, rows: int) -> float:
        checkpointed = 0.25 if work.gradient_checkpointing == "on" else 1.0
        return self.per_row * rows * checkpointed * work.max_seq_len / 32

    def trace(self, work: Workload, hardware: Hardware, sizes: tuple[int, ...]) -> TraceReport | None:
        """Half of what is fixed are tensors, the rest the process and what no trace tells."""
        peaks = {rows: round(self.fixed / 2 + self.grown(work, rows)) for rows in sizes}
        sizes_traced = (
            facts.traced(rows, {"forward_backward": peak, "optimizer": self.fixed // 2}) for rows, peak in peaks.items()
        )
        return TraceReport(process_bytes=self.fixed // 3, traced=tuple(sizes_traced))


def plan_on(machine: Machine, hardware: Hardware = CARD, **changes: Any) -> Plan:
    plan = planned(machine, hardware, **changes).plan
    assert plan is not None
    return plan


def planned(machine: Machine, hardware: Hardware = CARD, **changes: Any) -> Planner:
    planner = planner_on(machine, hardware, **changes)
    list(planner.make())
    return planner


def planner_on(machine: Machine, hardware: Hardware = CARD, **changes: Any) -> Planner:
    values: dict[str, Any] = {
        "effective_batch_size": 240,
        "micro_batch_size": None,
        "prefer": "auto",
        "memory_limit_bytes": None,
        "headroom": None,
        "data": None,
        "work": workload("llama", cpu_allocator="fast" if hardware.device == "cpu" else "tight"),
    }
    values |= changes
    data, validation, work = values.pop("data"), values.pop("validation", None), values.pop("work")
    return Planner(
        work, hardware, Request(**values), facts.recipe(epochs=2), data, validation, machine.measure, machine.trace
    )


def data_of(samples: int) -> DataSummary:
    return DataSummary(
        files=("a.parquet",),
        store="store",
        fingerprint="data",
        stage="sft",
        rows=samples,
        samples=samples,
        tokens=samples * 20,
        target_tokens=samples * 10,
        lengths=(((16, samples // 2), (24, samples - samples // 2)),),
        cuts={},
        unknown_share=0,
    )


def test_a_plan_within_memory_balances_below_the_largest_safe_size() -> None:
    plan = plan_on(Machine(GIB, 240 * MIB), effective_batch_size=240)  # budget 6.65 GiB: 24 rows
    assert plan.batching.largest_safe_micro_batch_size == pytest.approx(24, abs=2)
    assert plan.batching.limited_by == "memory"
    assert plan.batching.gradient_accumulation_steps * plan.batching.micro_batch_size >= 240
    assert plan.batching.micro_batch_size in {t.micro_batch_size for t in plan.evidence.trials}
    assert plan.memory.measured_peak_bytes is not None
    assert plan.memory.measured_peak_bytes <= plan.memory.budget_bytes
    assert plan.evidence.out_of_memory_count == 0


@pytest.mark.parametrize("effective", [1, 7, 30, 31, 64, 97])
def test_the_effective_batch_is_exact_and_a_share_that_fits_is_not_exceeded(effective: int) -> None:
    plan = plan_on(Machine(GIB, MIB), effective_batch_size=effective)
    assert plan.batching.effective_batch_size == effective
    assert plan.batching.micro_batch_size == effective
    assert plan.batching.limited_by == "effective_batch"
    assert max(t.micro_batch_size for t in plan.evidence.trials) <= effective


def test_less_data_than_a_step_limits_the_batch() -> None:
    plan = plan_on(Machine(GIB, MIB), data=data_of(10), prefer="largest")
    assert (plan.batching.micro_batch_size, plan.batching.limited_by) == (10, "data")
    assert plan.forecast is not None
    assert (plan.forecast.steps_per_epoch, plan.forecast.total_steps) == (1, 2)


def test_more_memory_never_gives_a_smaller_batch() -> None:
    sizes = [
        plan_on(Machine(GIB, 100 * MIB), memory_limit_bytes=gib * GIB).batching.largest_safe_micro_batch_size
        for gib in (2, 3, 4, 5, 6)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_a_smaller_size_is_taken_only_where_it_is_faster_and_not_if_the_largest_is_preferred() -> None:
    def slow_when_large(rows: int) -> float:
        return 0.01 if rows < 20 else 0.02

    by_speed = plan_on(Machine(GIB, MIB, slow_when_large), effective_batch_size=64, data=data_of(1000))
    assert by_speed.batching.limited_by == "speed"
    assert by_speed.batching.micro_batch_size < 20
    assert by_speed.batching.micro_batch_size in {t.micro_batch_size for t in by_speed.evidence.trials}
    for changes in ({"prefer": "largest", "data": data_of(1000)}, {"data": None}):
        plan = plan_on(Machine(GIB, MIB, slow_when_large), effective_batch_size=64, **changes)
        assert plan.batching.micro_batch_size == 64


def test_a_size_the_user_fixed_is_measured_and_kept() -> None:
    machine = Machine(GIB, MIB)
    plan = plan_on(machine, micro_batch_size=7, effective_batch_size=30)
    assert machine.tried == [("tight", 7)]
    assert (plan.batching.micro_batch_size, plan.batching.limited_by) == (7, "user")
    assert plan.batching.gradient_accumulation_steps == 5


def test_a_fixed_size_within_the_limit_and_over_the_budget_is_refused_too() -> None:
    """It ran to the end, but on what the headroom keeps back."""
    with pytest.raises(NothingFitsError, match=r"batch of 6 rows .* needs 6\.86 GiB, the budget is 6\.65 GiB"):
        plan_on(Machine(GIB, GIB * 1000 // 1024), micro_batch_size=6)
    plan_on(Machine(GIB, GIB * 1000 // 1024), micro_batch_size=6, headroom=100 * MIB)


def test_a_search_has_a_time_limit_and_a_size_the_user_fixed_has_none() -> None:
    searched, fixed = Machine(GIB, MIB), Machine(GIB, MIB)
    plan_on(searched)
    plan_on(fixed, micro_batch_size=7)
    assert set(searched.time_limits) == {TIME_LIMIT_SECONDS}
    assert fixed.time_limits == [None]


def test_one_row_that_takes_too_long_is_not_told_as_lack_of_memory() -> None:
    class Slow(Machine):
        def measure(self, work: Workload, hardware: Hardware, rows: int, *rest: Any) -> Trial:
            return facts.out_of_memory(rows, outcome="timed_out", message="not done after 600 s")

    with pytest.raises(NothingFitsError, match="too slow for this machine: not done after 600 s"):
        plan_on(Slow(GIB, MIB))


def test_a_size_that_takes_too_long_is_not_tried_again_nor_taken_for_lack_of_memory() -> None:
    class Slow(Machine):
        def measure(self, work: Workload, hardware: Hardware, rows: int, *rest: Any) -> Trial:
            trial = super().measure(work, hardware, rows, *rest)
            if rows < 7:
                return trial
            return facts.out_of_memory(rows, outcome="timed_out", cpu_allocator=work.cpu_allocator)

    machine = Slow(GIB // 2, MIB)
    plan = plan_on(machine, PROCESSOR, prefer="largest")
    assert machine.tried == [("fast", 240), ("fast", 30), ("fast", 3)]
    assert plan.batching.micro_batch_size == 3


def test_items_are_never_negative_though_the_trace_be_too_high() -> None:
    class Exaggerated(Machine):
        def trace(self, *asked: Any) -> TraceReport:
            report = super().trace(*asked)
            assert report is not None
            traced = (
                facts.traced(t.micro_batch_size, {n: 9 * b // 8 for n, b in t.phases.items()}) for t in report.traced
            )
            return TraceReport(process_bytes=report.process_bytes, traced=tuple(traced))

    for hardware in (CARD, PROCESSOR):
        memory = plan_on(Exaggerated(GIB, 240 * MIB), hardware).memory
        assert min(memory.items.values()) >= 0
        assert sum(memory.items.values()) == memory.measured_peak_bytes


def test_a_card_with_room_in_a_host_without_is_refused_with_the_hosts_numbers() -> None:
    machine = Machine(GIB, MIB)
    machine.host_bytes = 12 * GIB  # 11.4 remain of 12
    with pytest.raises(NothingFitsError, match=r"12\.00 GiB of host memory.* 11\.40 GiB"):
        plan_on(machine)
    assert plan_on(machine, PROCESSOR).hardware.device == "cpu", "where there is one memory it is accounted once"


def test_an_earlier_plan_is_held_against_what_is_free_now() -> None:
    plan = plan_on(Machine(GIB, 240 * MIB))
    assert plan.memory.measured_peak_bytes is not None
    enough = Budget(plan.memory.measured_peak_bytes, "free device memory", 0)
    check_room(plan, enough)
    fast = plan.model_copy(update={"workload": plan.workload.model_copy(update={"cpu_allocator": "fast"})})
    with pytest.raises(NothingFitsError):
        check_room(fast, enough)
    check_room(fast, Budget(round(AMPLE * enough.limit_bytes), "free memory", 0))
    with pytest.raises(NothingFitsError, match="the budget here and now") as error:
        check_room(plan, Budget(enough.limit_bytes, "--memory-limit", 1))
    assert "--auto" in error.value.hint


def test_a_fixed_size_that_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(NothingFitsError, match=r"batch of 64 rows .* 6\.65 GiB") as error:
        plan_on(Machine(GIB, GIB), micro_batch_size=64)
    assert "--auto" in error.value.hint


def test_where_one_row_does_not_fit_the_nearest_change_that_would_is_named() -> None:
    with pytest.raises(NothingFitsError, match="one row of 32 tokens") as error:
        plan_on(Machine(GIB, 10 * GIB))
    assert error.value.hint.startswith("--gradient-checkpointing on would fit: 3.50 GiB")
    with pytest.raises(NothingFitsError) as error:
        plan_on(Machine(9 * GIB, GIB), work=workload("llama", max_seq_len=512))
    assert "smaller model" in error.value.hint


def test_shorter_rows_are_tried_after_checkpointing() -> None:
    with pytest.raises(NothingFitsError) as error:
        plan_on(Machine(GIB, 4 * GIB), work=workload("llama", max_seq_len=512))
    assert "--max-seq-len 128" in error.value.hint


def test_on_a_processor_the_fast_allocator_is_for_ample_memory_and_the_tight_one_for_little() -> None:
    ample, scarce = Machine(GIB // 2, MIB), Machine(GIB // 2, 200 * MIB)
    assert plan_on(ample, PROCESSOR).workload.cpu_allocator == "fast"
    plan = plan_on(scarce, PROCESSOR)
    assert plan.workload.cpu_allocator == "tight"
    assert [(trial.cpu_allocator, trial.micro_batch_size) for trial in plan.evidence.trials] == scarce.tried
    assert plan.evidence.seconds == len(scarce.tried), "what was tried at the other setting took time too"
    assert {"tight"} == {allocator for allocator, _ in scarce.tried}, "the trace knew"
    chosen = next(t for t in plan.evidence.trials if t.peak_bytes == plan.memory.measured_peak_bytes)
    assert chosen.cpu_allocator == "tight"


def test_no_size_is_tried_twice() -> None:
    for per_row in (MIB, 30 * MIB, 240 * MIB, GIB):
        for hardware in (CARD, PROCESSOR):
            machine = Machine(GIB, per_row)
            plan_on(machine, hardware)
            assert len(machine.tried) == len(set(machine.tried))


def test_recorded_evidence_replays_to_the_same_plan() -> None:
    first = planned(Machine(GIB, 240 * MIB), PROCESSOR)
    evidence = Evidence.model_validate_json(first.evidence.model_dump_json())
    recorded = {(trial.cpu_allocator, trial.micro_batch_size): trial for trial in evidence.trials}

    class Recording(Machine):
        def measure(self, work: Workload, hardware: Hardware, rows: int, *rest: Any) -> Trial:
            return recorded[work.cpu_allocator, rows]

        def trace(self, *_: Any) -> TraceReport:
            return TraceReport(process_bytes=evidence.process_bytes, traced=evidence.traced)

    assert planned(Recording(0, 0), evidence.hardware, work=evidence.workload).plan == first.plan


def test_a_model_that_cannot_be_traced_is_planned_by_dry_steps_alone() -> None:
    class Opaque(Machine):
        def trace(self, *_: Any) -> None:
            return None

    for machine, hardware in ((Opaque(GIB, 240 * MIB), CARD), (Opaque(GIB, 200 * MIB), PROCESSOR)):
        plan = plan_on(machine, hardware)
        traced = plan_on(Machine(machine.fixed, machine.per_row), hardware)
        assert plan.batching.largest_safe_micro_batch_size == pytest.approx(
            traced.batching.largest_safe_micro_batch_size, rel=0.1
        )
        assert sum(plan.memory.items.values()) == plan.memory.measured_peak_bytes
        assert len(machine.tried) == len(set(machine.tried))


def test_with_a_right_trace_two_or_three_trials_find_the_largest() -> None:
    for per_row in (MIB, 30 * MIB, 100 * MIB, 240 * MIB, 700 * MIB):
        machine = Machine(GIB, per_row)
        plan = plan_on(machine, prefer="largest")
        truth = max(r for r in range(1, 241) if GIB + r * per_row <= plan.memory.budget_bytes)
        assert 0.9 * truth <= plan.batching.largest_safe_micro_batch_size <= truth
        assert len(machine.tried) <= 3
        assert plan.evidence.out_of_memory_count == 0


def test_an_erratic_size_below_the_largest_is_not_promised() -> None:
    """Memory need not be monotone: where the balanced size fails, the larger one that was measured stands."""

    class Erratic(Machine):
        def measure(self, work: Workload, hardware: Hardware, rows: int, limit: int, *rest: Any) -> Trial:
            trial = super().measure(work, hardware, rows, limit, *rest)
            if rows == 20:
                return trial.model_copy(update={"peak_bytes": limit})
            return trial

    plan = plan_on(Erratic(GIB, 245 * MIB), prefer="largest", effective_batch_size=120)
    assert plan.batching.largest_safe_micro_batch_size in (21, 22, 23), "120 of which balance to 6 x 20"
    cuts = balanced_cuts(120, plan.batching.micro_batch_size)
    assert 20 not in cuts, "what runs is what was measured to be safe"
    assert plan.memory.measured_peak_bytes is not None
    assert plan.memory.measured_peak_bytes <= plan.memory.budget_bytes


def test_where_no_balanced_cut_was_safe_nothing_is_promised() -> None:
    class OnlyOneSize(Machine):
        def measure(self, work: Workload, hardware: Hardware, rows: int, limit: int, *rest: Any) -> Trial:
            trial = super().measure(work, hardware, rows, limit, *rest)
            return trial if rows == 9 else trial.model_copy(update={"peak_bytes": limit})

    machine = OnlyOneSize(GIB, 240 * MIB)
    with pytest.raises(NothingFitsError, match="one row of 32 tokens needs"):
        plan_on(machine, effective_batch_size=40)
    assert ("tight", 9) in machine.tried, "which was safe, but 40 go 5 x 8"


def test_the_forecast_follows_epochs_and_speed() -> None:
    plan = plan_on(Machine(GIB, MIB), data=data_of(3000), effective_batch_size=64)
    assert plan.forecast is not None
    assert plan.speed is not None
    assert (plan.forecast.steps_per_epoch, plan.forecast.total_steps) == (47, 94)
    # A row takes 10 ms, on the data as it is; rows are padded to the longest beside them, 24.
    assert plan.forecast.padded_tokens_per_sample == pytest.approx(24, rel=1e-3)
    assert plan.forecast.total_seconds == pytest.approx(2 * 3000 * 0.01, rel=0.01)


def test_the_forecast_has_a_pass_over_the_validation_data_after_each_epoch() -> None:
    without = plan_on(Machine(GIB, MIB), data=data_of(3000), effective_batch_size=64).forecast
    plan = plan_on(Machine(GIB, MIB), data=data_of(3000), validation=data_of(400), effective_batch_size=64)
    assert without is not None
    assert plan.forecast is not None
    # A row of 32 tokens takes 2.5 ms; rows of this data are padded to 24.
    assert plan.forecast.validation_seconds == pytest.approx(400 * 0.0025 * 24 / 32, rel=0.01)
    assert plan.forecast.total_seconds == pytest.approx(without.total_seconds + 2 * plan.forecast.validation_seconds)


def test_host_memory_is_accounted_beside_the_cards() -> None:
    memory = plan_on(Machine(GIB, MIB)).memory
    assert memory.host_peak_bytes == GIB
    assert memory.host_budget_bytes == pytest.approx(12 * GIB * 0.95)
    assert sum(memory.items.values()) == memory.measured_peak_bytes


def estimated(machine: Machine, hardware: Hardware = CARD, **changes: Any) -> Plan:
    return planner_on(machine, hardware, **changes).estimate()


def test_an_estimate_tries_nothing_and_says_what_the_trace_lets_fit() -> None:
    machine = Machine(GIB, 240 * MIB)
    plan = estimated(machine)
    assert machine.tried == []
    assert (plan.evidence.kind, plan.evidence.trials, plan.memory.measured_peak_bytes) == ("estimated", (), None)
    assert plan.speed is None
    truth = plan_on(machine).batching.largest_safe_micro_batch_size
    assert plan.batching.largest_safe_micro_batch_size == pytest.approx(truth, rel=0.1)
    peak = plan.memory.predicted_peak_bytes
    assert peak is not None
    assert peak <= plan.memory.budget_bytes
    assert sum(plan.memory.items.values()) == peak


def test_an_estimate_keeps_a_size_that_was_given_and_refuses_what_would_not_fit() -> None:
    plan = estimated(Machine(GIB, MIB), micro_batch_size=7, effective_batch_size=30)
    assert (plan.batching.micro_batch_size, plan.batching.limited_by) == (7, "user")
    with pytest.raises(NothingFitsError, match=r"1 rows of 32 tokens would take .* by the trace"):
        estimated(Machine(GIB, 10 * GIB))
    assert estimated(Machine(GIB, MIB), effective_batch_size=8).batching.limited_by == "effective_batch"


def test_a_model_that_cannot_be_traced_cannot_be_estimated() -> None:
    class Opaque(Machine):
        def trace(self, *_: Any) -> None:
            return None

    with pytest.raises(ConfigurationError, match="cannot be traced"):
        estimated(Opaque(GIB, MIB))
