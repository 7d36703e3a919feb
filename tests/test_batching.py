"""The effective batch is reached exactly: for any samples, any number of ranks and any micro-batch."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.batching import balanced_cuts, balanced_size, largest_share, reach, share_of, useful_sizes

samples_of_a_step = st.integers(1, 2000)
ranks = st.integers(1, 70)
sizes = st.integers(1, 300)


@given(samples=st.integers(0, 2000), world_size=ranks)
def test_shares_sum_to_the_samples_differ_by_at_most_one_and_the_first_ranks_take_more(
    samples: int, world_size: int
) -> None:
    shares = [share_of(samples, world_size, rank) for rank in range(world_size)]
    assert sum(shares) == samples
    assert shares[0] - shares[-1] <= 1
    assert shares == sorted(shares, reverse=True)
    assert largest_share(samples, world_size) == max(shares)


@given(samples=samples_of_a_step, largest=sizes)
def test_cuts_are_the_fewest_that_hold_all_samples_and_differ_by_at_most_one(samples: int, largest: int) -> None:
    cuts = balanced_cuts(samples, largest)
    assert sum(cuts) == samples
    assert max(cuts) <= largest
    assert max(cuts) - min(cuts) <= 1
    assert min(cuts) >= 1
    assert (len(cuts) - 1) * largest < samples, "one cut less would not hold them"
    assert balanced_size(samples, largest) == max(cuts)


def test_a_rank_without_samples_has_no_micro_batch() -> None:
    assert balanced_cuts(0, 8) == []


def test_240_samples_over_two_ranks_go_6_times_20_where_23_rows_fit() -> None:
    assert largest_share(240, 2) == 120
    assert balanced_cuts(120, 23) == [20] * 6
    rows = balanced_size(120, 23)
    plan = reach(240, 2, rows, 23, "memory")
    assert plan.model_dump() == {
        "micro_batch_size": 20,
        "gradient_accumulation_steps": 6,
        "expected_micro_batches_per_step": 6.0,
        "world_size": 2,
        "effective_batch_size": 240,
        "largest_safe_micro_batch_size": 23,
        "limited_by": "memory",
    }


@pytest.mark.parametrize(
    ("effective", "world_size", "rows", "cuts_by_rank"),
    [
        (7, 2, 3, [[2, 2], [3]]),
        (13, 1, 5, [[5, 4, 4]]),
        (97, 5, 20, [[20], [20], [19], [19], [19]]),
        (2, 3, 8, [[1], [1], []]),
        (101, 2, 100, [[51], [50]]),
    ],
)
def test_a_prime_is_reached_as_any_other_number(
    effective: int, world_size: int, rows: int, cuts_by_rank: list[list[int]]
) -> None:
    cuts = [balanced_cuts(share_of(effective, world_size, rank), rows) for rank in range(world_size)]
    assert cuts == cuts_by_rank
    assert reach(effective, world_size, rows, rows, "user").gradient_accumulation_steps == len(cuts[0])


@given(effective=samples_of_a_step, world_size=ranks, rows=sizes)
def test_the_micro_batches_of_all_ranks_are_the_effective_batch_and_no_rank_takes_more_of_them_than_the_plan_says(
    effective: int, world_size: int, rows: int
) -> None:
    plan = reach(effective, world_size, rows, rows, "memory")
    cuts = [balanced_cuts(share_of(effective, world_size, rank), rows) for rank in range(world_size)]
    assert sum(map(sum, cuts)) == plan.effective_batch_size == effective
    assert max(map(len, cuts)) == plan.gradient_accumulation_steps == plan.expected_micro_batches_per_step
    assert all(cut <= plan.micro_batch_size for rank in cuts for cut in rank)


@given(effective=samples_of_a_step, world_size=ranks, largest=sizes)
def test_balancing_a_micro_batch_costs_no_micro_batch_more(effective: int, world_size: int, largest: int) -> None:
    share = largest_share(effective, world_size)
    rows = balanced_size(share, largest)
    plan = reach(effective, world_size, rows, largest, "memory")
    assert plan.gradient_accumulation_steps == ceil(share / largest)
    assert plan.largest_safe_micro_batch_size == largest


@given(share=st.integers(1, 300))
def test_the_useful_sizes_are_those_that_save_a_micro_batch_and_no_count_is_left_out(share: int) -> None:
    useful = useful_sizes(share)
    assert useful == sorted({balanced_size(share, rows) for rows in range(1, share + 1)})
    counts = [len(balanced_cuts(share, rows)) for rows in useful]
    assert len(set(counts)) == len(counts), "no two reach the step in as many"
    assert (useful[0], useful[-1]) == (1, share)
