"""What several commands share: options of one meaning, and how an error becomes a sentence and an exit code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from autotune.errors import UserError, disk_error

INTERNAL_ERROR = 70

Profile = Annotated[
    str | None, typer.Option("--profile", help="Profile, or a TOML file of one's own.", metavar="NAME|FILE")
]
Config = Annotated[
    str | None, typer.Option("--config", help="TOML file of settings; wins over the profile.", metavar="FILE")
]
ShowConfig = Annotated[bool, typer.Option("--show-config", help="Print every value and where it came from, and leave.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Plan anew, whatever was measured here before.")]
Offline = Annotated[
    bool, typer.Option("--offline", help="Trust what was measured here before, without a dry step to check it.")
]
Output = Annotated[str, typer.Option("--output", help="Parquet file to write.", metavar="FILE")]
ValidationOutput = Annotated[
    str | None,
    typer.Option("--validation-output", help="Write rows for validation too; no content is in both.", metavar="FILE"),
]
ValidationRatio = Annotated[
    float,
    typer.Option("--validation-ratio", min=1.0, max=1e6, help="Rows of training to one of validation.", metavar="N"),
]
Place = Annotated[str, typer.Argument(help="Run, checkpoint, or folder of a model.", metavar="RUN|DIR")]
Report = Annotated[str | None, typer.Option("--report", help="Write what is told as JSON.", metavar="FILE")]
AsJson = Annotated[bool, typer.Option("--json", help="Tell it as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a user can mend into one sentence and an exit code; anything else is a bug, and says so."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        debug = arguments.pop("debug")
        try:
            command(**arguments)
        except (typer.Exit, KeyboardInterrupt):
            raise
        except Exception as error:
            from cli.render.console import fail

            told: UserError | None = disk_error(error) if isinstance(error, OSError) else None
            if isinstance(error, UserError):
                told = error
            if told is not None:
                fail(told.message, told.hint)
            if debug:
                raise
            if told is not None:
                raise typer.Exit(told.exit_code) from None
            fail(
                f"internal error: {type(error).__name__}: {error}",
                "run again with --debug, and report what it shows",
            )
            raise typer.Exit(INTERNAL_ERROR) from None

    return run
