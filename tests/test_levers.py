"""Levers: the plan with one thing changed."""

from __future__ import annotations

from typing import Any

import facts
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from test_estimate import RATES, Working, estimated
from test_planner import CARD, GIB, MIB, data_of

from autotune.inputs import PlanInputs
from autotune.levers import measured_rates, vary, with_length, with_rows


def scene(**changes: Any) -> PlanInputs:
    work = tiny_models.workload("llama", cpu_allocator="tight", **changes)
    request = facts.request(effective_batch_size=240, checkpointing="given")
    return PlanInputs(work, CARD, request, facts.course(data_of(2400), epochs=2))


def test_each_scene_is_the_estimate_of_its_own_and_all_are_traced_at_once() -> None:
    asked: list[int] = []

    class Counting(Working):
        def trace_sizes(self, workloads: Any, *rest: Any) -> Any:
            asked.append(len(workloads))
            return super().trace_sizes(workloads, *rest)

    machine = Counting(GIB, 240 * MIB)
    long, short = vary({"32": scene(), "16": scene(max_seq_len=16)}, lambda _: RATES, machine.trace_sizes)
    assert asked == [2]
    assert (long.change, short.change) == ("32", "16")
    assert long.plan is not None
    assert short.plan is not None
    assert long.plan.batching == estimated(Working(GIB, 240 * MIB), rates=RATES, data=data_of(2400)).batching
    assert short.plan.batching.micro_batch_size > long.plan.batching.micro_batch_size


def test_what_does_not_fit_is_a_row_that_says_so() -> None:
    (row,) = vary({"too large": scene()}, lambda _: None, Working(GIB, 10 * GIB).trace_sizes)
    assert row.plan is None
    assert "would take" in row.refusal


def test_rates_that_were_measured_give_the_measured_time_back_at_any_size() -> None:
    """A micro-batch takes 20 ms to begin and a row 1 ms: 32 x 1 row is not what 1 x 32 rows are."""
    plan = estimated(Working(GIB, MIB), effective_batch_size=32, rates=RATES)
    assert plan.speed is not None
    measured = {"alpha_seconds": 0.020, "beta_seconds_per_token": 0.001 / 32, "update_seconds": 0.0}
    as_measured = plan.model_copy(update={"speed": plan.speed.model_copy(update=measured)})
    rates = measured_rates(as_measured, Working(GIB, MIB).report(plan.workload, (1, 32)).traced)
    assert rates is not None
    for rows, seconds in ((32, 0.020 + 0.032), (1, 32 * 0.021), (8, 4 * 0.028)):
        again = estimated(Working(GIB, MIB), effective_batch_size=32, micro_batch_size=rows, rates=rates).speed
        assert again is not None
        assert again.seconds_per_step - again.update_seconds == pytest.approx(seconds)
    assert measured_rates(plan.model_copy(update={"speed": None}), ()) is None


@given(rows=st.integers(1, 10**6))
def test_other_numbers_of_rows_are_of_the_same_mix(rows: int) -> None:
    other = with_rows(data_of(100), rows)
    assert (other.rows, other.samples) == (rows, rows)
    assert other.lengths == data_of(100).lengths


def test_samples_over_a_limit_are_cut_to_it_and_none_is_lost() -> None:
    data = data_of(100)
    assert with_length(data, 20, 20).lengths == (((16, 50), (20, 50)),)
    assert with_length(data, 10, 10).lengths == (((10, 100),),)
    assert with_length(data, 24, 24) == data
    assert with_length(data, 100, 100) == data


def test_documents_over_a_limit_become_more_samples_and_no_token_is_lost() -> None:
    documents = data_of(100).model_copy(update={"stage": "pretrain"})
    short = with_length(documents, 10, 10)
    assert short.lengths == (((4, 50), (6, 50), (10, 150)),)
    assert short.samples == 250
    assert sum(length * count for length, count in short.lengths[0]) == 50 * 16 + 50 * 24


def test_no_rates_come_of_a_step_whose_time_does_not_grow_with_its_tokens() -> None:
    plan = estimated(Working(GIB, MIB), effective_batch_size=32, rates=RATES)
    assert plan.speed is not None
    flat = plan.model_copy(update={"speed": plan.speed.model_copy(update={"beta_seconds_per_token": 0.0})})
    assert measured_rates(flat, Working(GIB, MIB).report(plan.workload, (1, 32)).traced) is None
