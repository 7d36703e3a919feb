"""What became of data files, as people read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from cli.render.console import out
from cli.render.units import count, size
from trainer.preparing import Prepared
from trainer.sampling import Sampled
from trainer.vocabulary import Inspected

WHY = {
    "empty": "a part that says nothing",
    "repeated": "the same words again and again",
    "truncated": "an answer that breaks off",
    "outlier": "far longer or shorter than the others",
    "duplicate": "the words of one before",
    "near_duplicate": "nearly the words of one before",
}


def print_sampled(made: Sampled, output: str, validation: str | None) -> None:
    """Say what went and why, and how long and how varied rows were and are."""
    if made.gone:
        gone = sum(made.gone.values())
        out.print(f"[bold]{count(gone, 'row')} of {made.before['rows']:,} went[/] ({gone / made.before['rows']:.1%}):")
        for reason, rows in made.gone.items():
            out.print(f"  {rows:>12,}  {WHY[reason]}")
    sides = [("before", made.before, made.bytes_before), (output, made.after, made.bytes_after)]
    if validation is not None and made.validation is not None:
        sides.append((validation, made.validation, made.bytes_validation))
    _print_sides(sides)


def print_prepared(made: Prepared) -> None:
    """Say what was cleaned and what rejected, rule by rule, each with where it was first met."""
    rejected = sum(told.rows for told in made.rejected.values())
    out.print(f"[bold]{count(made.rows, 'row')} read, {rejected:,} rejected[/]")
    for title, rules in (("Cleaned", made.cleaned), ("Rejected", made.rejected)):
        for rule, told in sorted(rules.items(), key=lambda one: -one[1].rows):
            out.print(f"  {title.lower()} {told.rows:>10,}  {escape(rule)}; first: {escape(told.first)}")
    if made.rejects is not None:
        out.print(f"Rejected rows and why: {escape(made.rejects)}")
    _print_sides([(name, side, int(side["bytes"])) for name, side in made.sides.items()])


def print_inspected(made: Inspected) -> None:
    """Say what a tokenizer has, and how it cuts texts."""
    special = ", ".join(f"{name} {content!r}" for name, content in made.special.items())
    out.print(f"{made.entries:,} entries; {escape(special or 'no special tokens')}")
    if made.fertility is None:
        return
    cut = ", ".join(f"{language} {share:.3f}" for language, share in made.fertility.tokens_per_character.items())
    out.print(f"Tokens a character, of {count(made.fertility.rows, 'row')}: {cut}")
    out.print(
        f"Unknown: {made.fertility.unknown_share:.2%} of tokens; "
        f"the same again when joined: {made.fertility.whole_share:.1%} of texts"
    )


def _print_sides(sides: Sequence[tuple[str, Mapping[str, float], int]]) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ("rows", "characters", "mean", "p50", "p95", "max", "distinct", "repeated", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, side, held in sides:
        table.add_row(
            escape(name), f"{side['rows']:,}", f"{side['characters']:,}", f"{side['mean']:.1f}", f"{side['p50']:,}",
            f"{side['p95']:,}", f"{side['max']:,}", f"{side['distinct_runs']:.1%}", f"{side['duplicates']:.1%}",
            size(held),
        )  # fmt: skip
    out.print(table)
    for name, side, _ in sides:
        if "tokens_mean" in side:
            points = ", ".join(f"{point} {side[f'tokens_{point}']:,.0f}" for point in ("mean", "p50", "p95", "max"))
            out.print(f"{escape(name)}: tokens of some thousand rows: {points}")
    out.print(
        "Lengths in characters of what is trained on; distinct: of runs of five of them, as many of each file; "
        "repeated: rows whose words one before has."
    )
