"""What was decided for the user: one line for each thing that nobody gave, with a reason; and what could be had."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import facts
import pytest
from test_planner import data_of

from autotune.plan import Plan
from cli.decisions import advice, decisions
from cli.render.banner import changes
from profiles import resolve

GIVEN: dict[str, Any] = {
    "stage": "sft",
    "learning_rate": 1e-4,
    "precision": "bf16",
    "layout": "fixed",
    "loss_head": "full",
    "gradient_checkpointing": "off",
    "compile": "off",
    "save_every": "500",
}
"""What may be given, by the setting that it is; its line is called so, but for the last."""
CALLED = {"save_every": "checkpoints"}


def told(plan: Plan, *, by_plan: bool = False, **given: Any) -> dict[str, tuple[str, str]]:
    found = decisions(resolve(given), plan, facts.preprocessed(data=data_of(3000)), by_plan=by_plan)
    names = [decision.name for decision in found]
    assert len(names) == len(set(names)), "one line each"
    assert all(decision.value and decision.reason for decision in found)
    return {name.replace(" ", "_"): (value, reason) for name, value, reason in found}


@pytest.mark.parametrize("names", [*combinations(GIVEN, 1), *combinations(GIVEN, 2), tuple(GIVEN)], ids="+".join)
def test_what_was_given_is_not_told_as_decided_and_all_else_is(names: tuple[str, ...]) -> None:
    found = told(facts.plan(), **{name: GIVEN[name] for name in names})
    for name in GIVEN:
        assert (CALLED.get(name, name) in found) == (name not in names), name


def test_a_batch_that_was_found_says_why_it_is_not_larger_and_one_that_was_given_says_nothing() -> None:
    value, reason = told(facts.plan())["micro-batch"]
    assert value == "20 rows"
    assert "23 rows are the largest safe micro-batch" in reason
    given = facts.plan(batching=facts.batching(limited_by="user"))
    assert "micro-batch" not in told(given)


def test_a_plan_made_before_is_told_as_what_it_is() -> None:
    found = told(facts.plan(), by_plan=True)
    of_plan = {name for name, (_, reason) in found.items() if reason == "as the plan has it"}
    assert {"layout", "precision", "micro-batch", "loss_head"} <= of_plan
    assert {"learning_rate", "checkpoints", "stage"} <= found.keys() - of_plan, "which a plan does not have"


@pytest.mark.parametrize(
    ("changes", "machine", "reason"),
    [
        ({"precision": "bf16"}, {}, "this card has arithmetic for it"),
        ({"precision": "fp16"}, {}, "this card has no arithmetic for bf16"),
        ({"precision": "fp32"}, {"device": "cpu"}, "this processor has no arithmetic for bf16"),
    ],
)
def test_a_precision_has_the_reason_of_its_rule(changes: Any, machine: Any, reason: str) -> None:
    plan = facts.plan(workload=facts.workload(**changes), hardware=facts.hardware(**machine))
    assert told(plan)["precision"] == (changes["precision"], reason)


def test_checkpointing_says_whether_anything_fits_without() -> None:
    on = facts.workload(gradient_checkpointing="on")
    assert told(facts.plan(workload=on))["gradient_checkpointing"][1] == "without it nothing fits"


def test_a_card_that_is_hardly_used_is_told_of_only_where_it_is_the_batch_that_keeps_it_so() -> None:
    assert advice(facts.plan()) == [], "memory limits it"
    whole = facts.plan(batching=facts.batching(limited_by="effective_batch"))
    assert advice(whole)[0].startswith("the card is used to 25%: one micro-batch holds all of a step")
    memory = facts.plan().memory
    full = memory.model_copy(update={"measured_peak_bytes": 15 * facts.GIB})
    assert advice(whole.model_copy(update={"memory": full})) == []
    shared = memory.model_copy(update={"budget_bytes": 6 * facts.GIB})
    assert advice(whole.model_copy(update={"memory": shared})) == [], "others have the rest"


def test_a_batch_that_was_given_and_could_grow_is_told_of_unless_it_takes_a_step_at_once() -> None:
    given = facts.plan(batching=facts.batching(limited_by="user", micro_batch_size=1))
    assert advice(given)[0].startswith("the batch that was given, 1 row, takes 27% of the budget: --auto")
    at_once = facts.batching(limited_by="user", expected_micro_batches_per_step=1.0)
    assert advice(facts.plan(batching=at_once)) == []


def test_an_effective_batch_that_is_another_than_was_asked_for_says_why() -> None:
    fewer = facts.plan(batching=facts.batching(effective_batch_size=5))
    assert told(fewer)["effective_batch"] == ("5", "all samples there are, in place of 32")
    assert "effective_batch" not in told(fewer, effective_batch_size=5)


def test_what_was_given_over_a_profile_is_told_with_what_it_was() -> None:
    resolved = resolve({"epochs": 5.0, "batch_size_per_gpu": 12, "seed": 42, "data": ["a.parquet"]}, None, "fast")
    assert changes(resolved) == ["epochs 3 -> 5.0 (command line)", "batch_size_per_gpu 16 -> 12 (command line)"]
    assert changes(resolve({"learning_rate": 3e-5})) == ["learning_rate none -> 3e-05 (command line)"]


def test_what_was_given_as_it_was_is_no_change() -> None:
    assert changes(resolve({"epochs": 3, "seed": 42}, None, "fast")) == []
