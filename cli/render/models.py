"""What models are worth, as people read it."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from autotune.errands import Evaluated
from cli.render.console import out
from cli.render.units import number


def print_evaluated(scored: Mapping[str, Evaluated]) -> None:
    """Print a row for each model."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for title in ("loss", "perplexity", "right", "BLEU", "chrF", "answers"):
        table.add_column(title, justify="right")
    for name, made in scored.items():
        table.add_row(
            escape(name),
            number(made.loss, ".4f"),
            number(made.perplexity, ",.2f"),
            f"{made.accuracy:.1%}",
            "-" if made.bleu is None else f"{made.bleu:.2f}",
            "-" if made.chrf is None else f"{made.chrf:.2f}",
            str(made.answered),
        )
    out.print(table)
    first = next(iter(scored.values()))
    out.print(
        f"Of {first.samples:,} samples, {first.target_tokens:,} tokens to predict; right: of those, by the likeliest."
    )
    if first.bleu_signature:
        out.print(f"BLEU {first.bleu_signature}; chrF {first.chrf_signature}")
