"""`chatlm report`: what runs, or a plan, came to, as one page that needs nothing else. Writes that file alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from autotune.disk import write_whole
from autotune.errors import ConfigurationError, MachineError
from cli.history import History, find_runs, is_run
from cli.render.console import tell
from cli.render.units import size
from cli.report import plan, run, several
from cli.report.curves import run_section
from cli.report.events import events_section
from cli.report.page import MARKER, page
from cli.report.told import Told
from cli.wiring import read_plan

ANOTHER = "give another --output FILE"
HEAD_BYTES = 4096
"""Of a page: its marker stands there."""


def report_command(named: Sequence[str], output: str) -> None:
    """Write the page about runs or a plan, and say where. Raises ConfigurationError for what is neither.

    Raises MachineError where the page cannot be written.
    """
    if output == "-":
        raise ConfigurationError("a page goes to a file, and - is none", "give --output FILE.html")
    # Where a link leads: what is written takes the place of what has the name.
    target = Path(os.path.realpath(output))
    _check_place(target)
    text = _page_of(named)
    try:
        write_whole(target, text)
    except OSError as error:
        raise MachineError(f"{output} cannot be written: {error.strerror}", ANOTHER) from error
    tell(f"report: {Path(output)} ({size(len(text.encode()))})")


def _check_place(target: Path) -> None:
    """Raise ConfigurationError where the page cannot be put, or would be written over what is none of ours."""
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target.parent}: no such folder", f"make it, or {ANOTHER}")
    if not target.exists():
        return
    if not target.is_file():
        raise ConfigurationError(f"{target} is no file", ANOTHER)
    with target.open("rb") as file:
        if MARKER.encode() not in file.read(HEAD_BYTES):
            raise ConfigurationError(f"{target} is there, and is no report of chatlm: it is left as it is", ANOTHER)


def _page_of(named: Sequence[str]) -> str:
    if len(named) == 1 and Path(named[0]).is_file():
        return _plan_page(Path(named[0]))
    for name in named:
        if Path(name).is_file():
            raise ConfigurationError(f"{name} is a file: side by side stand runs", "give their folders, or one plan")
    folders = find_runs(list(named))
    if len(folders) > len(several.LOOKS):
        raise ConfigurationError(
            f"{len(folders)} runs are more than the {len(several.LOOKS)} that a chart can tell apart",
            "make several reports",
        )
    histories = [History(folder) for folder in folders]
    names = [history.name for history in histories]
    runs = [
        Told(history, name if names.count(name) == 1 else str(folder))
        for history, name, folder in zip(histories, names, folders, strict=True)
    ]
    return _run_page(runs[0]) if len(runs) == 1 else _several_page(runs)


def _plan_page(file: Path) -> str:
    if file.name != "plan.json" and is_run(file.parent):
        raise ConfigurationError(f"{file} is a part of a run", f"give its folder: chatlm report {file.parent}")
    made = read_plan(str(file))
    return page(plan.plan_title(made), plan.plan_lead(made), plan.plan_facts(made), [plan.plan_section(made)])


def _run_page(told: Told) -> str:
    made = told.history.plan
    sections = [
        *([plan.plan_section(made)] if made else []),
        run_section(told),
        run.data_section(told),
        run.samples_section(told),
        events_section(told.course.happened),
        run.configuration_section(told),
    ]
    return page(run.run_title(told), run.run_lead(told), run.run_facts(told), sections)


def _several_page(runs: Sequence[Told]) -> str:
    sections = [several.comparison_section(runs), several.curves_section(runs), several.differences_section(runs)]
    return page(several.several_title(runs), several.several_lead(runs), [], sections)
