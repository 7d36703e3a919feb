"""The account: the budget of a device, and what a peak is made of."""

from __future__ import annotations

from typing import Any

import pytest
from facts import GIB, MIB, hardware, processor, workload
from hypothesis import given
from hypothesis import strategies as st

from autotune.account import itemise, set_budget
from autotune.errors import NothingFitsError

# The budget.


def test_a_twentieth_of_what_is_free_is_kept_back() -> None:
    budget = set_budget(hardware(device_memory_free_bytes=20 * GIB), None, None)
    assert (budget.limit_bytes, budget.headroom_bytes, budget.budget_bytes) == (20 * GIB, GIB, 19 * GIB)
    assert budget.limit_from == "free device memory"


def test_at_least_256_mib_are_kept_back_on_a_card_and_128_on_a_processor() -> None:
    assert set_budget(hardware(device_memory_free_bytes=2 * GIB), None, None).headroom_bytes == 256 * MIB
    assert set_budget(processor(device_memory_free_bytes=GIB), None, None).headroom_bytes == 128 * MIB


def test_on_a_processor_the_limit_is_named_after_what_binds_there() -> None:
    assert set_budget(processor(), None, None).limit_from == "control group"


@pytest.mark.parametrize("make", [hardware, processor])
def test_a_memory_limit_binds_and_is_named_only_where_it_is_lower_than_what_is_free(make: Any) -> None:
    machine = make(device_memory_free_bytes=4 * GIB)
    free = set_budget(machine, None, None)
    assert set_budget(machine, 8 * GIB, None) == free
    assert set_budget(machine, 4 * GIB, None) == free
    lower = set_budget(machine, 3 * GIB, None)
    assert (lower.limit_bytes, lower.limit_from) == (3 * GIB, "--memory-limit")


def test_headroom_is_a_share_of_the_limit_below_1_and_bytes_from_1_on() -> None:
    machine = hardware(device_memory_free_bytes=8 * GIB)
    assert set_budget(machine, None, 0.25).headroom_bytes == 2 * GIB
    assert set_budget(machine, 4 * GIB, 0.25).headroom_bytes == GIB
    assert set_budget(machine, None, 3 * MIB).headroom_bytes == 3 * MIB
    assert set_budget(machine, None, 1).headroom_bytes == 1
    assert set_budget(machine, None, 0).headroom_bytes == 0


@given(
    free=st.integers(GIB, 200 * GIB),
    limit=st.none() | st.integers(GIB, 200 * GIB),
    headroom=st.none() | st.floats(0, 0.99) | st.integers(1, GIB - 1),
)
def test_budget_and_headroom_are_the_limit_and_the_limit_is_never_more_than_is_free(
    free: int, limit: int | None, headroom: float | None
) -> None:
    budget = set_budget(hardware(device_memory_free_bytes=free), limit, headroom)
    assert budget.limit_bytes == min(free, limit or free)
    assert budget.headroom_bytes >= 0
    assert budget.budget_bytes == budget.limit_bytes - budget.headroom_bytes > 0


@pytest.mark.parametrize(
    ("machine", "limit", "headroom"),
    [
        (hardware(device_memory_free_bytes=256 * MIB), None, None),
        (processor(device_memory_free_bytes=64 * MIB), None, None),
        (hardware(), 256 * MIB, None),
        (hardware(), GIB, float(GIB)),
        (hardware(), GIB, 2.0 * GIB),
        (hardware(device_memory_free_bytes=0), None, 0.0),
    ],
)
def test_headroom_that_leaves_nothing_of_the_limit_is_an_error_with_both_numbers(
    machine: Any, limit: int | None, headroom: float | None
) -> None:
    with pytest.raises(NothingFitsError, match=r"limit of \d+\.\d\d GiB \(.+\) .* \d+\.\d\d GiB of headroom") as caught:
        set_budget(machine, limit, headroom)
    assert caught.value.hint


# What a peak is made of.


@given(
    parameters=st.integers(0, 10**10),
    share=st.floats(0, 1),
    process=st.integers(0, 10**10),
    grown=st.integers(0, 10**11),
)
def test_the_items_sum_to_the_peak(parameters: int, share: float, process: int, grown: int) -> None:
    work = workload(parameters=parameters, trainable_parameters=int(share * parameters))
    state = 4 * work.parameters + 12 * work.trainable_parameters
    items = itemise(work, state + process, state + process + grown)
    assert sum(items.values()) == state + process + grown
    assert items == {
        "weights": 4 * work.parameters,
        "gradients": 4 * work.trainable_parameters,
        "optimizer_state": 8 * work.trainable_parameters,
        "process": process,
        "activations_and_temporaries": grown,
    }


def test_frozen_weights_have_neither_gradients_nor_optimizer_state() -> None:
    items = itemise(workload(trainable_parameters=0), 0, 0)
    assert (items["gradients"], items["optimizer_state"]) == (0, 0)


@given(resident=st.integers(0, 2**40), peak=st.integers(0, 2**40))
def test_no_item_is_negative_whatever_was_measured(resident: int, peak: int) -> None:
    assert min(itemise(workload(), resident, peak).values()) >= 0
