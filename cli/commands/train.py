"""What `chatlm train` does: a plan, a banner, the run; or a rehearsal of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from autotune.account import check_room, set_budget
from autotune.disk import remove
from autotune.errands import Preprocessed
from autotune.errors import ConfigurationError, MachineError, NothingFitsError, UserError
from autotune.forecast import forecast_anew
from autotune.plan import Hardware, Plan, Workload
from cli.choices import planned_padding
from cli.decisions import advice, decisions
from cli.history import RunData
from cli.launched import launched
from cli.lock import hold
from cli.options import as_arguments
from cli.planning import (
    Remembering,
    inputs_of,
    measure,
    preprocess,
    read_hardware_of,
)
from cli.rehearsal import (
    Check,
    attempt,
    check_folder,
    check_memory,
    check_room_on_disk,
    check_rows,
    check_tokenizer,
    rehearse,
)
from cli.render.banner import print_banner
from cli.render.console import out, say, show_command, warn
from cli.render.rehearsal import show_checks, tell_outcome
from cli.render.settings import print_config
from cli.render.units import count, duration
from cli.runs import SCRATCH, Resuming, RunPlace, begun, check_disk, find_run, write_run
from cli.training import ENDINGS, Going, Job, follow, train
from cli.wiring import (
    check_ranks,
    check_reporting,
    check_same_hardware,
    fit_plan,
    make_course,
    memory_wishes,
    read_plan,
    settings_of_plan,
)
from profiles import Resolved, Settings

CHECK_FAILED = 1
"""Exit code of a rehearsal that found something."""
Before = Callable[[Preprocessed, Workload, Hardware], None]
"""What is looked at once model and data are known, and before anything is measured."""


@dataclass(frozen=True)
class Asked:
    """What was said on the command line, as it was said."""

    resolved: Resolved
    given: dict[str, Any]
    profile: str | None
    config: str | None
    plan_file: str | None
    auto: bool
    remembering: Remembering

    def again(self, folder: Path) -> list[str]:
        """Return the same command, of the run in a folder."""
        sources = {"profile": self.profile, "config": self.config, "plan": self.plan_file}
        typed = {name: value for name, value in sources.items() if value} | self.given | {"output_dir": str(folder)}
        return ["chatlm", "train", *["--auto"] * self.auto, *as_arguments(typed)]


def train_command(asked: Asked, resuming: Resuming, *, show_config: bool, rehearsing: bool) -> None:
    """Plan unless there is a plan, then train it, from the beginning or from a checkpoint; or rehearse that."""
    settings = asked.resolved.settings
    if show_config:
        print_config(asked.resolved)
        return
    check_reporting(settings)
    among = launched(settings.ranks)
    if among is not None and rehearsing:
        raise ConfigurationError("a rehearsal launches its ranks itself", "give --ranks N in place of the launcher")
    if resuming and rehearsing:
        raise ConfigurationError("a rehearsal is of a run from its beginning", "leave --resume out, or --rehearse")
    if among is not None and among.rank > 0:
        _follow(settings)
        return
    folder = find_run(settings, resuming).folder
    if rehearsing:
        with _ended_by_signals():
            _rehearse(asked, folder)
        return
    with hold(folder) as lock:
        remove(folder / SCRATCH)
        # Looked at again now that it is ours: one that was just leaving may have left a run, or a checkpoint.
        run = find_run(replace(settings, output_dir=str(folder)), resuming)
        if resuming and run.resume is None:
            say(f"{run.folder} has no checkpoint: beginning at the start")
        job = _find_job(asked, run, partial(_check_cheaply, settings, folder))
        _train(asked, run, _with_forecast(asked, run, job), lock, launches=among is None)


def _with_forecast(asked: Asked, run: RunPlace, job: Job) -> Job:
    """Return the job with what the run takes from now on; raises ConfigurationError where it has no time left."""
    steps, seconds = begun(run)
    course, limit = make_course(asked.resolved, job.facts, steps, seconds), asked.resolved.limit
    if limit is not None and course.left_seconds is not None and course.left_seconds <= 0:
        raise ConfigurationError(
            f"of the {duration(limit.seconds)} there were, {duration(time.time() - limit.began_at)} went into planning"
            + (f" and {duration(seconds)} into the {count(steps, 'step')} before" if steps else ""),
            "give more with --max-time or --finish-by, or leave it out to train all steps",
        )
    return replace(job, plan=forecast_anew(job.plan, course))


def _train(asked: Asked, run: RunPlace, job: Job, lock: int, *, launches: bool) -> None:
    again = [*asked.again(run.folder), "--resume"]
    resolved, limit = asked.resolved, asked.resolved.limit
    told = decisions(resolved, job.plan, job.facts, by_plan=job.evidence is None)
    print_banner(resolved, asked.profile, job.plan, job.facts, run.folder, told, advice(job.plan), again)
    write = partial(write_run, run.folder, asked.resolved, job.settings, job.plan, job.evidence, _data_of(job))
    if run.resume is None:
        write()
    train(job, run, lock, Going(write, again, launches, limit))


def _data_of(job: Job) -> str:
    """Return what is to be kept of the data of a run."""
    data = job.facts.data
    assert data is not None
    kept = RunData(data=data, validation=job.facts.validation, padding=planned_padding(job.plan, data))
    return kept.model_dump_json(indent=2)


def _check_cheaply(
    settings: Settings, folder: Path, facts: Preprocessed, workload: Workload, hardware: Hardware
) -> None:
    """Raise MachineError where the disk has no room, and warn of data that a rehearsal would fail."""
    check_disk(folder, workload, settings.keep_last, hardware)
    check_folder(folder)
    for check in (check_rows(facts), check_tokenizer(facts)):
        if check.verdict == "FAILED":
            warn(f"{check.name}: {check.told}")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have a signal that would end us at once raise instead, so that nothing is left behind."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise typer.Exit(128 + number)

    before = {number: signal.signal(number, end) for number in ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rehearse(asked: Asked, folder: Path) -> None:
    """Make the checks, cheap ones first; raises typer.Exit with 1 where one fails."""
    began = time.monotonic()
    checks = list(show_checks(_checks(asked, folder)))
    tell_outcome(checks, time.monotonic() - began)
    if any(check.verdict == "FAILED" for check in checks):
        raise typer.Exit(CHECK_FAILED)
    show_command(out, "Train it:", asked.again(folder))


def _checks(asked: Asked, folder: Path) -> Iterator[Check]:
    """Hold the folder, and yield the checks as they are made; once one of the cheap ones fails, no other is tried."""
    with ExitStack() as holding:
        try:
            lock = holding.enter_context(hold(folder))
        except MachineError as error:
            yield Check("folder", "FAILED", f"{error.message}; {error.hint}")
            yield Check("run", "not tried", "mend this first")
            return
        yield from _checks_in(asked, RunPlace(folder, None), lock)


def _checks_in(asked: Asked, run: RunPlace, lock: int) -> Iterator[Check]:
    yield (folder := attempt("folder", partial(check_folder, run.folder)))
    cheap: list[Check] = []

    def look(facts: Preprocessed, workload: Workload, hardware: Hardware) -> None:
        room = partial(check_room_on_disk, run.folder, workload, asked.resolved.settings.keep_last, hardware)
        cheap.extend((check_rows(facts), check_tokenizer(facts), attempt("disk", room)))
        if any(check.verdict == "FAILED" for check in (folder, *cheap)):
            raise _NotWorthMeasuringError

    try:
        job = _find_job(asked, run, look)
    except _NotWorthMeasuringError:
        yield from cheap
        yield Check("run", "not tried", "mend these first")
        return
    except UserError as error:
        yield from cheap
        told = error.message + f"; {error.hint}" * bool(error.hint)
        yield Check("plan" if cheap or asked.plan_file else "data", "FAILED", told)
        yield Check("run", "not tried", "mend this first")
        return
    yield from cheap
    yield check_memory(job.plan)
    yield from rehearse(job, run.folder, lock)


class _NotWorthMeasuringError(Exception):
    """A cheap check has failed."""


def _find_job(asked: Asked, run: RunPlace, before: Before) -> Job:
    """Take the plan that was named, or the run's own, or make one."""
    if asked.plan_file:
        return _planned(asked.resolved, read_plan(asked.plan_file), before)
    return _plan_of(asked, run, before) or _plan_job(asked, before)


