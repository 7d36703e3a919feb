"""A plan's two curves in a terminal of 80 columns: letters that every console has, no colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from rich.markup import escape

from autotune.plan import Plan
from cli.render.console import out
from cli.render.units import gib
from cli.report.charts import FAR, round_ticks, tick_labels

COLUMNS, ROWS = 62, 12
Marked = tuple[float, float, str]
"""Rows of a micro-batch, a value, and the letter that stands for it."""
LETTERS = "  # chosen, o measured, ~ predicted"


def print_curves(plan: Plan) -> None:
    """Print peak memory, with the budget, and speed over the rows of a micro-batch."""
    chosen, unit = plan.batching.micro_batch_size, 2**30 if plan.memory.budget_bytes >= 2**29 else 2**20
    peaks = [
        (row.micro_batch_size, row.peak_bytes / unit, _letter(row.micro_batch_size == chosen, row.peak_measured))
        for row in plan.sizes
    ]
    speeds = [
        (row.micro_batch_size, row.samples_per_second, _letter(row.micro_batch_size == chosen, row.speed_measured))
        for row in plan.sizes
        if row.samples_per_second
    ]
    name = "GiB" if unit == 2**30 else "MiB"
    out.print(f"\n[bold]Peak of a micro-batch, {name}[/]")
    out.print(f"{LETTERS}, = the budget of {gib(plan.memory.budget_bytes)}")
    _print(draw(peaks, plan.memory.budget_bytes / unit))
    if speeds:
        out.print(f"\n[bold]Samples a second[/]\n{LETTERS}")
        _print(draw(speeds))


def _letter(is_chosen: bool, is_measured: bool) -> str:
    return "#" if is_chosen else "o" if is_measured else "~"


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        out.print(escape(line))


def draw(points: Sequence[Marked], rule: float | None = None) -> list[str]:
    """Return a chart of ASCII letters: x by its logarithm, dots between points, `=` for the rule they are held against.

    A rule far above all points is not drawn, and said.
    """
    top = max(y for _, y, _ in points)
    near = rule is not None and rule <= FAR * top
    ticks = round_ticks(0.0, max(top, rule if near and rule else 0.0), 5)
    labels = tick_labels(ticks)
    left = max(map(len, labels))
    grid = [[" "] * COLUMNS for _ in range(ROWS + 1)]
    at = [(_column(x, points), _row(y, ticks[-1]), letter) for x, y, letter in points]
    if near and rule is not None:
        grid[_row(rule, ticks[-1])] = ["="] * COLUMNS
    for (x0, y0, _), (x1, y1, _) in pairwise(at):
        for x in range(x0 + 1, x1):
            grid[round(y0 + (y1 - y0) * (x - x0) / (x1 - x0))][x] = "."
    for x, y, letter in at:
        grid[y][x] = letter
    named = {_row(tick, ticks[-1]): label for tick, label in zip(ticks, labels, strict=True)}
    lines = [f"{named.get(i, ''):>{left}} |{''.join(row)}".rstrip() for i, row in enumerate(grid)]
    lines += [" " * left + " +" + "-" * COLUMNS, " " * (left + 2) + _named_below(points, at) + "  rows"]
    return lines + ([] if near or rule is None else [" " * (left + 2) + "(= is far above this chart)"])


def _column(x: float, points: Sequence[Marked]) -> int:
    low, high = math.log(points[0][0]), math.log(points[-1][0])
    return 2 + round((math.log(x) - low) / ((high - low) or 1.0) * (COLUMNS - 6))


def _row(y: float, top: float) -> int:
    return round(ROWS * (1 - y / top))


def _named_below(points: Sequence[Marked], at: Sequence[tuple[int, int, str]]) -> str:
    """Return the rows of each point under it, where there is room; of the chosen one in any case."""
    line = [" "] * (COLUMNS + 4)
    for (x, _, _), (column, _, _) in sorted(zip(points, at, strict=True), key=lambda both: both[0][2] != "#"):
        said = f"{x:g}"
        start = max(1, column - len(said) // 2)
        if not "".join(line[start - 1 : start + len(said) + 1]).strip():
            line[start : start + len(said)] = said
    return "".join(line).rstrip()
