"""What a layout makes of lengths: the micro-batches of a step, and their padding. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import ceil
from random import Random
from typing import NamedTuple

from autotune.batching import PADDING_MULTIPLE, balanced_cuts, largest_share
from autotune.errands import DataSummary
from autotune.plan import Batching, Layout, Workload

SIMULATED_STEPS = 8
"""Laid out to know what a layout makes of the lengths there are."""
Histogram = Sequence[tuple[int, int]]
"""Length in tokens and how many samples have it, rising by length."""


def expected_longest(histogram: Histogram, draws: int) -> float:
    """Return the mean length of the longest of so many samples drawn at random.

    E[max] = sum over lengths l of l (F(l)^n - F(l-)^n), with F the share of samples no longer than l.
    """
    total = sum(count for _, count in histogram)
    shares, seen = [0.0], 0
    for _, count in histogram:
        seen += count
        shares.append(seen / total)
    return sum(
        length * (above**draws - below**draws)
        for (length, _), (below, above) in zip(histogram, pairwise(shares), strict=True)
    )


def rounded(histogram: Histogram, multiple: int, limit: int) -> Histogram:
    """Round lengths up to what a micro-batch is padded to."""
    return [(min(ceil(length / multiple) * multiple, limit), count) for length, count in histogram]


class StepShape(NamedTuple):
    """What a rank computes on in a step of its whole share, as is to be expected."""

    micro_batches: float
    padded_tokens: float
    """Of all of them together."""


def expected_shape(
    lengths: Sequence[Histogram], layout: Layout, limits: tuple[int, ...], rows: int, share: int, starting_tokens: float
) -> StepShape:
    """Say what a layout makes of samples of these lengths, given by side.

    Plain rows by the expected length of the longest of so many; other layouts by laying out a few steps of samples
    drawn at random, the sides of each drawn apart.
    """
    if layout == "fixed":
        return plain_shape([rounded(h, PADDING_MULTIPLE, m) for h, m in zip(lengths, limits, strict=True)], rows, share)
    from autotune.layout import arrange, padded_lengths  # loads numpy

    batches = padded = 0
    for samples in _drawn_steps(lengths, share):
        arranged = arrange(samples, layout, rows, limits, starting_tokens)
        batches += len(arranged)
        padded += sum(len(batch) * sum(padded_lengths(batch, samples, limits)) for batch in arranged)
    return StepShape(batches / SIMULATED_STEPS, padded / SIMULATED_STEPS)


def most_packed_rows(lengths: Sequence[Histogram], limits: tuple[int, ...], share: int) -> int:
    """Return the rows that a step of packed samples takes at most, of a few drawn at random."""
    from autotune.layout import arrange  # loads numpy

    steps = (arrange(samples, "packed", share, limits, 0) for samples in _drawn_steps(lengths, share))
    return max(sum(map(len, step)) for step in steps)


def _drawn_steps(lengths: Sequence[Histogram], share: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield the lengths of a few steps' samples; the sides of each are drawn apart."""
    random = Random(0)
    for _ in range(SIMULATED_STEPS):
        drawn = [random.choices([n for n, _ in side], [count for _, count in side], k=share) for side in lengths]
        yield list(zip(*drawn, strict=True))


def plain_shape(lengths: Sequence[Histogram], rows: int, share: int) -> StepShape:
    """Say what plain rows come to, each micro-batch padded to its longest."""
    cuts = balanced_cuts(share, rows)
    return StepShape(len(cuts), sum(n * expected_longest(side, n) for n in cuts for side in lengths))


def step_shape(data: DataSummary, workload: Workload, batching: Batching) -> StepShape:
    """Say what a rank computes on in a step on this data."""
    share = largest_share(min(data.samples, batching.effective_batch_size), batching.world_size)
    return expected_shape(
        data.lengths, workload.layout, workload.limits, batching.micro_batch_size, share, workload.starting_tokens
    )


def padding_share(
    data: DataSummary, layout: Layout, limits: tuple[int, ...], rows: int, share: int, starting_tokens: float
) -> float:
    """Return the share of padding in what a rank computes on, in a step of so many samples of this data."""
    padded_tokens = expected_shape(data.lengths, layout, limits, rows, share, starting_tokens).padded_tokens
    return max(0.0, 1 - data.tokens / data.samples * share / padded_tokens)


def expect(batching: Batching, data: DataSummary | None, workload: Workload) -> Batching:
    """Return the batching with the micro-batches that a step is expected to take on this data."""
    if data is None:
        return batching
    expected = step_shape(data, workload, batching).micro_batches
    return batching.model_copy(update={"expected_micro_batches_per_step": expected})
