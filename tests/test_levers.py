"""Levers: the plan with one thing changed."""

from __future__ import annotations

from typing import Any

import facts
import pytest
import tiny_models
from test_estimate import RATES, Working, estimated
from test_planner import CARD, GIB, MIB, data_of

from autotune.levers import Scene, measured_rates, vary, with_length, with_rows


def scene(**changes: Any) -> Scene:
    work = tiny_models.workload("llama", cpu_allocator="tight", **changes)
    request = facts.request(effective_batch_size=240, checkpointing="given")
    return Scene(work, CARD, request, facts.recipe(epochs=2), data_of(2400))


def test_each_scene_is_the_estimate_of_its_own_and_all_are_traced_at_once() -> None:
    asked: list[int] = []

    class Counting(Working):
        def trace(self, workloads: Any, *rest: Any) -> Any:
            asked.append(len(workloads))
            return super().trace(workloads, *rest)

    machine = Counting(GIB, 240 * MIB)
    long, short = vary({"32": scene(), "16": scene(max_seq_len=16)}, None, lambda _: RATES, machine.trace)
    assert asked == [2]
    assert (long.change, short.change) == ("32", "16")
    assert long.plan is not None
    assert short.plan is not None
    assert long.plan.batching == estimated(Working(GIB, 240 * MIB), rates=RATES, data=data_of(2400)).batching
    assert short.plan.batching.micro_batch_size > long.plan.batching.micro_batch_size


def test_what_does_not_fit_is_a_row_that_says_so() -> None:
    (row,) = vary({"too large": scene()}, None, lambda _: None, Working(GIB, 10 * GIB).trace)
    assert row.plan is None
    assert "would take" in row.refusal


def test_rates_that_were_measured_give_the_measured_time_back() -> None:
    plan = estimated(Working(GIB, 240 * MIB), rates=RATES)
    traced = Working(GIB, 240 * MIB).report(plan.workload, (1, 240)).traced
    assert plan.speed is not None
    slower = plan.model_copy(
        update={
            "speed": plan.speed.model_copy(
                update={"seconds_per_step": 3 * (plan.speed.seconds_per_step - plan.speed.update_seconds),
                        "update_seconds": 0.0}
            )
        }
    )  # fmt: skip
    rates = measured_rates(slower, traced)
    assert rates is not None
    again = estimated(Working(GIB, 240 * MIB), rates=rates).speed
    assert again is not None
    assert again.seconds_per_step - again.update_seconds == pytest.approx(slower.speed.seconds_per_step)
    assert measured_rates(plan.model_copy(update={"speed": None}), traced) is None
    assert measured_rates(plan, ()) is None


def test_more_rows_are_more_of_the_same_mix() -> None:
    more = with_rows(data_of(100), 1000)
    assert (more.rows, more.samples) == (1000, 1000)
    assert more.lengths == (((16, 500), (24, 500)),)


def test_samples_over_a_limit_are_cut_to_it_and_none_is_lost() -> None:
    data = data_of(100)
    assert with_length(data, 20, 20).lengths == (((16, 50), (20, 50)),)
    assert with_length(data, 10, 10).lengths == (((10, 100),),)
    assert with_length(data, 24, 24) == data
    assert with_length(data, 100, 100) == data
