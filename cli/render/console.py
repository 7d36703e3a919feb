"""Where words go: the result to stdout, all else to stderr; no colour is needed to understand it."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


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


def print_json(text: str) -> None:
    """Give the result as data, untouched by any rendering."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
