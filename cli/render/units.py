"""Numbers as people read them."""

from __future__ import annotations

import math

GIB = 2**30
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def gib(size: int | None) -> str:
    """Render bytes as GiB."""
    return "-" if size is None else f"{size / GIB:.2f} GiB"


def size(held: int) -> str:
    """Render bytes in the largest unit of which there is one."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if held >= unit:
            return f"{held / unit:.1f} {name}"
    return f"{held} B"


def rate(per_second: float, unit: str) -> str:
    """Render a rate by powers of ten: 59.5 TFLOP/s, 18.2 GB/s."""
    power, prefix = next((known for known in PREFIXES if per_second >= known[0]), PREFIXES[-1])
    value = per_second / power
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {prefix}{unit}"


def number(value: float | None, how: str) -> str:
    """Render a number that need not be one: a loss may overflow."""
    return "not finite" if value is None else format(value, how)


def count(number: int, noun: str) -> str:
    """Render a number of things: 1 row, 3,000 rows."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def duration(seconds: float) -> str:
    """Render a time as people say it: 42 s, 3 min, 2 h 10 min, 4 d 3 h; - where it is no number."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def fine_duration(seconds: float) -> str:
    """Render a time of which seconds matter: 42 s, 4 min 18 s, 2 h 10 min, 4 d 3 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    return f"{seconds // 60} min {seconds % 60} s" if seconds < 3600 else duration(seconds)


def short_duration(seconds: float) -> str:
    """Render a time in six characters: 42 s, 3.5 m, 2.2 h, 4.1 d."""
    for unit, name, until in ((1, "s", 90), (60, "m", 5400), (3600, "h", 172_800)):
        if seconds < until:
            return f"{seconds:.0f} s" if unit == 1 else f"{seconds / unit:.1f} {name}"
    return f"{seconds / 86_400:.1f} d"


def predicted(*, measured: bool) -> str:
    """Mark what was not measured."""
    return "" if measured else " ~"