def _follow(settings: Settings) -> None:
    """Train as one of several ranks that were launched from outside, what the first of them has planned."""
    hardware = read_hardware_of(settings)
    facts = preprocess(settings, hardware.cores, demo=True)
    follow(settings, facts, hardware)


def _plan_of(asked: Asked, run: RunPlace, before: Before) -> Job | None:
    """Obey the plan of the run that goes on, so that it goes on to the bit; None where it cannot be, which is said."""
    if run.plan_file is None:
        return None
    try:
        return _planned(asked.resolved, read_plan(str(run.plan_file)), before, as_it_was=True)
    except (ConfigurationError, NothingFitsError) as error:
        say(f"the run's own plan cannot be gone on with: {error.message}; planning anew, for the same samples")
        return None


def _plan_job(asked: Asked, before: Before) -> Job:
    resolved, remembering = asked.resolved, asked.remembering
    facts, inputs = inputs_of(resolved, search=asked.auto, demo=True, offline=remembering.offline)
    before(facts, inputs.workload, inputs.hardware)
    planner = measure(resolved.settings, inputs, remembering, search=asked.auto)
    assert planner.plan is not None
    evidence = planner.evidence.model_dump_json(indent=2)
    return Job(resolved.settings, facts, planner.plan.hardware, planner.plan, evidence)


def _planned(resolved: Resolved, plan: Plan, before: Before, *, as_it_was: bool = False) -> Job:
    """Take a plan that was made before, here or elsewhere, or, to go on, on hardware that must be the same."""
    settings = settings_of_plan(plan, resolved)
    hardware = read_hardware_of(settings)
    check_ranks(plan, hardware)
    if as_it_was:
        check_same_hardware(plan, hardware)
    limit, headroom = memory_wishes(settings)
    check_room(plan, set_budget(hardware, limit, headroom))
    facts = preprocess(settings, hardware.cores, demo=True)
    fitted = fit_plan(plan, facts)
    before(facts, fitted.workload, hardware)
    return Job(settings, facts, hardware, fitted, None)
