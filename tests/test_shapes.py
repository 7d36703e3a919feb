"""Lengths and padding against brute force."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.shapes import Histogram, expected_longest, rounded

histograms = st.dictionaries(st.integers(1, 600), st.integers(1, 50), min_size=1, max_size=5).map(
    lambda counts: sorted(counts.items())
)
SLACK = 1e-9
"""Relative; sums of floats are not exact."""


def enumerated_longest(histogram: Histogram, draws: int) -> Fraction:
    """The mean of the longest, over all ways to draw with their chances."""
    total = sum(count for _, count in histogram)
    return sum(
        (
            max(length for length, _ in drawn) * prod((Fraction(count, total) for _, count in drawn), start=Fraction(1))
            for drawn in product(histogram, repeat=draws)
        ),
        start=Fraction(0),
    )


# The longest of some rows.


@given(histogram=histograms, draws=st.integers(1, 4))
def test_the_expected_longest_is_that_of_all_ways_to_draw(histogram: Histogram, draws: int) -> None:
    assert expected_longest(histogram, draws) == pytest.approx(float(enumerated_longest(histogram, draws)))


@given(histogram=histograms)
def test_the_expected_longest_of_one_draw_is_the_mean(histogram: Histogram) -> None:
    samples = sum(count for _, count in histogram)
    assert expected_longest(histogram, 1) == pytest.approx(sum(length * n for length, n in histogram) / samples)


@given(histogram=histograms, draws=st.integers(1, 300), more=st.integers(0, 300))
def test_more_draws_are_never_expected_to_be_shorter_nor_longer_than_the_longest_there_is(
    histogram: Histogram, draws: int, more: int
) -> None:
    fewer, many = expected_longest(histogram, draws), expected_longest(histogram, draws + more)
    assert fewer <= many * (1 + SLACK)
    assert many <= histogram[-1][0] * (1 + SLACK)


def test_many_draws_find_the_longest() -> None:
    assert expected_longest([(10, 99), (500, 1)], 10_000) == pytest.approx(500)


# Rounding up.


@given(histogram=histograms, multiple=st.integers(1, 64), spare=st.integers(0, 100))
def test_lengths_are_rounded_up_to_the_next_multiple_or_to_the_limit_and_no_sample_is_lost(
    histogram: Histogram, multiple: int, spare: int
) -> None:
    limit = histogram[-1][0] + spare
    result = rounded(histogram, multiple, limit)
    for (before, _), (after, _) in zip(histogram, result, strict=True):
        assert before <= after < before + multiple
        assert after % multiple == 0 or after == limit
    assert [count for _, count in result] == [count for _, count in histogram]
    assert result == sorted(result, key=lambda pair: pair[0])


@given(histogram=histograms, multiple=st.integers(1, 64), draws=st.integers(1, 100))
def test_lengths_that_became_equal_count_as_one(histogram: Histogram, multiple: int, draws: int) -> None:
    result = rounded(histogram, multiple, 600)
    merged: Counter[int] = Counter()
    for length, count in result:
        merged[length] += count
    assert expected_longest(result, draws) == pytest.approx(expected_longest(sorted(merged.items()), draws))


def test_lengths_are_rounded_to_8_but_not_over_the_limit() -> None:
    assert rounded([(1, 5), (8, 4), (9, 3), (99, 2), (100, 1)], 8, 100) == [(8, 5), (8, 4), (16, 3), (100, 2), (100, 1)]
