"""Answers of models, as people read them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from autotune.errands import Answered
from cli.render.console import out, say
from cli.render.units import number

TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""What turns words around on a terminal (Unicode, UAX 9)."""
NARROWEST = 36
"""Columns of the terminal that an answer needs beside others; with less they stand one under the other."""


class Streamed:
    """An answer on stdout, word by word."""

    def __init__(self, lead: str | None) -> None:
        if lead is not None:
            out.print(escape(lead))
        self._file = out.file

    def show(self, words: str) -> None:
        """Show what came."""
        self._file.write(printable(words, out.encoding))
        self._file.flush()

    def end(self, answered: Answered) -> None:
        """End its line, and tell of its speed."""
        self._file.write("\n")
        self._file.flush()
        say(_told(answered))


def print_side_by_side(question: str, answers: Sequence[tuple[str, Answered]]) -> None:
    """Show several answers to one question, beside each other where there is room."""
    out.print(f"[bold]{escape(question)}[/]")
    if out.width < NARROWEST * len(answers):
        for name, answered in answers:
            out.print(f"[bold cyan]{escape(name)}[/]  {_told(answered)}")
            out.print(escape(printable(answered.text, out.encoding)))
        return
    table = Table(box=SIMPLE_HEAD, expand=True)
    for name, _ in answers:
        table.add_column(escape(name), ratio=1, overflow="fold")
    table.add_row(*(escape(printable(answered.text, out.encoding)) for _, answered in answers))
    table.add_row(*(f"[dim]{_told(answered)}[/]" for _, answered in answers))
    out.print(table)


def _told(answered: Answered) -> str:
    how = "" if answered.ended else "; not ended by the model"
    return f"{answered.tokens} tokens, {number(answered.tokens / max(answered.seconds, 1e-9), '.1f')} tokens/s{how}"


def _steers(c: str) -> bool:
    return (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t\r") or c in TURNING


def printable(words: str, encoding: str | None) -> str:
    """Return what a model said without what would steer the terminal, or what its encoding does not have."""
    shown = "".join("\ufffd" if _steers(c) else c for c in words)
    kept = encoding or "utf-8"
    return shown.encode(kept, errors="replace").decode(kept)
