"""Data as people read it: how long its rows are, what was cut, what is padding, what is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.markup import escape
from rich.table import Table

from autotune.errands import DataSummary, ShownToken
from autotune.plan import Layout
from cli.render.console import out
from cli.render.units import count

SHARES = (0.5, 0.95, 0.99)
BARS, BAR_WIDTH = 10, 40


def data_line(data: DataSummary) -> str:
    """Say in a line how much there is, how long, what is trained on, and how many rows were cut."""
    lengths = "; ".join(
        f"{side} half up to {data.percentile(i, 0.5)}, 95 % up to {data.percentile(i, 0.95)}, longest {data.longest(i)}"
        for i, side in enumerate(sides(data))
    )
    cut = ", ".join(f"{rule} {rows:,}" for rule, rows in data.cuts.items())
    return (
        f"{data.rows:,} rows, {data.stage}, {data.tokens:,} tokens, {data.target_tokens / data.tokens:.0%} of them "
        f"trained on; {lengths}" + f"; cut: {cut}" * bool(cut)
    )


def sides(data: DataSummary) -> tuple[str, ...]:
    """Name what its histograms are of."""
    return ("source", "target") if len(data.lengths) == 2 else ("length",)


def print_data(
    data: DataSummary,
    validation: DataSummary | None,
    padding: Mapping[Layout, float],
    shown: Sequence[Sequence[ShownToken]],
) -> None:
    """Print what the data holds once it is tokens, and its first samples, token by token."""
    out.print(f"[bold]{count(data.rows, 'row')}, {count(data.samples, 'sample')}, {count(data.tokens, 'token')}[/]\n")
    table = Table.grid(padding=(0, 3))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _rows(data, validation, padding):
        table.add_row(f"  {name}", escape(text))
    out.print(table)
    for side, name in enumerate(sides(data)):
        out.print(_histogram(data, side, name))
    if shown:
        out.print("\nThe first samples; a bar stands between tokens, (2) is a character of two tokens.")
    for number, tokens in enumerate(shown, 1):
        _print_sample(number, tokens)


def _rows(data: DataSummary, validation: DataSummary | None, padding: Mapping[Layout, float]) -> list[tuple[str, str]]:
    tokens, place = data.longest_row
    rows = [
        ("Trained on", f"{data.target_tokens:,} tokens, {data.target_tokens / data.tokens:.0%} ({data.stage})"),
        ("Longest row", f"{count(tokens, 'token')} before any cut: {place}"),
        ("Cut, by rule", ", ".join(f"{rule} {rows:,}" for rule, rows in data.cuts.items()) or "none"),
        ("Padding", ", ".join(f"{layout} {share:.0%}" for layout, share in padding.items())),
    ]
    if data.unknown_share:
        rows.append(("Unknown", f"{data.unknown_share:.1%} of the first million tokens"))
    if validation is not None:
        rows.append(("Held out", data_line(validation)))
    return rows


def _histogram(data: DataSummary, side: int, name: str) -> Table:
    points = ", ".join(f"p{share * 100:g} {data.percentile(side, share)}" for share in SHARES)
    title = f"{name.capitalize()} in tokens: {points}, max {data.longest(side)}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    for justify in ("right", "right", "left"):
        table.add_column(justify=justify)
    bars = histogram_bars(data.lengths[side])
    most = max(samples for _, _, samples in bars)
    for low, high, samples in bars:
        table.add_row(f"{low} to {high}", f"{samples:,}", "#" * round(BAR_WIDTH * samples / most))
    return table


def histogram_bars(histogram: Sequence[tuple[int, int]], most: int = BARS) -> list[tuple[int, int, int]]:
    """Return bars of equal width, so many at most: the first and last length, and the samples between."""
    width = -(-histogram[-1][0] // most)
    bars = [0] * -(-histogram[-1][0] // width)
    for length, samples in histogram:
        bars[max(0, length - 1) // width] += samples
    return [(i * width + 1, (i + 1) * width, samples) for i, samples in enumerate(bars)]


def _print_sample(number: int, tokens: Sequence[ShownToken]) -> None:
    """Print a sample in runs of tokens that are trained on, or masked; a bar stands between two tokens."""
    total, trained = sum(t.tokens for t in tokens), sum(t.tokens for t in tokens if t.trained)
    out.print(f"[bold]Sample {number}[/]: {count(total, 'token')}, {trained:,} trained on")
    for is_trained, run in groupby(tokens, lambda token: token.trained):
        text = escape("|".join(map(_visible, run)))
        out.print(f"  trained  [bold green]{text}[/]" if is_trained else f"  masked   [dim]{text}[/]")


def _visible(token: ShownToken) -> str:
    """Write a token so that spaces at its ends, line breaks and what is no character can be seen."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in token.text)
    return text if token.tokens == 1 else f"{text}({token.tokens})"
