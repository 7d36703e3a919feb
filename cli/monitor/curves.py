"""A curve of any length in a few points, taken in as it grows. Pure."""

from __future__ import annotations

import math
from array import array
from typing import NamedTuple

MOST_POINTS = 120


class Point(NamedTuple):
    """The mean over a stretch of steps, or a rate over it: all that was done by all that it took."""

    step: int
    """The last of them."""
    value: float


class Curve:
    """Means over stretches of equal length, at most so many, an even number: when they are more, two become one."""

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most, self._stride = most, 1
        self._sums, self._parts, self._ends = array("d"), array("d"), array("d")
        self._rows = 0
        self._points: tuple[Point, ...] | None = ()
        """None when they are to be made anew."""

    def add(self, step: float, value: float, part: float = 1.0) -> None:
        """Take in a step, and what it is divided by: one, or a time; what is no number only moves on."""
        if self._rows % self._stride == 0:
            if len(self._sums) == self._most:
                self._halve()
            self._append(0.0, 0.0, step)
        self._rows, self._points = self._rows + 1, None
        self._ends[-1] = step
        if math.isfinite(value) and math.isfinite(part):
            self._sums[-1] += value
            self._parts[-1] += part

    def points(self) -> tuple[Point, ...]:
        """Return the means, in the order of steps; a stretch without a number has none."""
        if self._points is None:
            stretches = zip(self._ends, self._sums, self._parts, strict=True)
            points = (Point(int(end), total / parts) for end, total, parts in stretches if parts)
            self._points = tuple(point for point in points if math.isfinite(point.value))
        return self._points

    def _append(self, total: float, parts: float, end: float) -> None:
        self._sums.append(total)
        self._parts.append(parts)
        self._ends.append(end)

    def _halve(self) -> None:
        sums, parts, ends = self._sums, self._parts, self._ends
        self._sums, self._parts, self._ends = array("d"), array("d"), array("d")
        for i in range(0, len(sums), 2):
            self._append(sum(sums[i : i + 2]), sum(parts[i : i + 2]), ends[i + 1])
        self._stride *= 2
