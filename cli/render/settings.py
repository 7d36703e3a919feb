"""Profiles and settings, with where each value came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from cli.render.console import out
from profiles import Resolved


def print_profiles(profiles: Mapping[str, Mapping[str, Any]]) -> None:
    """List profiles with what they set."""
    table = Table()
    for name in ("profile", "per GPU", "effective", "epochs", "other values", "for"):
        table.add_column(name, overflow="fold")
    shown = ("batch_size_per_gpu", "effective_batch_size", "epochs")
    for name, values in profiles.items():
        other = ", ".join(
            f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in values.items()
            if k not in (*shown, "about")
        )
        table.add_row(name, *(str(values.get(key, "-")) for key in shown), other, str(values.get("about", "")))
    out.print(table)


def print_config(resolved: Resolved) -> None:
    """List every value and where it came from."""
    table = Table()
    for name in ("setting", "value", "from"):
        table.add_column(name, overflow="fold")
    for name, value in vars(resolved.settings).items():
        shown = "-" if value in (None, ()) else " ".join(value) if isinstance(value, tuple) else str(value)
        table.add_row(name, escape(shown), escape(resolved.origins[name]))
    out.print(table)
