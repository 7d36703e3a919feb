"""Layouts: every sample once, nothing over the plan's micro-batch, and no more work than plain rows."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.layout import Lengths, arrange, padded_lengths
from autotune.plan import Layout

LAYOUTS = st.sampled_from(["packed", "sorted", "fixed"])
STARTING = 256


@st.composite
def steps(draw: Any) -> tuple[Lengths, tuple[int, ...], int]:
    """Samples of one or two sides, the limits of each, and the rows of a micro-batch."""
    limits = tuple(draw(st.lists(st.integers(1, 60), min_size=1, max_size=2)))
    sample = st.tuples(*(st.integers(1, limit) for limit in limits))
    return draw(st.lists(sample, max_size=24)), limits, draw(st.integers(1, 8))


def tokens(batch: list[list[int]], lengths: Lengths, limits: tuple[int, ...]) -> int:
    return len(batch) * sum(padded_lengths(batch, lengths, limits))


def rows_of(batches: list[list[list[int]]]) -> int:
    return sum(map(len, batches))


@given(steps(), LAYOUTS)
def test_each_sample_is_there_once_and_nothing_is_over_the_limits(
    step: tuple[Lengths, tuple[int, ...], int], layout: Layout
) -> None:
    lengths, limits, rows = step
    batches = arrange(lengths, layout, rows, limits, STARTING)
    assert sorted(i for batch in batches for row in batch for i in row) == list(range(len(lengths)))
    assert all(row for batch in batches for row in batch)
    for batch in batches:
        padded = padded_lengths(batch, lengths, limits)
        for side, limit in enumerate(limits):
            longest = max(sum(lengths[i][side] for i in row) for row in batch)
            assert longest <= padded[side] <= limit
            assert len(batch) * padded[side] <= rows * limit
    if layout == "fixed":
        assert all(len(batch) <= rows for batch in batches)


@given(steps(), LAYOUTS)
def test_no_layout_needs_more_rows_than_plain_rows(step: tuple[Lengths, tuple[int, ...], int], layout: Layout) -> None:
    lengths, limits, rows = step
    batches, plain = arrange(lengths, layout, rows, limits, STARTING), arrange(lengths, "fixed", rows, limits, STARTING)
    assert rows_of(batches) <= rows_of(plain)
    assert len(plain) == ceil(len(lengths) / rows)


@given(steps(), st.integers(0, 500))
def test_sorted_is_the_cheapest_cut_of_the_samples_by_falling_length(
    step: tuple[Lengths, tuple[int, ...], int], starting: int
) -> None:
    """Against all cuts there are."""
    lengths, limits, rows = step
    lengths = lengths[:9]
    order = sorted(range(len(lengths)), key=lambda i: (-sum(lengths[i]), i))

    def cost(batches: list[list[list[int]]]) -> int:
        return sum(starting + tokens(batch, lengths, limits) for batch in batches)

    def fits(batch: list[list[int]]) -> bool:
        padded = padded_lengths(batch, lengths, limits)
        return all(len(batch) * side <= rows * limit for side, limit in zip(padded, limits, strict=True))

    found = arrange(lengths, "sorted", rows, limits, starting)
    places = range(1, len(order))
    cuts = [[0, *cut, len(order)] for n in range(len(order)) for cut in combinations(places, n)]
    ways = [[[[i] for i in order[a:b]] for a, b in pairwise(cut)] for cut in cuts]
    cheapest = min((cost(way) for way in ways if all(map(fits, way))), default=0)
    assert cost(found) == cheapest


def test_rows_of_two_sides_are_cut_where_one_side_would_pad_the_other() -> None:
    """Short questions, answers of all lengths: in one micro-batch the last row would be padded to the first."""
    lengths = [(8 + (i * 29) % 40, 10 + (i * i * 37) % 180) for i in range(32)]
    real, limits = sum(map(sum, lengths)), (192, 192)
    batches = arrange(lengths, "packed", 32, limits, STARTING)
    whole = [[row for batch in batches for row in batch]]
    assert len(batches) > 1
    assert sum(tokens(batch, lengths, limits) for batch in batches) < 1.2 * real < tokens(whole[0], lengths, limits)


@given(steps())
def test_packed_rows_have_no_two_that_would_go_into_one(step: tuple[Lengths, tuple[int, ...], int]) -> None:
    """Not by their first samples: best fit opens a row only for what no other can take."""
    lengths, limits, rows = step
    packed = [row for batch in arrange(lengths, "packed", rows, limits, STARTING) for row in batch]
    for one, other in combinations(packed, 2):
        joined = [*one, other[-1]] if len(other) == 1 else None
        if joined:
            assert any(sum(lengths[i][side] for i in joined) > limits[side] for side in range(len(limits)))


def test_chat_lengths_fill_their_rows() -> None:
    """Mean 60 of 512 tokens, many short and few long: plain rows are mostly padding, packed ones hardly."""
    lengths = [(8 + (i * i * 37) % 160 + (300 if i % 40 == 0 else 0),) for i in range(240)]
    real = sum(length for (length,) in lengths)
    shares = {
        layout: real / sum(tokens(batch, lengths, (512,)) for batch in arrange(lengths, layout, 16, (512,), STARTING))
        for layout in ("packed", "sorted", "fixed")
    }
    assert shares["packed"] > 0.97
    assert shares["sorted"] > 0.8
    assert shares["fixed"] < 0.5


@pytest.mark.parametrize("layout", ["packed", "sorted", "fixed"])
def test_no_samples_are_no_micro_batches_and_the_same_samples_are_laid_out_alike(layout: Layout) -> None:
    assert arrange([], layout, 4, (32,), STARTING) == []
    lengths = [((i * 29) % 32 + 1,) for i in range(40)]
    assert arrange(lengths, layout, 4, (32,), STARTING) == arrange(lengths, layout, 4, (32,), STARTING)


def test_a_step_of_thousands_is_packed_as_well() -> None:
    lengths = [((i * 7919) % 500 + 8,) for i in range(4000)]
    assert rows_of(arrange(lengths, "packed", 8, (512,), STARTING)) < 1.01 * sum(length for (length,) in lengths) / 512
