"""The planner: the promises of a plan, on machines that are curves, and replayed from evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import facts
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import workload

from autotune.account import AMPLE, Budget, check_room, memory_taken
from autotune.batching import balanced_cuts, useful_sizes
from autotune.errands import DRY_LENGTHS, EXPLORING_LENGTHS, DataSummary, Dry, TraceReport
from autotune.errors import ConfigurationError, NothingFitsError
from autotune.evidence import Evidence
from autotune.inputs import PlanInputs
from autotune.measure import TIME_LIMIT_SECONDS
from autotune.plan import Answering, CpuAllocator, Hardware, Layout, Plan, Request, Timed, Timing, Trial, Workload
from autotune.planner import Planner

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
        self.standing_by: list[CpuAllocator] = []
        self.answering: Answering | None = None

    def stand_by(self, hardware: Hardware, allocator: CpuAllocator) -> None:
        self.standing_by.append(allocator)

    def try_size(self, errand: Dry, hardware: Hardware, predicted: int | None, seconds: float | None) -> Trial:
        work, rows, excerpt = errand.workload, errand.micro_batch_size, errand.excerpt
        self.tried.append((work.cpu_allocator, rows))
        self.time_limits.append(seconds)
        peak = round((self.fixed + self.grown(work, rows)) * (1.3 if work.cpu_allocator == "fast" else 1.0))
        fits, verified = peak <= errand.limit_bytes, errand.verify and peak <= errand.budget_bytes
        tokens, took = rows * work.tokens_per_row, rows * self.seconds_per_row(rows)
        return Trial(
            micro_batch_size=rows,
            cpu_allocator=work.cpu_allocator,
            gradient_checkpointing=work.gradient_checkpointing,
            outcome="completed" if fits else "out_of_memory",
            peak_bytes=peak if fits else None,
            predicted_peak_bytes=predicted,
            phases={"forward_backward": peak, "optimizer": self.fixed} if fits else {},
            resident_bytes=self.fixed if fits else None,
            host_peak_bytes=self.host_bytes if fits else None,
            timings=tuple(
                Timing(padded_tokens=round(tokens * s), seconds=took * s, update_seconds=0)
                for s in (DRY_LENGTHS if verified else EXPLORING_LENGTHS)
            ),
            timed=tuple(
                Timed(
                    layout=work.layout,
                    rows=size,
                    samples=rows,
                    padded_tokens=(24 * rows,) * 3,
                    seconds=(rows * self.seconds_per_row(size),) * 3,
                )
                for size in (excerpt.sizes if excerpt and verified else ())
            ),
            verified=verified,
            evaluation_seconds=took / 4,
            expected_peak_bytes=peak if excerpt and verified else None,
            inexact=(),
            matrix_flops={},
            answering=self.answering if excerpt and verified else None,
            seconds=1.0,
            message="" if fits else "no more",
        )

    def grown(self, work: Workload, rows: int) -> float:
        checkpointed = 0.25 if work.gradient_checkpointing == "on" else 1.0
        return self.per_row * rows * checkpointed * work.max_seq_len / 32

    def trace_sizes(
        self, workloads: Sequence[Workload], hardware: Hardware, sizes: tuple[int, ...]
    ) -> list[TraceReport]:
        return [self.report(work, sizes) for work in workloads]

    def report(self, work: Workload, sizes: tuple[int, ...]) -> TraceReport:
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
        "checkpointing": "given",
        "layout": "given",
        "compile": "given",
        "backend": None,
        "offline": False,
        "data": None,
        "work": workload("llama", cpu_allocator="fast" if hardware.device == "cpu" else "tight"),
    }
    values |= changes
    data, validation, work = values.pop("data"), values.pop("validation", None), values.pop("work")
    known = values.pop("known", None)
    inputs = PlanInputs(work, hardware, Request(**values), facts.course(data, validation, epochs=2))
    return Planner(inputs, machine, known)


def data_of(samples: int) -> DataSummary:
    return DataSummary(
        files=("a.parquet",),
        store="store",
        fingerprint="data",
        contents="c0de",
        stage="sft",
        rows=samples,
        samples=samples,
        tokens=samples * 20,
        target_tokens=samples * 10,
        lengths=(((16, samples // 2), (24, samples - samples // 2)),),
        longest_row=(24, "data.jsonl: line 1"),
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
    with pytest.raises(NothingFitsError, match=r"batch of 6 rows .* needs 6\.86 GiB; the budget is 6\.65 GiB"):
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
        def try_size(self, errand: Dry, *_: Any) -> Trial:
            return facts.out_of_memory(errand.micro_batch_size, outcome="timed_out", message="not done after 600 s")

    with pytest.raises(NothingFitsError, match="too slow for this machine: not done after 600 s"):
        plan_on(Slow(GIB, MIB))


def test_a_size_that_takes_too_long_is_not_tried_again_nor_taken_for_lack_of_memory() -> None:
    class Slow(Machine):
        def try_size(self, errand: Dry, *rest: Any) -> Trial:
            trial, rows = super().try_size(errand, *rest), errand.micro_batch_size
            if rows < 7:
                return trial
            return facts.out_of_memory(rows, outcome="timed_out", cpu_allocator=errand.workload.cpu_allocator)

    machine = Slow(GIB // 2, MIB)
    plan = plan_on(machine, PROCESSOR, prefer="largest")
    assert machine.tried == [("fast", 240), ("fast", 30), ("fast", 3)]
    assert plan.batching.micro_batch_size == 3


def test_items_are_never_negative_though_the_trace_be_too_high() -> None:
    class Exaggerated(Machine):
        def report(self, *asked: Any) -> TraceReport:
            report = super().report(*asked)
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
    with pytest.raises(
        NothingFitsError, match=r"12\.10 GiB of host memory \(12\.00 GiB for 1 ranks here, 0\.10 .* 11\.40 GiB"
    ):
        plan_on(machine)
    machine.host_bytes = 8 * GIB
    plan_on(machine)
    with pytest.raises(NothingFitsError, match=r"16\.00 GiB for 2 ranks"):
        plan_on(machine, CARD.model_copy(update={"world_size": 2, "local_world_size": 2}))
    plan_on(machine, CARD.model_copy(update={"world_size": 2}))  # the other is on another machine
    shared = CARD.model_copy(update={"device_memory_total_bytes": CARD.host_memory_total_bytes})
    with pytest.raises(NothingFitsError, match=r"GiB of the card's"):
        plan_on(Machine(5 * GIB, MIB), shared.model_copy(update={"host_memory_available_bytes": 6 * GIB}))
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
    with pytest.raises(NothingFitsError, match="and now the budget is") as error:
        check_room(plan, Budget(enough.limit_bytes, "--memory-limit", 1))
    assert "--auto" in error.value.hint


def test_a_fixed_size_that_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(NothingFitsError, match=r"batch of 64 rows .* 6\.65 GiB") as error:
        plan_on(Machine(GIB, GIB), micro_batch_size=64)
    assert "--auto" in error.value.hint


def test_where_one_row_does_not_fit_the_changes_that_would_are_listed_with_their_bytes_and_rows() -> None:
    with pytest.raises(NothingFitsError, match="one row of 32 tokens") as error:
        plan_on(Machine(GIB, 10 * GIB))
    assert "--gradient-checkpointing on: up to 2 rows, " in error.value.hint
    with pytest.raises(NothingFitsError) as error:
        plan_on(Machine(GIB, 4 * GIB), work=workload("llama", max_seq_len=512))
    assert "--gradient-checkpointing on: " not in error.value.hint
    assert "--max-seq-len 128: up to 1 rows" in error.value.hint
    with pytest.raises(NothingFitsError) as error:
        plan_on(Machine(20 * GIB, GIB), work=workload("llama", max_seq_len=512))
    assert "smaller model" in error.value.hint


def test_checkpointing_is_taken_by_itself_where_nothing_fits_without_it() -> None:
    plan = plan_on(Machine(GIB, 10 * GIB), checkpointing="auto")
    assert (plan.workload.gradient_checkpointing, plan.batching.micro_batch_size) == ("on", 2)
    assert plan_on(Machine(GIB, 240 * MIB), checkpointing="auto").workload.gradient_checkpointing == "off"


def test_a_size_the_user_fixed_is_checkpointed_only_where_it_does_not_fit_without() -> None:
    plan = plan_on(Machine(GIB, GIB), checkpointing="auto", micro_batch_size=8)
    assert (plan.workload.gradient_checkpointing, plan.batching.micro_batch_size) == ("on", 8)
    plan = plan_on(Machine(GIB, GIB), checkpointing="auto", micro_batch_size=4)
    assert plan.workload.gradient_checkpointing == "off"
    with pytest.raises(NothingFitsError, match=r"batch of 64 rows .* needs|did not fit"):
        plan_on(Machine(GIB, GIB), checkpointing="auto", micro_batch_size=64)


class Started(Machine):
    """A machine where each micro-batch takes a second to begin, and little more; recomputing takes a third more."""

    def try_size(self, errand: Dry, *rest: Any) -> Trial:
        trial = super().try_size(errand, *rest)
        longer = 4 / 3 if errand.workload.gradient_checkpointing == "on" else 1.0
        timings = tuple(t.model_copy(update={"seconds": longer * (1 + t.seconds)}) for t in trial.timings)
        return trial.model_copy(update={"timings": timings})


def test_checkpointing_is_weighed_where_fewer_micro_batches_may_pay_for_the_second_forward() -> None:
    """6 rows and 40 micro-batches of a second without, 24 rows and 10 with: both are in the plan."""
    plan = plan_on(Started(GIB, 900 * MIB), checkpointing="auto")
    assert plan.workload.gradient_checkpointing == "on"
    off, on = plan.alternatives
    assert (off.measured, on.measured) == (True, True)
    assert off.largest_micro_batch_size < on.largest_micro_batch_size == plan.batching.micro_batch_size
    assert off.seconds_per_step is not None
    assert on.seconds_per_step is not None
    assert on.seconds_per_step < off.seconds_per_step


def test_checkpointing_is_not_even_tried_where_it_could_not_be_faster() -> None:
    machine = Machine(GIB, 900 * MIB)  # a row takes the same whatever the size
    plan = plan_on(machine, checkpointing="auto")
    assert plan.workload.gradient_checkpointing == "off"
    assert [(a.measured, a.seconds_per_step is None) for a in plan.alternatives] == [(True, False), (False, True)]
    assert len(machine.tried) == len(plan.evidence.trials), "none of them with checkpointing"


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


def test_the_size_that_runs_took_all_dry_steps_and_one_that_only_told_where_to_look_took_few() -> None:
    for per_row in (MIB, 30 * MIB, 240 * MIB, GIB):
        plan = plan_on(Machine(GIB, per_row))
        chosen = [t for t in plan.evidence.trials if t.micro_batch_size == plan.batching.micro_batch_size]
        assert any(t.verified and len(t.timings) == len(DRY_LENGTHS) for t in chosen)
        assert all(len(t.timings) == len(EXPLORING_LENGTHS) for t in plan.evidence.trials if not t.verified)
        assert plan.evidence.dry_steps <= len(EXPLORING_LENGTHS) + 2 * len(DRY_LENGTHS)


def test_what_was_learned_before_gives_the_same_plan_after_one_short_look() -> None:
    first = planned(Machine(GIB, 240 * MIB), CARD)
    again = Machine(GIB, 240 * MIB)
    plan = plan_on(again, known=first.evidence)
    assert first.plan is not None
    assert plan.batching == first.plan.batching
    assert (plan.evidence.kind, len(again.tried)) == ("cached", 1)
    offline = Machine(GIB, 240 * MIB)
    assert plan_on(offline, known=first.evidence, offline=True).batching == first.plan.batching
    assert offline.tried == []


def test_what_was_learned_before_serves_another_budget_as_far_as_it_goes() -> None:
    first = planned(Machine(GIB, 240 * MIB), CARD)
    less, more = Machine(GIB, 240 * MIB), Machine(GIB, 240 * MIB)
    smaller = plan_on(less, known=first.evidence, memory_limit_bytes=4 * GIB)
    assert smaller.memory.measured_peak_bytes is not None
    assert smaller.memory.measured_peak_bytes <= smaller.memory.budget_bytes
    larger = plan_on(more, CARD.model_copy(update={"device_memory_free_bytes": 14 * GIB}), known=first.evidence)
    assert first.plan is not None
    assert smaller.batching.micro_batch_size < first.plan.batching.micro_batch_size < larger.batching.micro_batch_size
    assert (smaller.evidence.kind, larger.evidence.kind) == ("measured", "measured")


def test_what_no_longer_holds_is_forgotten_and_measured_anew() -> None:
    first = planned(Machine(GIB, 200 * MIB), CARD)
    grown = Machine(3 * GIB, 200 * MIB)
    plan = plan_on(grown, known=first.evidence)
    assert plan.evidence.kind == "measured"
    assert plan.batching == plan_on(Machine(3 * GIB, 200 * MIB)).batching


@given(
    history=st.lists(st.integers(2 * GIB, 7 * GIB), max_size=3), now=st.integers(2 * GIB, 7 * GIB), cpu=st.booleans()
)
@settings(max_examples=40)
def test_whatever_was_planned_before_the_plan_is_what_a_fresh_one_would_be(
    history: list[int], now: int, cpu: bool
) -> None:
    """As good, at least: what is known of more sizes may tell of a better one."""
    machine, evidence = Machine(GIB // 2, 150 * MIB), None
    hardware = PROCESSOR if cpu else CARD
    for limit in history:
        evidence = planned(machine, hardware, known=evidence, memory_limit_bytes=limit).evidence
    plan = plan_on(machine, hardware, known=evidence, memory_limit_bytes=now)
    fresh = plan_on(Machine(GIB // 2, 150 * MIB), hardware, memory_limit_bytes=now)
    assert plan.workload == fresh.workload
    assert plan.batching.micro_batch_size >= 0.9 * fresh.batching.micro_batch_size
    assert plan.memory.measured_peak_bytes is not None
    assert plan.memory.measured_peak_bytes <= plan.memory.budget_bytes


def test_a_size_that_was_too_slow_once_is_not_so_for_ever() -> None:
    class Slow(Machine):
        def try_size(self, errand: Dry, *rest: Any) -> Trial:
            if errand.micro_batch_size < 7:
                return super().try_size(errand, *rest)
            return facts.out_of_memory(errand.micro_batch_size, outcome="timed_out")

    known = planned(Slow(GIB, MIB)).evidence
    assert plan_on(Machine(GIB, MIB), known=known).batching.micro_batch_size == 240


def test_a_remembered_plan_whose_size_has_come_near_the_budget_is_made_anew() -> None:
    first = planned(Machine(GIB, 240 * MIB), CARD)
    assert first.plan is not None
    rows = first.plan.batching.micro_batch_size
    room = first.plan.memory.budget_bytes - (GIB + rows * 240 * MIB)
    plan = plan_on(Machine(GIB + room - MIB, 240 * MIB), known=first.evidence)
    assert plan.evidence.kind == "measured"


def test_a_refusal_speaks_of_one_row_whatever_else_is_known() -> None:
    known = planned(Machine(GIB, 2 * GIB)).evidence
    with pytest.raises(NothingFitsError, match=r"one row of 32 tokens needs 3\.00 GiB"):
        plan_on(Machine(GIB, 2 * GIB), known=known, memory_limit_bytes=2 * GIB)


def test_a_row_that_is_too_slow_is_not_tried_slower_still() -> None:
    class Slow(Machine):
        def try_size(self, errand: Dry, *rest: Any) -> Trial:
            super().try_size(errand, *rest)
            return facts.out_of_memory(errand.micro_batch_size, outcome="timed_out", message="not done after 600 s")

    machine = Slow(GIB, MIB)
    with pytest.raises(NothingFitsError, match="too slow"):
        plan_on(machine, checkpointing="auto")
    assert machine.tried == [("tight", 240), ("tight", 30), ("tight", 3), ("tight", 1)]


def test_what_was_learned_of_another_workload_is_not_used() -> None:
    first = planned(Machine(GIB, 240 * MIB), CARD)
    other = Machine(GIB, 240 * MIB)
    assert plan_on(other, known=first.evidence, work=workload("llama", max_seq_len=16)).evidence.kind == "measured"


def test_recorded_evidence_replays_to_the_same_plan() -> None:
    first = planned(Machine(GIB, 240 * MIB), PROCESSOR)
    evidence = Evidence.model_validate_json(first.evidence.model_dump_json())
    (explored,) = evidence.explored
    recorded = {(t.cpu_allocator, t.micro_batch_size, t.verified): t for t in explored.trials}

    class Recording(Machine):
        def try_size(self, errand: Dry, *_: Any) -> Trial:
            return recorded[errand.workload.cpu_allocator, errand.micro_batch_size, errand.verify]

        def report(self, *_: Any) -> TraceReport:
            return TraceReport(process_bytes=explored.process_bytes, traced=explored.traced)

    assert planned(Recording(0, 0), evidence.hardware, work=explored.workload).plan == first.plan


def test_a_model_that_cannot_be_traced_is_planned_by_dry_steps_alone() -> None:
    class Opaque(Machine):
        def trace_sizes(self, *_: Any) -> list[TraceReport]:
            return []

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
        truth = max(r for r in useful_sizes(240) if GIB + r * per_row <= plan.memory.budget_bytes)
        assert 0.9 * truth <= plan.batching.largest_safe_micro_batch_size <= truth
        assert len(machine.tried) <= 3
        assert plan.evidence.out_of_memory_count == 0


def test_an_erratic_size_is_not_promised_and_those_beside_it_are() -> None:
    """Memory need not be monotone: what runs is what was measured to be safe."""

    class Erratic(Machine):
        def try_size(self, errand: Dry, *rest: Any) -> Trial:
            trial = super().try_size(errand, *rest)
            return trial.model_copy(update={"peak_bytes": 7 * GIB}) if errand.micro_batch_size == 20 else trial

    plan = plan_on(Erratic(GIB, 245 * MIB), prefer="largest", effective_batch_size=120)
    assert plan.batching.micro_batch_size in (15, 18), "what 120 is cut to below 20"
    assert plan.memory.measured_peak_bytes is not None
    assert plan.memory.measured_peak_bytes <= plan.memory.budget_bytes


@given(st.integers(1, 6), st.integers(1, 5), st.integers(40, 400))
def test_memory_that_is_taken_while_planning_is_told_or_planned_with(when: int, taken: int, per_row: int) -> None:
    """From the trial on that finds it gone nothing is promised that does not fit; what was measured before is told."""

    class Taken(Machine):
        def try_size(self, errand: Dry, *rest: Any) -> Trial:
            gone = taken * GIB if len(self.tried) >= when else 0
            return super().try_size(errand.model_copy(update={"limit_bytes": errand.limit_bytes - gone}), *rest)

    machine = Taken(GIB // 4, per_row * MIB)
    now = Budget((7 - taken) * GIB, "the card", 0)
    try:
        plan = plan_on(machine, prefer="largest")
    except NothingFitsError:
        assert GIB // 4 + per_row * MIB > now.limit_bytes - GIB
        return
    peak = plan.memory.measured_peak_bytes or 0
    assert machine.tried.index(("tight", plan.batching.largest_safe_micro_batch_size)) < when or peak <= now.limit_bytes
    told = memory_taken(plan, now)
    assert ("memory was taken while this was planned" in told) == (peak > now.limit_bytes)


def test_only_sizes_that_save_a_micro_batch_are_tried() -> None:
    machine = Machine(GIB, 240 * MIB)
    plan_on(machine, prefer="largest", effective_batch_size=64)
    assert {rows for _, rows in machine.tried} <= {balanced_cuts(64, rows)[0] for rows in range(1, 65)}


def test_the_forecast_follows_epochs_and_speed() -> None:
    plan = plan_on(Machine(GIB, MIB), data=data_of(3000), effective_batch_size=64)
    assert plan.forecast is not None
    assert plan.speed is not None
    assert (plan.forecast.steps_per_epoch, plan.forecast.total_steps) == (47, 94)
    # A row takes 10 ms, on the data as it is; rows are padded to the longest beside them, 24.
    assert plan.forecast.padded_tokens_per_sample == pytest.approx(24, rel=1e-3)
    saving = 2 * plan.forecast.saving_seconds
    assert plan.forecast.total_seconds == pytest.approx(2 * 3000 * 0.01 + saving, rel=0.01)


def test_the_forecast_has_the_answers_that_an_evaluation_asks_for() -> None:
    machine = Machine(GIB, MIB)
    machine.answering = Answering(
        rows_at_once=2, prompt_tokens=0.0, longest_answer=10, seconds_of_token=0.1, seconds_of_further_row=0.01
    )
    plan = plan_on(machine, data=data_of(3000), validation=data_of(400), effective_batch_size=64)
    assert plan.forecast is not None
    # Four rows are scored, two at a time; one fixed prompt is answered as far as a row has room.
    assert plan.forecast.answer_seconds == pytest.approx(10 * 2 * (0.1 + 0.01) + 32 * 0.1)


def test_the_forecast_has_a_pass_over_the_validation_data_after_each_epoch() -> None:
    without = plan_on(Machine(GIB, MIB), data=data_of(3000), effective_batch_size=64).forecast
    plan = plan_on(Machine(GIB, MIB), data=data_of(3000), validation=data_of(400), effective_batch_size=64)
    assert without is not None
    assert plan.forecast is not None
    # A row of 32 tokens takes 2.5 ms; rows of this data are padded to 24.
    assert plan.forecast.validation_seconds == pytest.approx(400 * 0.0025 * 24 / 32, rel=0.01)
    # The first evaluation may be the best there is: it is saved then, and its model at the end.
    more = 2 * plan.forecast.validation_seconds + 2 * plan.forecast.saving_seconds
    assert plan.forecast.total_seconds == pytest.approx(without.total_seconds + more)


def test_host_memory_is_accounted_beside_the_cards() -> None:
    memory = plan_on(Machine(GIB, MIB)).memory
    assert memory.host_peak_bytes == GIB
    assert memory.host_budget_bytes == pytest.approx(12 * GIB * 0.95)
    assert sum(memory.items.values()) == memory.measured_peak_bytes


# Layouts.


class Laid(Machine):
    """A machine where what a sample takes depends on the layout, and a layout may be inexact."""

    def __init__(self, seconds: dict[str, float], inexact: tuple[Layout, ...] = (), packed_bytes: int = 0) -> None:
        super().__init__(GIB, 200 * MIB)
        self.seconds, self.inexact, self.packed_bytes = seconds, inexact, packed_bytes
        self.layouts: list[Layout] = []

    def try_size(self, errand: Dry, *rest: Any) -> Trial:
        trial, rows = super().try_size(errand, *rest), errand.micro_batch_size
        self.layouts.append(errand.workload.layout)
        if errand.excerpt is None:
            return trial
        ways = [(layout, rows) for layout in (errand.workload.layout, *errand.excerpt.layouts)]
        ways += [(errand.workload.layout, size) for size in errand.excerpt.sizes[1:]]
        timed = tuple(
            Timed(layout=way, rows=size, samples=rows, padded_tokens=(512,) * 3, seconds=(self.seconds[way],) * 3)
            for way, size in ways
            if way not in self.inexact
        )
        return trial.model_copy(update={"timed": timed, "inexact": self.inexact})


def laid(machine: Laid, layout: Literal["auto", "given"] = "auto", **changes: Any) -> Plan:
    work = workload("llama", cpu_allocator="tight", layout="packed")
    return plan_on(machine, work=work, layout=layout, data=data_of(1000), **changes)


def test_packed_rows_stay_where_no_other_layout_is_faster_each_time() -> None:
    machine = Laid({"packed": 1.0, "sorted": 0.97, "fixed": 2.0})
    assert laid(machine).workload.layout == "packed"
    assert set(machine.layouts) == {"packed"}


def test_a_faster_layout_is_taken_and_its_size_verified_under_it() -> None:
    machine = Laid({"packed": 1.0, "sorted": 0.8, "fixed": 2.0})
    plan = laid(machine)
    assert plan.workload.layout == "sorted"
    assert machine.layouts[-1] == "sorted"
    assert machine.layouts.count("sorted") == 1
    assert plan.batching.micro_batch_size == machine.tried[-1][1]
    assert plan.evidence.trials[-1].verified
    replayed = planner_on(machine, work=workload("llama", cpu_allocator="tight", layout="packed"), layout="auto",
        data=data_of(1000), known=planned(machine, work=workload("llama", cpu_allocator="tight", layout="packed"),
        layout="auto", data=data_of(1000)).evidence, offline=True)  # fmt: skip
    assert list(replayed.make()) == []
    assert replayed.plan is not None
    assert replayed.plan.workload.layout == "sorted"


def test_a_layout_that_is_not_exact_is_left_for_one_that_is() -> None:
    machine = Laid({"packed": 1.0, "sorted": 2.0, "fixed": 3.0}, inexact=("packed",))
    assert laid(machine).workload.layout == "sorted"


@pytest.mark.parametrize("inexact", [("packed",), ("packed", "sorted", "fixed")])
def test_without_real_samples_the_next_layout_is_taken_for_one_that_is_not_exact(inexact: tuple[Layout, ...]) -> None:
    class Proven(Laid):
        def try_size(self, errand: Dry, *rest: Any) -> Trial:
            return super().try_size(errand, *rest).model_copy(update={"inexact": inexact})

    work = workload("llama", cpu_allocator="tight", layout="packed")
    assert plan_on(Proven({}), work=work, layout="auto").workload.layout == "sorted"


def test_a_layout_that_was_given_and_is_not_exact_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="packed rows change the gradient"):
        laid(Laid({"packed": 1.0, "sorted": 1.0, "fixed": 1.0}, inexact=("packed",)), layout="given")


def test_where_nothing_is_exact_rows_as_they_come_are_kept() -> None:
    work = workload("llama", cpu_allocator="tight", layout="fixed")
    machine = Laid({"fixed": 1.0}, inexact=("fixed",))
    assert plan_on(machine, work=work, layout="auto", data=data_of(1000)).workload.layout == "fixed"


def test_a_layout_that_was_given_is_kept_and_no_other_timed() -> None:
    machine = Laid({"packed": 1.0, "sorted": 0.1, "fixed": 0.1})
    plan = laid(machine, layout="given")
    assert plan.workload.layout == "packed"
    assert {t.layout for trial in plan.evidence.trials for t in trial.timed} == {"packed"}


def test_a_size_that_was_given_is_planned_in_the_fastest_layout_too() -> None:
    plan = laid(Laid({"packed": 1.0, "sorted": 2.0, "fixed": 0.5}), micro_batch_size=4)
    assert (plan.workload.layout, plan.batching.micro_batch_size) == ("fixed", 4)


def test_packed_rows_need_fewer_micro_batches_than_the_bound_and_the_plan_says_how_many() -> None:
    plan = laid(Laid({"packed": 1.0, "sorted": 2.0, "fixed": 2.0}))
    assert plan.batching.expected_micro_batches_per_step < plan.batching.gradient_accumulation_steps
    assert plan.forecast is not None
    assert plan.forecast.padded_tokens_per_sample < 32


# Compiled layers.


class Compiler(Machine):
    """A machine on which compiled layers take a share of the time, after a first step that makes them."""

    def __init__(self, share: float, making_seconds: float = 60.0, per_row: int = 200 * MIB) -> None:
        super().__init__(GIB, per_row)
        self.share, self.making_seconds = share, making_seconds
        self.compiled: list[int] = []

    def try_size(self, errand: Dry, *rest: Any) -> Trial:
        trial = super().try_size(errand, *rest)
        if errand.workload.compile == "off" or not trial.timings:
            return trial
        self.compiled.append(errand.micro_batch_size)
        if self.making_seconds == float("inf"):
            raise ConfigurationError("it does not compile here: no compiler")
        timings = [t.model_copy(update={"seconds": t.seconds * self.share}) for t in trial.timings]
        timings[0] = timings[0].model_copy(update={"seconds": timings[0].seconds + self.making_seconds / 2})
        timed = [t.model_copy(update={"seconds": tuple(s * self.share for s in t.seconds)}) for t in trial.timed]
        return trial.model_copy(update={"timings": tuple(timings), "timed": tuple(timed)})


HOURS = 10**6
"""Samples that take hours on these machines."""


def compiling(machine: Compiler, samples: int = HOURS, hardware: Hardware = CARD, **changes: Any) -> Planner:
    return planned(machine, hardware, data=data_of(samples), **({"compile": "auto"} | changes))


def test_compiled_layers_are_taken_at_the_chosen_size_where_the_run_repays_them() -> None:
    machine = Compiler(0.7)
    plan, without = compiling(machine).plan, compiling(Compiler(0.7), compile="given").plan
    assert plan is not None
    assert without is not None
    assert (plan.workload.compile, without.workload.compile) == ("on", "off")
    assert machine.compiled == [plan.batching.micro_batch_size] == [without.batching.micro_batch_size]
    assert plan.forecast is not None
    assert without.forecast is not None
    assert plan.forecast.total_seconds == pytest.approx(0.7 * without.forecast.total_seconds, rel=0.01)
    assert [a.change for a in plan.alternatives] == ["--compile off", "--compile on"]
    assert plan.evidence.trials[-1].verified


@pytest.mark.parametrize(
    ("share", "making", "samples", "tried"),
    [
        (0.7, 10_000.0, HOURS, True),  # more than the run
        (0.999, 60.0, HOURS, True),  # no gain
        (0.7, float("inf"), HOURS, True),  # no compiler
        (0.7, 60.0, 1000, False),  # a short run
    ],
)
def test_compiled_layers_that_do_not_repay_are_left(share: float, making: float, samples: int, tried: bool) -> None:
    machine = Compiler(share, making)
    plan = compiling(machine, samples).plan
    assert plan is not None
    assert plan.workload.compile == "off"
    assert bool(machine.compiled) is tried


def test_on_a_processor_no_compiler_runs_beside_a_step_that_fills_memory() -> None:
    tight, ample = Compiler(0.7), Compiler(0.7, per_row=MIB)
    assert compiling(tight, hardware=PROCESSOR).plan.workload.compile == "off"  # type: ignore[union-attr]
    assert compiling(ample, hardware=PROCESSOR).plan.workload.compile == "on"  # type: ignore[union-attr]
    assert not tight.compiled


def test_compiled_layers_that_hold_too_much_are_left() -> None:
    class Greedy(Compiler):
        def try_size(self, errand: Dry, *rest: Any) -> Trial:
            trial = super().try_size(errand, *rest)
            return trial.model_copy(update={"peak_bytes": 8 * GIB}) if errand.workload.compile == "on" else trial

    plan = compiling(Greedy(0.5)).plan
    assert plan is not None
    assert plan.workload.compile == "off"


def test_what_was_learned_of_compiled_layers_is_remembered() -> None:
    first = compiling(Compiler(0.7))
    again = compiling(machine := Compiler(0.7), known=first.evidence, offline=True)
    assert machine.tried == []
    assert again.plan is not None
    assert again.plan.workload.compile == "on"


def test_a_size_that_was_given_may_be_compiled_too() -> None:
    plan = compiling(Compiler(0.7), micro_batch_size=4).plan
    assert plan is not None
    assert (plan.workload.compile, plan.batching.micro_batch_size) == ("on", 4)


def test_what_did_not_compile_is_not_tried_again() -> None:
    first = compiling(Compiler(0.7, float("inf")))
    again = compiling(machine := Compiler(0.7), known=first.evidence, offline=True)
    assert machine.tried == []
    assert again.plan is not None
    assert again.plan.workload.compile == "off"


def test_what_a_short_run_has_no_use_for_is_not_forgotten() -> None:
    first = compiling(Compiler(0.7))
    short = compiling(Compiler(0.7), samples=1000, known=first.evidence, offline=True)
    again = compiling(machine := Compiler(0.7), known=short.evidence, offline=True)
    assert machine.tried == []
    assert again.plan is not None
    assert again.plan.workload.compile == "on"
