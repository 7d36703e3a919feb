"""Bars as SVG, drawn as other charts are: one below another, end to end, or of a histogram. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cli.report.charts import (
    BOTTOM,
    DIGIT,
    EMPTY,
    RIGHT,
    SHAPES,
    TOP,
    Axis,
    Rule,
    Scale,
    Shape,
    legend,
    round_ticks,
    svg,
    swatch,
    tick_labels,
    x_side,
    y_side,
)
from cli.report.text import escaped


@dataclass(frozen=True)
class Bar:
    """A bar from one value to another, named above it."""

    name: str
    start: float
    end: float
    said: str
    look: str = "c0"


@dataclass(frozen=True)
class Bars:
    """Bars one below another, or, where they lie end to end, in one row."""

    unit: str
    bars: Sequence[Bar]
    rules: Sequence[Rule] = field(default=())
    in_one_row: bool = False
    least_high: float = 0.0
    """That the axis reaches at least."""


ROW, THICK = 40, 11
"""Of a bar under its name."""


def bars(label: str, made: Bars) -> str:
    """Draw bars over an axis that begins at nothing; rules stand upright."""
    if not made.bars:
        return EMPTY
    high = max([made.least_high, *(bar.end for bar in made.bars), *(rule.at for rule in made.rules)]) or 1.0
    drawn = "".join(_bars(label, made, high, shape) for shape in SHAPES)
    items = [(swatch(f"rule {rule.look}"), rule.name) for rule in made.rules]
    return drawn + (legend(items) if items else "")


def _bars(label: str, made: Bars, high: float, shape: Shape) -> str:
    across = Scale(0.0, high, 2, shape.width - RIGHT)
    if made.in_one_row:
        bottom = 8 + 2 * THICK
        parts = [_bar(bar, across, 8, 2 * THICK) for bar in made.bars]
    else:
        bottom = 8 + len(made.bars) * ROW
        parts = [_named_bar(bar, across, 8 + i * ROW) for i, bar in enumerate(made.bars)]
    parts += [
        f'<line class="rule {r.look}" x1="{across(r.at):.1f}" x2="{across(r.at):.1f}" y1="2" y2="{bottom}">'
        f"<title>{escaped(r.name)}</title></line>"
        for r in made.rules
    ]
    place = shape._replace(height=bottom + BOTTOM)
    return svg(label, place, "".join(parts) + x_side(Axis(made.unit), across, 2, place))


def _named_bar(bar: Bar, across: Scale, top: int) -> str:
    return (
        f'<text class="name" x="{across.start}" y="{top + 10}">{escaped(bar.name)}</text>'
        f'<text class="tick" x="{across.end}" y="{top + 10}" text-anchor="end">{escaped(bar.said)}</text>'
    ) + _bar(bar, across, top + 16, THICK)


def _bar(bar: Bar, across: Scale, top: int, thick: int) -> str:
    start, width = across(bar.start), max(across(bar.end) - across(bar.start), 1)
    at = f'x="{start:.1f}" y="{top}" width="{width:.1f}" height="{thick}"'
    return f'<rect class="bar {bar.look}" {at}><title>{escaped(f"{bar.name}: {bar.said}")}</title></rect>'


def histogram(label: str, x_title: str, y_title: str, columns: Sequence[tuple[int, int, int]]) -> str:
    """Draw how many there are between two values, each of (first, last, how many)."""
    most = max((count for _, _, count in columns), default=0)
    if not most:
        return EMPTY
    return "".join(svg(label, shape, _columns(x_title, y_title, columns, most, shape)) for shape in SHAPES)


def _columns(x_title: str, y_title: str, columns: Sequence[tuple[int, int, int]], most: int, shape: Shape) -> str:
    ticks = round_ticks(0.0, float(most), shape.y_ticks)
    labels = tick_labels(ticks)
    left = max(map(len, labels)) * DIGIT + 12
    across = Scale(0.0, float(columns[-1][1]), left, shape.width - RIGHT)
    up = Scale(0.0, ticks[-1], shape.height - BOTTOM, TOP)
    parts = [y_side(y_title, ticks, labels, up, left, shape), x_side(Axis(x_title), across, left, shape)]
    for low, high, count in columns:
        start, end = across(low - 1), across(high)
        said = escaped(f"{low:,} to {high:,} {x_title}: {count:,} {y_title}")
        parts.append(
            f'<rect class="bar c0" x="{start + 0.5:.1f}" y="{up(count):.1f}" width="{max(end - start - 1, 0.5):.1f}" '
            f'height="{up(0) - up(count):.1f}"><title>{said}</title></rect>'
        )
    return "".join(parts)
