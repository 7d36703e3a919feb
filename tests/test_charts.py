"""Charts: what is drawn is what there is, whatever the numbers and the names."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import facts
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cli.render.plot import COLUMNS, draw, print_curves
from cli.report.bars import Bar, Bars, bars, histogram
from cli.report.charts import (
    MOST_POINTS,
    Axis,
    Rule,
    Series,
    chart,
    round_ticks,
    smooth,
    smooth_rate,
    thin,
    tick_labels,
)
from cli.report.curves import loss_axis
from cli.report.page import Section, page, quoted, table
from cli.report.text import TURNING, escaped

VALUES = st.floats(-1e12, 1e12)
ANY = st.floats(-1e9, 1e9) | st.just(math.nan)
NAN = math.nan
HOSTILE = ("<script>", "</p>", "</style>", "<!--", "]]>", "&lt;", "&#60;b>", '"', "' onload='x", "\x00", "\x1b[2J",
           "\ud800", "\u202e", "\u2066", "\u2028", "`", "<img src=x>")  # fmt: skip
"""What is markup, ends it, or turns or hides what stands around it."""


class Seen(HTMLParser):
    """What a browser takes HTML for: its elements, their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.said = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.said += data


@given(VALUES, VALUES, st.integers(3, 12))
def test_ticks_cover_the_range_and_are_round_and_few(a: float, b: float, most: int) -> None:
    low, high = min(a, b), max(a, b)
    ticks = round_ticks(low, high, most)
    near = 1e-6 * max(ticks[-1] - ticks[0], abs(low), abs(high))
    assert ticks[0] <= low + near
    assert ticks[-1] >= high - near
    assert 2 <= len(ticks) <= most
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    assert f"{step:.6e}"[:8] in ("1.000000", "2.000000", "5.000000")


@given(VALUES, VALUES)
def test_labels_of_ticks_tell_them_apart(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    if high - low > 1e-6 * max(abs(low), abs(high)) or high == low:
        labels = tick_labels(round_ticks(low, high, 6))
        assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1.43, ["0.0", "0.5", "1.0", "1.5"]),
        (0, 20_000, ["0", "5,000", "10,000", "15,000", "20,000"]),
        (0, 1e-4, ["0", "2e-5", "4e-5", "6e-5", "8e-5", "1e-4"]),
        (7.1, 8.9, ["7.0", "7.5", "8.0", "8.5", "9.0"]),
        (3, 3, ["2.6", "2.8", "3.0", "3.2", "3.4"]),
    ],
)
def test_ticks_are_what_a_person_would_write(low: float, high: float, labels: list[str]) -> None:
    assert tick_labels(round_ticks(low, high, 6)) == labels


@given(st.lists(ANY, min_size=1, max_size=400), st.integers(10, 60))
def test_thinned_points_keep_ends_and_extremes_and_gaps(values: list[float], most: int) -> None:
    points = [(float(i), y) for i, y in enumerate(values)]
    thinned = thin(points, most)
    assert len(thinned) <= 1.5 * most + 4
    assert thinned == sorted(thinned, key=lambda p: p[0])
    assert (thinned[0][0], thinned[-1][0]) == (points[0][0], points[-1][0])
    finite = [y for y in values if math.isfinite(y)]
    kept = [y for _, y in thinned if math.isfinite(y)]
    assert bool(kept) == bool(finite)
    if finite:
        assert (min(kept), max(kept)) == (min(finite), max(finite))
    assert any(map(math.isnan, values)) == any(math.isnan(y) for _, y in thinned)


def test_a_spike_of_one_step_in_twenty_thousand_is_drawn_and_stays_as_high() -> None:
    points = [(float(step), 1.0 + 99.0 * (step == 7_654)) for step in range(1, 20_001)]
    thinned = thin(points)
    assert (7_654.0, 100.0) in thinned
    assert len(thinned) <= MOST_POINTS + 2


