"""What is typed to look: at this machine, and at runs."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.entries.shared import AsJson, Debug, guarded

commands = typer.Typer()


@commands.command()
@guarded
def doctor(
    run: Annotated[
        str | None, typer.Argument(help="Run that the bundle tells of.", metavar="RUN", show_default=False)
    ] = None,
    bundle: Annotated[
        str | None,
        typer.Option("--bundle", help="Write what to attach to an issue, secrets masked.", metavar="FILE.zip"),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what this machine is, how fast, and what is wrong with it; ends with 1 where something is."""
    from cli.doctor.command import doctor_command

    doctor_command(run, bundle, as_json=as_json)
