"""Charts as SVG: numbers and names in, markup out. Pure: knows no run, no plan, no file.

Each is drawn twice, for wide and for narrow places, as letters must not shrink with a drawing; the page's style shows
one of the two. What tells series apart is dash and shape of mark, and colour only beside it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from cli.report.text import escaped

Point = tuple[float, float]
MOST_POINTS = 600
"""Of a line: more than there are pixels to draw them on."""
HITS = 60
"""Places along a long line where its values can be read by pointing at them."""
MANY = 25
"""Points from which on marks would hide the line that they are on."""
FAR = 2.5
"""A rule beyond so many times the largest value is not drawn, but told: it would press all else flat."""
TINY, HUGE = 1e-300, 1e300
"""What is nearer to nothing, or further from it, has no room for ticks around it."""
LONG = 1e15
"""From here on a number is written by its power of ten."""
EMPTY = '<p class="empty">No numbers yet.</p>'
DIGIT = 7.0
"""Width of a digit in the page's font."""


class Shape(NamedTuple):
    """A place to draw in, in pixels."""

    name: str
    width: int
    height: int
    x_ticks: int
    y_ticks: int


SHAPES = (Shape("wide", 600, 270, 8, 6), Shape("narrow", 330, 240, 5, 5))
TOP, BOTTOM, RIGHT = 24, 42, 12


@dataclass(frozen=True)
class Axis:
    """What is along one side; the title names the unit."""

    title: str
    log: bool = False
    at: tuple[float, ...] = ()
    """Where its ticks stand; else at round numbers."""
    covers: tuple[float, ...] = ()
    """Values that it reaches in any case."""
    most: float = math.inf
    """Where it ends: what is above is drawn on its edge."""


@dataclass(frozen=True)
class Series:
    """Points in the order of x; one that is not finite is a gap."""

    name: str
    """Empty for one that goes without saying."""
    points: Sequence[Point]
    look: str
    """Classes of the page's style: colour `c0` to `c5`, dash `d1` to `d4`, `faint`, `plan`."""
    mark: str = ""
    """Shape at each point: circle, ring, square, diamond, triangle, cross. Empty for none."""
    line: bool = True
    marks: int = 0
    """So many marks at most, evenly along the line; 0 for one at each point."""


@dataclass(frozen=True)
class Rule:
    """A value that others are held against: across the chart, or, of x, from its top to its bottom."""

    name: str
    at: float
    look: str
    upright: bool = False