@given(st.lists(ANY, max_size=60), st.integers(1, 30))
def test_smoothing_stays_between_the_points_and_leaves_gaps_out(values: list[float], width: int) -> None:
    smoothed = smooth([(float(i), y) for i, y in enumerate(values)], width)
    finite = [y for y in values if math.isfinite(y)]
    near = 1e-6 * max(map(abs, finite), default=0.0) * len(values) + 1e-9
    for i, (_, y) in enumerate(smoothed):
        around = values[max(0, i - width // 2) : i + width // 2 + 1]
        assert math.isfinite(y) == any(map(math.isfinite, around))
        assert math.isnan(y) or min(finite) - near <= y <= max(finite) + near


def test_smoothing_loses_no_digit_beside_one_huge_value() -> None:
    points = [(float(i), 1e200 if i == 20 else 2.0) for i in range(50)]
    smoothed = smooth(points, 4)
    assert [y for x, y in smoothed if abs(x - 20) > 2] == [2.0] * 45
    assert [y for x, y in smoothed if abs(x - 20) <= 2] == [1e200 / 5] * 5


def test_a_smoothed_rate_is_what_all_of_the_window_comes_to() -> None:
    tokens, seconds = [100.0, 100.0, 100.0, NAN, 100.0], [1.0, 0.001, 3.0, 1.0, NAN]
    found = [y for _, y in smooth_rate([1, 2, 3, 4, 5], tokens, seconds, 3)]
    assert found[:4] == pytest.approx([200 / 1.001, 300 / 4.001, 200 / 3.001, 100 / 3.0])
    assert math.isnan(found[4])


@pytest.mark.parametrize(
    ("values", "log", "said"),
    [
        ([8.0, 4.0, 3.0, 2.0], False, ""),
        ([8.0, 4.0, 1e6, 2.0], False, "1 value above the chart, drawn on its edge: up to 1,000,000."),
        ([3.0] * 60 + [1e6] * 20, True, "On a logarithmic scale."),
        ([0.0] * 60 + [1e6] * 20, False, ""),
        ([NAN], False, ""),
    ],
)
def test_a_loss_that_leaps_leaves_the_rest_to_be_seen(values: list[float], log: bool, said: str) -> None:
    axis, told = loss_axis(values)
    assert (axis.log, told) == (log, said)
    assert axis.most == (10.0 if "edge" in said else math.inf), "a quarter above the largest of the others"


def test_what_is_above_a_chart_is_drawn_on_its_edge() -> None:
    points = [(0.0, 1.0), (1.0, 1e9), (2.0, 2.0)]
    drawn = chart("Loss", Axis("step"), Axis("loss", most=2.5), [Series("loss", points, "c0", "circle")])
    labels = re.findall(r'text-anchor="end">([\d.,]+)</text>', drawn)
    assert max(float(label.replace(",", "")) for label in labels) <= 3
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', drawn)[:3]]
    assert 24 <= heights[1] < heights[2] < heights[0]
    assert "loss: 1,000,000,000 loss at 1 step" in drawn, "its mark tells what it is"


def test_a_long_line_has_the_marks_that_it_was_given() -> None:
    points = [(float(i), 1.0) for i in range(100)]
    drawn = chart("Loss", Axis("step"), Axis("loss"), [Series("a", points, "c0", "circle", marks=12)])
    assert drawn.count('class="mark solid c0"') == 2 * 12


def lines_of(drawn: str) -> list[str]:
    return re.findall(r'<path class="line c0" d="([^"]*)"', drawn)


def test_a_number_that_is_none_is_a_gap_and_one_alone_is_a_dot() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, NAN), (4.0, 3.0), (5.0, math.inf), (6.0, 1.0), (7.0, 2.0)]
    wide, narrow = lines_of(chart("Loss", Axis("step"), Axis("loss"), [Series("loss", points, "c0")]))
    for line in (wide, narrow):
        assert line.count("M") == 3
        assert line.count("L") == 2
        assert re.fullmatch(r"(M[\d.]+ [\d.]+h0(L[\d.]+ [\d.]+)*)+", line)


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=8), st.booleans(), st.booleans())
@example([(0.0, 5e-324)], False, True)
def test_whatever_the_numbers_no_coordinate_is_none(points: list[tuple[float, float]], x: bool, y: bool) -> None:
    series = [Series("a", sorted(points, key=str), "c0", "circle")]
    drawn = chart("Any", Axis("x", log=x), Axis("y", log=y), series, [Rule("r", 1.0, "d1")])
    attributes = " ".join(value for name, value in Seen(drawn).attributes if name != "aria-label")
    assert not re.search(r"\b(nan|inf)\b", attributes)


def test_all_that_is_in_a_chart_is_drawn_and_named_without_colour() -> None:
    points = [(1.0, 1.0), (2.0, 2.0)]
    series = [Series("before", points, "c0", "circle"), Series("after", points, "c1 d1", "diamond")]
    rules = [Rule("budget", 3.0, "limit d1"), Rule("card", 900.0, "c5")]
    drawn = chart("Two runs", Axis("rows"), Axis("GiB"), series, rules)
    seen = Seen(drawn)
    shapes = ("wide", "narrow")
    assert [v for n, v in seen.attributes if n == "class" and v in shapes] == list(shapes)
    assert seen.attributes.count(("role", "img")) == seen.attributes.count(("aria-label", "Two runs")) == 2
    assert drawn.count('class="rule limit d1"') == 2, "in both drawings"
    assert "card, above this chart" in seen.said, "it would press all else flat"
    for name in ("before", "after", "budget"):
        assert f"</svg>{name}</li>" in drawn
    dashes = {re.sub("c[0-9]", "", look).strip() for look in re.findall(r'class="line ([^"]*)" d=', drawn)}
    assert len(dashes) == 2


