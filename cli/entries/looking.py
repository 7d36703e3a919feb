"""What is typed to look: at this machine, and at runs, while they go and after."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.entries.shared import INTERNAL_ERROR, AsJson, Debug, guarded

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


@commands.command()
@guarded
def monitor(
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="Folders of runs; else those under runs/ that are running, or the newest.", metavar="RUN"),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same facts once, as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Watch cards, memory, disk and runs on one screen, live or after the fact; changes nothing."""
    from cli.monitor import monitor_command

    if not monitor_command(runs or [], once=once, as_json=as_json):
        raise typer.Exit(INTERNAL_ERROR)


@commands.command()
@guarded
def report(
    named: Annotated[
        list[str], typer.Argument(help="Folders of runs, side by side; or a plan.json.", metavar="RUN...|PLAN")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="HTML file to write.", metavar="FILE")] = "report.html",
    debug: Debug = False,
) -> None:
    """Write a page about runs, or a plan, with charts: one file that needs no network."""
    from cli.report import report_command

    report_command(named, output)
