"""Bytes, seconds and steps in the unit that a chart of them has. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cli.render.units import number
from cli.report.charts import HUGE, Point


def unit_of_bytes(largest: float) -> tuple[str, float]:
    """Return the unit that bytes up to so many are read in, and its bytes."""
    return ("GiB", 2.0**30) if largest >= 2**29 else ("MiB", 2.0**20)


def unit_of_seconds(longest: float) -> tuple[str, float]:
    """Return the unit that times up to so long are read in, and its seconds."""
    for name, seconds in (("hours", 3600.0), ("minutes", 60.0)):
        if longest >= 2 * seconds:
            return name, seconds
    return "seconds", 1.0


def scaled(points: Iterable[Point], unit: float) -> list[Point]:
    """Return points in a unit."""
    return [(x, y / unit) for x, y in points]


def percent(share: float) -> str:
    """Render a share as people read it."""
    return "under 1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def as_number(value: object) -> float:
    """Return a value of a row; nan for what is no number, or none that can be counted with."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < HUGE:
        return float(value)
    return math.nan


def figure_of(value: float, how: str, unit: str = "") -> str:
    """Render a number, with its unit; - where there is none."""
    return format(value, how) + unit if math.isfinite(value) else "-"


def loss(value: float, how: str = ".4f") -> str:
    """Render a loss, which may have overflowed."""
    return number(value if math.isfinite(value) else None, how)


def difference(real: float, planned: float) -> str:
    """Say by how much a plan was wrong: +3 %."""
    return f"{real / planned - 1:+.0%}".replace("%", " %") if planned and math.isfinite(real) else "-"