def test_nothing_to_draw_says_so() -> None:
    for made in (
        chart("None", Axis("x"), Axis("y"), [Series("a", [(1.0, NAN)], "c0")]),
        chart("None", Axis("x"), Axis("y"), []),
        bars("None", Bars("GiB", [])),
        histogram("None", "tokens", "samples", []),
    ):
        assert made == '<p class="empty">No numbers yet.</p>'


def test_bars_are_as_long_as_what_they_stand_for() -> None:
    drawn = bars("Peak", Bars("GiB", [Bar("a", 0, 1, "1 GiB"), Bar("b", 1, 3, "2 GiB")]))
    first, second = (float(w) for w in re.findall(r'class="bar c0" x="[\d.]+" y="\d+" width="([\d.]+)"', drawn)[:2])
    assert second == pytest.approx(2 * first, abs=0.2)


def test_a_histogram_has_its_columns_where_their_values_are() -> None:
    drawn = histogram("Lengths", "tokens", "samples", [(1, 10, 4), (11, 20, 2)])
    found = re.findall(r'<rect class="bar c0" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', drawn)[:2]
    (x, y, width, height), (x2, y2, width2, height2) = (tuple(map(float, bar)) for bar in found)
    axis = re.search(r'class="axis" x1="([\d.]+)" x2="([\d.]+)" y1="(\d+)"', drawn)
    assert axis
    left, right, bottom = map(float, axis.groups())
    half = (right - left) / 2
    assert (x, width, x2, width2) == pytest.approx((left + 0.5, half - 1, left + half + 0.5, half - 1), abs=0.11)
    assert (y + height, y2 + height2) == pytest.approx((bottom, bottom), abs=0.11)
    assert height == pytest.approx(2 * height2, abs=0.11)


@given(st.lists(st.text(max_size=9) | st.sampled_from(HOSTILE), max_size=4).map("".join))
@settings(max_examples=100)
def test_text_never_becomes_markup_nor_turns_what_stands_around_it(text: str) -> None:
    for seen in (Seen(f"<p>{escaped(text)}</p>"), Seen(quoted(text, "prompt")), Seen(table(["a"], [[text]]))):
        assert set(seen.tags) <= {"p", "div", "table", "thead", "tbody", "tr", "th", "td", "wbr"}
        assert not set(seen.said) & TURNING
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", seen.said)
        seen.said.encode()
        assert {name for name, _ in seen.attributes} <= {"class", "dir", "scope"}
    drawn = chart(text, Axis(text), Axis(text), [Series(text, [(1.0, 1.0)], "c0", "ring"), Series("b", [(1, 2)], "c1")])
    assert set(Seen(drawn).tags) <= {"svg", "line", "text", "path", "title", "circle", "rect", "ul", "li", "p"}
    assert not {name for name, _ in Seen(drawn).attributes if name.startswith("on")}
    whole = page(text, [text], [(text, text)], [Section(text, quoted(text, "answer"))])
    assert Seen(whole).tags.count("section") == 1
    assert Seen(whole).tags.count("script") == 0


@pytest.mark.parametrize("text", ["你好，世界", "مرحبا", "e\u0301", "🙂", "a\tb\nc", "👩\u200d👩"])
def test_text_of_any_script_stays_what_it_is(text: str) -> None:
    assert Seen(f"<p>{escaped(text)}</p>").said == text


def test_a_terminal_gets_letters_that_every_console_has_within_80_columns() -> None:
    points = [(1.0, 0.9, "~"), (2.0, 1.1, "o"), (20.0, 5.0, "#"), (23.0, 5.6, "~"), (24.0, 21.0, "~")]
    lines = draw(points, 19.0)
    assert max(map(len, lines)) <= 80
    assert all(line.isascii() for line in lines)
    drawn = "\n".join(line.partition("|")[2] for line in lines if "|" in line)
    assert (drawn.count("#"), drawn.count("o"), drawn.count("~")) == (1, 1, 3)
    assert any("=" * (COLUMNS // 2) in line for line in lines)
    assert re.search(r" 20 ", lines[-1]), "the chosen one has its number in any case"
    assert draw(points[:2], 19.0)[-1].strip() == "(= is far above this chart)"
    assert draw([(8.0, 1.0, "#")])


def test_a_plan_is_drawn_without_colour_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_curves(facts.plan())
    said = capsys.readouterr().out
    assert said.isascii()
    assert "\x1b" not in said
    assert max(map(len, said.splitlines())) <= 80
    assert "Peak of a micro-batch, GiB" in said
    assert "Samples a second" in said
