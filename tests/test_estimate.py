"""Estimates: plans for cards that are not here, on machines that are curves."""

from __future__ import annotations

from typing import Any

import facts
import pytest
import tiny_models
from test_planner import CARD, GIB, MIB, Machine, data_of, plan_on

from autotune.errands import TraceReport
from autotune.errors import ConfigurationError, NothingFitsError
from autotune.estimate import estimate
from autotune.inputs import PlanInputs
from autotune.plan import Hardware, Plan, Rates, Work


def estimated(machine: Machine, hardware: Hardware = CARD, **changes: Any) -> Plan:
    data, rates = changes.pop("data", None), changes.pop("rates", None)
    request = facts.request(**{"effective_batch_size": 240, "checkpointing": "given"} | changes)
    work = tiny_models.workload("llama", cpu_allocator="tight")
    return estimate(
        PlanInputs(work, hardware, request, facts.course(data, epochs=2)),
        rates,
        machine.trace_sizes,
    )


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
        def trace_sizes(self, *_: Any) -> list[TraceReport]:
            return []

    with pytest.raises(ConfigurationError, match="cannot be traced"):
        estimated(Opaque(GIB, MIB))


class Working(Machine):
    """A machine whose trace tells of work: a row moves a gigabyte and multiplies for a tera-flop."""

    operators = 1000

    def report(self, *asked: Any) -> TraceReport:
        report = super().report(*asked)
        slower = 4 / 3 if asked[0].gradient_checkpointing == "on" else 1.0
        traced = (
            t.model_copy(
                update={
                    "work": Work(
                        operators=self.operators,
                        flops=round(slower * 10**12 * t.micro_batch_size),
                        moved_bytes=round(slower * 10**9 * t.micro_batch_size),
                    ),
                    "update": Work(operators=10, flops=0, moved_bytes=10**9),
                }
            )
            for t in report.traced
        )
        return TraceReport(process_bytes=report.process_bytes, traced=tuple(traced))


RATES = Rates(flops=50e12, bytes=500e9, operator_seconds=8e-6, overlaps=True)


def test_time_is_that_of_the_work_at_the_cards_rates() -> None:
    """A row: 20 ms to multiply, 2 ms to move; the optimizer 2 ms a step."""
    plan = estimated(Working(GIB, 240 * MIB), rates=RATES, data=data_of(2400))
    assert plan.speed is not None
    assert plan.speed.seconds_per_step == pytest.approx(240 * 0.022 + 0.002)
    assert plan.forecast is not None
    # Rows of this data are padded to 24 of 32 tokens.
    assert plan.forecast.seconds_per_epoch == pytest.approx(2400 * 0.022 * 24 / 32 + 10 * 0.002, rel=0.02)


def test_no_micro_batch_takes_less_than_its_operators_take_to_start() -> None:
    class Many(Working):
        operators = 10**6

    plan = estimated(Many(GIB, 240 * MIB), rates=RATES)
    assert plan.speed is not None
    assert plan.speed.seconds_per_step == pytest.approx(plan.batching.gradient_accumulation_steps * 8.0, rel=0.01)


def test_several_ranks_pay_for_their_gradients() -> None:
    one = estimated(Working(GIB, MIB), rates=RATES).speed
    two = estimated(Working(GIB, MIB), CARD.model_copy(update={"world_size": 2}), rates=RATES)
    assert one is not None
    assert two.speed is not None
    assert two.batching.effective_batch_size == 240
    reduced = 4 * two.workload.trainable_parameters / 10e9
    assert two.speed.update_seconds == pytest.approx(one.update_seconds + reduced)
    assert two.speed.seconds_per_step < one.seconds_per_step


def test_an_estimate_takes_checkpointing_only_where_it_is_needed_or_faster() -> None:
    plan = estimated(Working(GIB, 240 * MIB), rates=RATES, checkpointing="auto")
    assert plan.workload.gradient_checkpointing == "off"
    assert [a.change for a in plan.alternatives] == ["--gradient-checkpointing off", "--gradient-checkpointing on"]
    assert plan.alternatives[0].largest_micro_batch_size < plan.alternatives[1].largest_micro_batch_size
    needed = estimated(Working(GIB, 10 * GIB), rates=RATES, checkpointing="auto")
    assert needed.workload.gradient_checkpointing == "on"

    class Many(Working):
        operators = 10**6

    assert estimated(Many(GIB, 900 * MIB), rates=RATES, checkpointing="auto").workload.gradient_checkpointing == "on"


def test_a_row_however_short_takes_what_its_operators_take_to_start() -> None:
    """A row at full length takes 22 ms, its operators 20 ms: half as long a row takes no 11 ms."""

    class Many(Working):
        operators = 2500

    plan = estimated(Many(GIB, 240 * MIB), rates=RATES, data=data_of(2400), micro_batch_size=1)
    assert plan.forecast is not None
    assert plan.forecast.seconds_per_epoch == pytest.approx(2400 * 0.020 + 10 * 0.002, rel=0.02)


def test_each_way_that_does_not_fit_says_so_and_samples_are_those_of_all_ranks() -> None:
    needed = estimated(Working(GIB, 10 * GIB), rates=RATES, checkpointing="auto")
    assert [a.largest_micro_batch_size for a in needed.alternatives] == [0, needed.batching.micro_batch_size]
    four = estimated(Working(GIB, 240 * MIB), CARD.model_copy(update={"world_size": 4}), rates=RATES)
    chosen = next(row for row in four.sizes if row.micro_batch_size == four.batching.micro_batch_size)
    assert four.speed is not None
    assert chosen.samples_per_second == pytest.approx(four.speed.samples_per_second, rel=0.1)
    assert four.memory.items["process"] == 756 * MIB, "a context, and what ranks need to talk"
