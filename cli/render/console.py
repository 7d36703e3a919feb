"""Where words go: the result to stdout, all else to stderr; no colour is needed to understand it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

# A folder may be called :fire:.
out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def tell(text: str) -> None:
    """Give the result in words."""
    out.print(escape(text))


def say(text: str) -> None:
    """Tell on stderr what is being done."""
    err.print(escape(text))


def warn(text: str) -> None:
    """Tell on stderr what the user should know."""
    err.print(f"[bold yellow]warning:[/] {escape(text)}")


def fail(message: str, hint: str) -> None:
    """Tell on stderr what went wrong, and what to do."""
    err.print(f"[bold red]error:[/] {escape(message)}")
    if hint:
        err.print(f"[bold]hint:[/] {escape(hint)}")


def show_command(console: Console, lead: str, words: Sequence[str]) -> None:
    """Print a command so that a shell that is given the line takes it for these words; rich would change some."""
    console.print(f"[bold]{lead}[/]  ", end="")
    console.file.write(" ".join(map(_quoted, words)) + "\n")
    console.file.flush()


def _quoted(word: str) -> str:
    """Quote a word for a shell; what a terminal does not show as it is (a tab, a line break) by its bytes."""
    if word.isprintable():
        return shlex.quote(word)
    shown = (
        c if c.isprintable() and c not in "'\\" else "".join(f"\\x{byte:02x}" for byte in os.fsencode(c)) for c in word
    )
    return f"$'{''.join(shown)}'"


def print_json(text: str) -> None:
    """Give the result as data, untouched by any rendering; letters that stdout lacks as JSON escapes them."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in text)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
