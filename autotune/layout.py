"""Which samples of a step share a micro-batch, and which of them a row. Pure.

Layout `fixed`: a row is a sample, in the order of the epoch. `sorted`: a row is a sample. `packed`: samples share rows,
as many as fit. In these two rows of like length are together, cut where starting another micro-batch costs less than
the padding it saves. None changes which samples a step takes, or their loss; none makes a micro-batch larger than
`rows` rows of full length.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from math import ceil

import numpy as np

from autotune.batching import PADDING_MULTIPLE, balanced_cuts
from autotune.plan import Layout

Lengths = Sequence[tuple[int, ...]]
"""Tokens of each sample by side: of the sequence, or of source and target."""
Row = list[int]
"""Samples, by their place among the lengths, one after the other."""


def arrange(
    lengths: Lengths, layout: Layout, rows: int, limits: tuple[int, ...], starting_tokens: float
) -> list[list[Row]]:
    """Lay out the samples of a step: micro-batches of rows, none over `rows` rows of the limits' tokens on any side.

    No samples give no micro-batch. Those of `fixed` differ by one row at most.
    """
    if layout == "packed":
        return _cut(_pack(lengths, limits), lengths, rows, limits, starting_tokens)
    alone = [[i] for i in range(len(lengths))]
    if layout == "sorted":
        return _cut(alone, lengths, rows, limits, starting_tokens)
    batches, start = [], 0
    for size in balanced_cuts(len(alone), rows):
        batches.append(alone[start : start + size])
        start += size
    return batches


def padded_lengths(batch: Sequence[Row], lengths: Lengths, limits: tuple[int, ...]) -> tuple[int, ...]:
    """Return what the rows of a micro-batch are padded to, by side."""
    longest = [max(sum(lengths[i][side] for i in row) for row in batch) for side in range(len(limits))]
    return tuple(padded(length, limit) for length, limit in zip(longest, limits, strict=True))


def padded(length: int, limit: int) -> int:
    """Return what a row of so many tokens is padded to."""
    return min(ceil(length / PADDING_MULTIPLE) * PADDING_MULTIPLE, limit)


def _pack(lengths: Lengths, limits: tuple[int, ...]) -> list[Row]:
    """Put each sample, the longest first, into the row that it leaves the least room in: best fit decreasing."""
    order = sorted(range(len(lengths)), key=lambda i: (-sum(lengths[i]), i))
    least = tuple(min((sample[side] for sample in lengths), default=0) for side in range(len(limits)))
    packed: list[Row] = []
    rooms: list[tuple[int, ...]] = []
    """Of each row, by side."""
    open_rows: list[tuple[int, int]] = []
    """Room of all sides together, and the row: rising, of those that can still take a sample."""
    for i in order:
        sample = lengths[i]
        at = bisect_left(open_rows, (sum(sample), -1))
        while at < len(open_rows) and not _fits(sample, rooms[open_rows[at][1]]):
            at += 1
        if at < len(open_rows):
            row = open_rows.pop(at)[1]
        else:
            row = len(packed)
            packed.append([])
            rooms.append(limits)
        packed[row].append(i)
        rooms[row] = tuple(r - s for r, s in zip(rooms[row], sample, strict=True))
        if _fits(least, rooms[row]):
            insort(open_rows, (sum(rooms[row]), row))
    return packed


def _fits(sample: tuple[int, ...], room: tuple[int, ...]) -> bool:
    return all(s <= r for s, r in zip(sample, room, strict=True))


def _cut(
    laid: Sequence[Row], lengths: Lengths, rows: int, limits: tuple[int, ...], starting_tokens: float
) -> list[list[Row]]:
    """Cut rows of falling length where the sum of (starting tokens + padded tokens) of all micro-batches is least.

    An exact dynamic programme over the sorted rows: the best way to lay out the first n ends with some micro-batch.
    """
    if not laid:
        return []
    filled = [tuple(sum(lengths[i][side] for i in row) for side in range(len(limits))) for row in laid]
    order = sorted(range(len(laid)), key=lambda at: (-sum(filled[at]), laid[at][0]))
    sides = np.array([[padded(n, m) for n, m in zip(filled[at], limits, strict=True)] for at in order])
    most = rows * np.array(limits)
    best = np.zeros(len(order) + 1)
    begins = np.zeros(len(order) + 1, np.int64)
    for end in range(1, len(order) + 1):
        # Of the micro-batches that end here: by how many samples they have, what each side is padded to.
        widths = np.maximum.accumulate(sides[:end][::-1])
        counts = np.arange(1, end + 1)
        costs = best[:end][::-1] + starting_tokens + counts * widths.sum(axis=1)
        costs[(counts[:, None] * widths > most).any(axis=1)] = np.inf
        taken = int(costs.argmin())
        best[end], begins[end] = costs[taken], end - taken - 1
    batches: list[list[Row]] = []
    end = len(order)
    while end:
        batches.append([laid[at] for at in order[begins[end] : end]])
        end = int(begins[end])
    return batches[::-1]