class Scale(NamedTuple):
    """Values of an axis onto pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, at = (math.log10(v) for v in (self.low, self.high, value)) if self.log else (*self[:2], value)
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers, equally far apart, from at or below `low` to at or above `high`: about `most`, no more.

    Their distance is 1, 2 or 5 times a power of ten.
    """
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-9 * largest, TINY):
        spread = largest / 10 if largest > TINY else 1.0
        low, high = low - spread, high + spread
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (m * power * ten for ten in (1, 10, 100) for m in (1, 2, 5)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first + 1 <= most:
            break
    return [tick * step for tick in range(first, max(last, first + 1) + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return ticks as people read them, all with the digits that tell them apart."""
    largest = max(map(abs, ticks))
    step = min((abs(b - a) for a, b in pairwise(ticks)), default=largest) or 1.0
    if 0 < largest < 1e-3 or largest >= LONG:
        return [_scientific(tick) if tick else "0" for tick in ticks]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick + 0.0:,.{digits}f}" for tick in ticks]


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return points that draw the same line: of each column of pixels the least and the greatest, and one gap, if any.

    The first and the last stay, too; those that are few enough stay all.
    """
    if len(points) <= most:
        return list(points)
    first, last = points[0][0], points[-1][0]
    per_column = (most // 2) / ((last - first) or 1.0)
    columns: dict[int, list[int]] = {}
    for i, (x, _) in enumerate(points):
        columns.setdefault(int((x - first) * per_column), []).append(i)
    kept = {0, len(points) - 1}
    for column in columns.values():
        finite = [i for i in column if math.isfinite(points[i][1])]
        kept |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])} if finite else set()
        if len(finite) < len(column):
            kept.add(next(i for i in column if not math.isfinite(points[i][1])))
    return [points[i] for i in sorted(kept)]


def smooth(points: Sequence[Point], width: int) -> list[Point]:
    """Return the mean of so many points around each, gaps left out; a gap where all are."""
    return smooth_rate([x for x, _ in points], [y for _, y in points], [1.0] * len(points), width)


def smooth_rate(at: Sequence[float], amounts: Sequence[float], per: Sequence[float], width: int) -> list[Point]:
    """Return what so many amounts around each come to, over what all of them were taken in: a mean of rates is none.

    Where one of the two is no number, both are left out; a gap where nothing is left.
    """
    known = [math.isfinite(amount) and 0 <= taken < math.inf for amount, taken in zip(amounts, per, strict=True)]
    above, below = (
        _sums_around([value if is_known else 0.0 for value, is_known in zip(values, known, strict=True)], width // 2)
        for values in (amounts, per)
    )
    return [(x, a / b if b else math.nan) for x, a, b in zip(at, above, below, strict=True)]


def _sums_around(values: Sequence[float], reach: int) -> list[float]:
    """Return the sum of the values up to so far before and after each.

    Only adds, in blocks that a window touches two of at most: beside one huge value, a difference of long sums has no
    digits left for the others.
    """
    block, last = 2 * reach + 1, len(values) - 1
    heads, tails = list(values), list(values)
    """Of each block, the sums from its beginning on, and up to its end."""
    for i in range(1, len(values)):
        if i % block:
            heads[i] += heads[i - 1]
    for i in range(last - 1, -1, -1):
        if (i + 1) % block:
            tails[i] += tails[i + 1]
    sums = []
    for i in range(len(values)):
        low, high = max(0, i - reach), min(last, i + reach)
        if low % block == 0:
            sums.append(heads[high])
        else:
            sums.append(tails[low] + (heads[high] if high // block > low // block else 0.0))
    return sums


def chart(label: str, x: Axis, y: Axis, series: Sequence[Series], rules: Sequence[Rule] = ()) -> str:
    """Draw lines and points over axes, with a legend where there is more than one thing; says so if there is nothing.

    `label` is the chart in a sentence, for those who do not see it.
    """
    thinned = [(replace(one, points=thin(one.points)), one) for one in series]
    kept = [(one, whole) for one, whole in thinned if any(_is_drawn(p, x, y) for p in one.points)]
    if not kept:
        return EMPTY
    series = [one for one, _ in kept]
    top = min(y.most, max(p[1] for one in series for p in one.points if _is_drawn(p, x, y)))
    near = [rule for rule in rules if rule.upright or rule.at <= FAR * top]
    frame = _Frame(x, y, series, [whole for _, whole in kept], near)
    drawings = [svg(label, shape, frame.draw(shape)) for shape in SHAPES]
    return "".join(drawings) + _legend(series, rules, near)


def _is_drawn(point: Point, x: Axis, y: Axis) -> bool:
    return all(abs(v) < HUGE and (v > TINY or not axis.log) for v, axis in zip(point, (x, y), strict=True))


@dataclass(frozen=True)
class _Frame:
    """Axes, and what is drawn between them."""

    x: Axis
    y: Axis
    series: Sequence[Series]
    """Thinned: of each column of pixels what is drawn of it."""
    whole: Sequence[Series]
    """As they were given, in the same order."""
    rules: Sequence[Rule]

    def draw(self, shape: Shape) -> str:
        xs = [*self.x.covers, *(r.at for r in self.rules if r.upright), *self._values(0)]
        ys = [*self.y.covers, *(r.at for r in self.rules if not r.upright), *map(self._height, self._values(1))]
        y_ticks = _ticks(self.y, min(ys), max(ys), shape.y_ticks)
        y_labels = tick_labels(y_ticks) if not self.y.log else [_short(tick) for tick in y_ticks]
        left = max(map(len, y_labels)) * DIGIT + 12
        low, high = _widened(min(xs), max(xs), log=self.x.log)
        across = Scale(low, high, left + 6 * bool(self.x.at), shape.width - RIGHT - 6 * bool(self.x.at), self.x.log)
        up = Scale(y_ticks[0], y_ticks[-1], shape.height - BOTTOM, TOP, self.y.log)
        parts = [
            y_side(self.y.title, y_ticks, y_labels, up, left, shape),
            x_side(self.x, across, left, shape),
            *(_rule(rule, across, up, left, shape) for rule in self.rules),
            *(self._line(one, across, up) for one in self.series if one.line),
            self._hits(across, shape) if shape.name == "wide" else "",
            *(self._marks(one, across, up) for one in self.series if one.mark),
        ]
        return "".join(parts)

    def _height(self, value: float) -> float:
        """Return where a value is drawn, in values."""
        return min(value, self.y.most)

    def _values(self, side: int) -> Iterable[float]:
        return [p[side] for one in self.series for p in one.points if _is_drawn(p, self.x, self.y)]

    def _line(self, one: Series, across: Scale, up: Scale) -> str:
        words, broken = [], True
        for point in one.points:
            if not _is_drawn(point, self.x, self.y):
                broken = True
                continue
            at = f"{across(point[0]):.1f} {up(self._height(point[1])):.1f}"
            # A line of no length: its round end shows a point that stands alone.
            words.append(f"M{at}h0" if broken else f"L{at}")
            broken = False
        return f'<path class="line {one.look}" d="{"".join(words)}"><title>{escaped(one.name)}</title></path>'

    def _marks(self, one: Series, across: Scale, up: Scale) -> str:
        marks = []
        points = [point for point in one.points if _is_drawn(point, self.x, self.y)]
        for x, y in points[:: -(-len(points) // one.marks) if one.marks and points else 1]:
            said = f"{one.name}: {number(y)} {self.y.title} at {number(x)} {self.x.title}"
            marks.append(mark(one.mark, across(x), up(self._height(y)), one.look, said))
        return "".join(marks)

    def _hits(self, across: Scale, shape: Shape) -> str:
        """Return bands that tell, when pointed at, what the long lines come to there."""
        lines = [one for one in self.whole if one.line and len(one.points) > HITS // 2]
        if not lines:
            return ""
        places = [[x for x, _ in one.points] for one in lines]
        width, bands = (across.end - across.start) / HITS, []
        for i in range(HITS):
            x = across.low + (across.high - across.low) * (i + 0.5) / HITS
            said = []
            for one, xs in zip(lines, places, strict=True):
                nearest = min(bisect_left(xs, x), len(xs) - 1)
                if abs(xs[nearest] - x) <= 2 * (across.high - across.low) / HITS:
                    value = one.points[nearest][1]
                    said.append(f"{one.name} {number(value)}")
            if said:
                title = escaped(f"{self.x.title} {number(x)}: {'; '.join(said)}")
                bands.append(
                    f'<rect class="hit" x="{across.start + i * width:.1f}" y="{TOP}" width="{width:.1f}" '
                    f'height="{shape.height - TOP - BOTTOM}"><title>{title}</title></rect>'
                )
        return "".join(bands)


def number(value: float) -> str:
    """Return a value as a tooltip has it."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def _widened(low: float, high: float, *, log: bool) -> tuple[float, float]:
    largest = max(abs(low), abs(high))
    if high - low > 1e-9 * largest:
        return low, high
    spread = max(0.5, largest / 1000)
    return (low / 2, high * 2) if log else (low - spread, high + spread)


def _ticks(axis: Axis, low: float, high: float, most: int) -> list[float]:
    if not axis.log:
        return round_ticks(low, high, most)
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    step = -(-max(1, last - first) // (most - 1))
    return [10.0**power for power in range(first, max(last, first + 1) + step, step)]


def _short(value: float) -> str:
    return f"{value:,g}" if 1e-3 <= value < 1e5 else _scientific(value)


def svg(label: str, shape: Shape, inner: str) -> str:
    """Return a drawing for one of the places, named for those who do not see it."""
    size = f"0 0 {shape.width} {shape.height}"
    return f'<svg class="{shape.name}" viewBox="{size}" role="img" aria-label="{escaped(label)}">{inner}</svg>'


def y_side(title: str, ticks: Sequence[float], labels: Sequence[str], up: Scale, left: float, shape: Shape) -> str:
    """Draw the left side: ticks, lines across at each, and the title above."""
    lines = [
        f'<line class="grid" x1="{left:.1f}" x2="{shape.width - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        f'<text class="tick" x="{left - 6:.1f}" y="{up(tick) + 4:.1f}" text-anchor="end">{said}</text>'
        for tick, said in zip(ticks, labels, strict=True)
    ]
    return "".join(lines) + f'<text class="title" x="0" y="12">{escaped(title)}</text>'


def x_side(axis: Axis, across: Scale, left: float, shape: Shape) -> str:
    """Draw the lower side: ticks that have room for their labels."""
    bottom = shape.height - BOTTOM
    if axis.at:
        ticks = [tick for tick in axis.at if across.low <= tick <= across.high]
    else:
        ticks = [t for t in round_ticks(across.low, across.high, shape.x_ticks) if across.low <= t <= across.high]
    parts, free = [], -math.inf
    for tick, said in zip(ticks, _x_labels(axis, ticks), strict=True):
        at, half = across(tick), len(said) * DIGIT / 2
        middle = min(max(at, half), shape.width - half)
        if middle - half < free:
            continue
        free = middle + half + DIGIT
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
            f'<text class="tick" x="{middle:.1f}" y="{bottom + 17}" text-anchor="middle">{said}</text>'
        )
    base = f'<line class="axis" x1="{left:.1f}" x2="{shape.width - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    title = f'<text class="title" x="{shape.width - RIGHT}" y="{bottom + 35}" text-anchor="end">'
    return f"{base}{''.join(parts)}{title}{escaped(axis.title)}</text>"


def _x_labels(axis: Axis, ticks: Sequence[float]) -> list[str]:
    return [f"{tick:,g}" for tick in ticks] if axis.at else tick_labels(ticks) if ticks else []


def _rule(rule: Rule, across: Scale, up: Scale, left: float, shape: Shape) -> str:
    if rule.upright:
        ends = f'x1="{across(rule.at):.1f}" x2="{across(rule.at):.1f}" y1="{TOP}" y2="{shape.height - BOTTOM}"'
    else:
        ends = f'x1="{left:.1f}" x2="{shape.width - RIGHT}" y1="{up(rule.at):.1f}" y2="{up(rule.at):.1f}"'
    return f'<line class="rule {rule.look}" {ends}><title>{escaped(rule.name)}</title></line>'


MARKS: dict[str, Callable[[float, float], str]] = {
    "circle": lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"',
    "ring": lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"',
    "square": lambda x, y: f'<rect x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2"',
    "diamond": lambda x, y: f'<path d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"',
    "triangle": lambda x, y: f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z"',
    "cross": lambda x, y: f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"',
}
HOLLOW = ("ring", "cross", "triangle")


def mark(shape: str, x: float, y: float, look: str, said: str) -> str:
    """Draw the mark of a point."""
    kind = "hollow" if shape in HOLLOW else "solid"
    named = f"><title>{escaped(said)}</title></{MARKS[shape](x, y)[1:].split(' ', 1)[0]}>" if said else "/>"
    return f'{MARKS[shape](x, y)} class="mark {kind} {look}"{named}'


def _legend(series: Sequence[Series], rules: Sequence[Rule], near: Sequence[Rule]) -> str:
    if len(series) + len(rules) < 2:
        return ""
    items = [(swatch(one.look if one.line else "", one.mark, one.look), one.name) for one in series if one.name]
    items += [
        (swatch(f"rule {rule.look}"), rule.name if rule in near else f"{rule.name}, above this chart") for rule in rules
    ]
    return legend(items)


def legend(items: Iterable[tuple[str, str]]) -> str:
    """Return what is what: swatches with their names."""
    return f'<ul class="legend">{"".join(f"<li>{swatch}{escaped(name)}</li>" for swatch, name in items)}</ul>'


def swatch(line: str, shape: str = "", look: str = "") -> str:
    """Return what stands for a series in a legend: its line, its mark, or both."""
    drawn = f'<line class="line {line}" x1="1" x2="31" y1="7" y2="7"/>' if line else ""
    drawn += mark(shape, 16, 7, look, "") if shape else ""
    return f'<svg class="swatch" viewBox="0 0 32 14" aria-hidden="true">{drawn}</svg>'
