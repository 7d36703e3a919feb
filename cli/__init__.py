"""The command line, the only voice of the program: parses, wires, prints, ends with an exit code. Never loads torch."""

from __future__ import annotations

import io
import sys

import typer

from cli.entries import data, looking, models, training

EXIT_CODES = (
    "Exit codes: 0 ok; 1 nothing fits, or a check failed; 2 usage or configuration; 3 data; 4 device or disk; "
    "5 output folder in use; 70 internal error; 75 stopped and saved: go on with --resume; 130, 143 ended by a signal."
)

chatlm = typer.Typer(
    name="chatlm",
    help="Finds the largest safe batch for a small language model on this machine, and trains it.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
)
for room in (training, data, models, looking):
    chatlm.add_typer(room.commands)


def app() -> None:
    """Run the command line; a console that lacks a letter is shown its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    chatlm()


if __name__ == "__main__":
    app()
