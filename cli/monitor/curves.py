"""A curve of any length in a few points, taken in as it grows. Pure."""

from __future__ import annotations

import math
from array import array
from typing import NamedTuple

MOST_POINTS = 120


class Point(NamedTuple):
    """The mean over a stretch of steps."""

    step: int
    """The last of them."""
    value: float


class Curve:
    """Means over stretches of equal length, at most so many, an even number: when they are more, two become one."""

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most, self._stride = most, 1
        self._sums, self._counts, self._ends = array("d"), array("l"), array("d")
        self._rows = 0
        self._points: tuple[Point, ...] | None = ()
        """None when they are to be made anew."""

    def add(self, step: float, value: float) -> None:
        """Take in a step; one whose value is no number only moves on."""
        if self._rows % self._stride == 0:
            if len(self._sums) == self._most:
                self._halve()
            self._append(0.0, 0, step)
        self._rows, self._points = self._rows + 1, None
        self._ends[-1] = step
        if math.isfinite(value):
            self._sums[-1] += value
            self._counts[-1] += 1

    def points(self) -> tuple[Point, ...]:
        """Return the means, in the order of steps; a stretch without a number has none."""
        if self._points is None:
            stretches = zip(self._ends, self._sums, self._counts, strict=True)
            self._points = tuple(Point(int(end), total / count) for end, total, count in stretches if count)
        return self._points

    def _append(self, total: float, count: int, end: float) -> None:
        self._sums.append(total)
        self._counts.append(count)
        self._ends.append(end)

    def _halve(self) -> None:
        sums, counts, ends = self._sums, self._counts, self._ends
        self._sums, self._counts, self._ends = array("d"), array("l"), array("d")
        for i in range(0, len(sums), 2):
            self._append(sum(sums[i : i + 2]), sum(counts[i : i + 2]), ends[i + 1])
        self._stride *= 2
