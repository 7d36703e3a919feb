"""What each command does, from settings to result."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from autotune.errands import Preprocessed, Train
from autotune.errors import NothingFitsError, UserError
from autotune.hardware import imagine_hardware, read_hardware
from autotune.plan import Hardware, Plan
from autotune.planner import Planner, check_room, set_budget
from autotune.process import Worker, WorkerCrashedError, ask
from cli.options import as_arguments
from cli.progress import RunProgress
from cli.render import (
    batch_line,
    count,
    duration,
    gib,
    number,
    out,
    print_account,
    print_config,
    print_json,
    print_plan,
    say,
    trial_line,
    warn,
)
from cli.wiring import (
    fit_plan,
    make_folder,
    make_recipe,
    make_request,
    make_workload,
    memory_wishes,
    notes,
    preprocess_errand,
    read_plan,
    run_folder,
    settings_of_plan,
    write_run,
)
from profiles import Resolved, Settings, resolve

ENDINGS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals after which a run is saved; a terminal that is closed sends the last."""


def plan_command(
    given: dict[str, Any],
    profile: str | None,
    config: str | None,
    *,
    as_json: bool,
    show_config: bool,
    explain: bool,
    gpu: str | None,
    gpus: int,
) -> None:
    """Plan, by dry steps here or by the trace for a card that is not here, and print the plan."""
    resolved = resolve(given, config, profile)
    if show_config:
        print_config(resolved)
        return
    if gpu is not None:
        hardware = imagine_hardware(gpu, gpus, Path(resolved.settings.output_dir or "."))
        facts, planner = _planner(resolved, hardware, search=True, demo=False)
        say("tracing the step, to know what would fit")
        plan = planner.estimate()
    else:
        facts, planner = _decide(resolved, search=True, demo=False)
        assert planner.plan is not None
        plan = planner.plan
    if as_json:
        print_json(plan.to_json())
        return
    sources = {"profile": profile, "config": config}
    typed = as_arguments({name: value for name, value in sources.items() if value} | given)
    print_plan(
        plan,
        facts,
        _profile_line(resolved, profile),
        shlex.join(["chatlm", "train", "--auto", *typed]),
    )
    if explain:
        print_account(plan.memory)


def _profile_line(resolved: Resolved, profile: str | None) -> str | None:
    rows = resolved.settings.batch_size_per_gpu
    return f"{profile} {rows}" if profile and rows and not resolved.given_by_hand("batch_size_per_gpu") else profile


def train_command(
    given: dict[str, Any],
    profile: str | None,
    config: str | None,
    *,
    auto: bool,
    plan_file: str | None,
    show_config: bool,
) -> None:
    """Plan unless there is a plan, then train it."""
    resolved = resolve(given, config, profile)
    if show_config:
        print_config(resolved)
        return
    folder = run_folder(resolved.settings)
    job = _planned(resolved, plan_file) if plan_file else _plan_job(resolved, auto=auto)
    make_folder(folder, job.facts.model, job.hardware)
    write_run(folder, resolved, job.settings, job.plan, job.evidence)
    say(f"{batch_line(job.plan.batching)}; run in {folder}")
    _train(job, folder)


@dataclass(frozen=True)
class Job:
    """All that a training needs, decided."""

    settings: Settings
    facts: Preprocessed
    hardware: Hardware
    plan: Plan
    evidence: str | None


def _plan_job(resolved: Resolved, *, auto: bool) -> Job:
    facts, planner = _decide(resolved, search=auto, demo=True)
    assert planner.plan is not None
    evidence = planner.evidence.model_dump_json(indent=2)
    return Job(resolved.settings, facts, planner.plan.hardware, planner.plan, evidence)


def _planned(resolved: Resolved, plan_file: str) -> Job:
    plan = read_plan(plan_file)
    settings = settings_of_plan(plan, resolved)
    hardware = _read_hardware(settings)
    limit, headroom = memory_wishes(settings)
    check_room(plan, set_budget(hardware, limit, headroom))
    facts = _preprocess(settings, hardware, demo=True)
    return Job(settings, facts, hardware, fit_plan(plan, facts), None)


def _decide(resolved: Resolved, *, search: bool, demo: bool) -> tuple[Preprocessed, Planner]:
    """Plan, telling of each trial; what can be refused without a worker is refused first."""
    hardware = _read_hardware(resolved.settings)
    facts, planner = _planner(resolved, hardware, search=search, demo=demo)
    if search:
        say("tracing the step, to know what will fit")
    for trial in planner.make():
        say(trial_line(trial, hardware.device))
    if search and not planner.evidence.traced:
        warn("this model cannot be traced: it was planned by dry steps alone")
    return facts, planner


def _read_hardware(settings: Settings) -> Hardware:
    """Read it, and tell at once what people should know of it: a plan may not come."""
    hardware = read_hardware(Path(settings.output_dir or "."))
    for note in hardware.notes:
        warn(note)
    return hardware


def _planner(resolved: Resolved, hardware: Hardware, *, search: bool, demo: bool) -> tuple[Preprocessed, Planner]:
    settings = resolved.settings
    request = make_request(resolved, hardware.world_size, search=search)
    facts = _preprocess(settings, hardware, demo=demo)
    workload = make_workload(settings, facts, hardware)
    recipe = make_recipe(settings, workload.stage)
    return facts, Planner(workload, hardware, request, recipe, facts.data, facts.validation)


def _preprocess(settings: Settings, hardware: Hardware, *, demo: bool) -> Preprocessed:
    answer: dict[str, Any] = {}
    for event in ask(preprocess_errand(settings, demo=demo), hardware.cores):
        if event["event"] == "progress":
            say(f"{event['doing']}: {count(event['rows'], 'row')}")
        elif event["event"] == "result":
            answer = event["result"]
    facts = Preprocessed.model_validate(answer)
    for note in notes(settings, facts):
        warn(note)
    return facts


def _train(job: Job, folder: Path) -> None:
    """Run the worker to its end, showing its rows; a signal lets it finish its step and save."""
    facts = job.facts
    assert facts.data is not None
    assert facts.tokenizer_dir is not None
    assert facts.ids is not None
    errand = Train(
        plan=job.plan,
        recipe=make_recipe(job.settings, job.plan.workload.stage),
        store=facts.data.store,
        validation_store=facts.validation.store if facts.validation else None,
        tokenizer_dir=facts.tokenizer_dir,
        ids=facts.ids,
        output_dir=str(folder),
    )
    allocator = job.plan.workload.cpu_allocator
    with (
        (folder / "log.txt").open("w+b") as log,
        Worker(errand, job.hardware.cores, allocator, log) as worker,
        _signals_to(worker) as signals,
        RunProgress() as progress,
    ):
        for event in worker.events():
            if event["event"] == "metrics":
                progress.show(event["row"])
            elif event["event"] == "out_of_memory":
                raise _no_longer_fits(job.plan, progress, str(event["message"]))
        if not progress.ended and (progress.steps or not signals):
            raise _unexpected_end(worker, job.plan, progress)
    _summarise(progress)
    if signals:
        raise typer.Exit(128 + signals[0])


@contextmanager
def _signals_to(worker: Worker) -> Iterator[list[int]]:
    """Hand the first signal on as a wish to stop, and end at once on the second; yields those that came."""
    came: list[int] = []

    def take(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            worker.kill()
            raise typer.Exit(128 + number)
        say("stopping: finishing the step and saving the model; once more ends at once")
        worker.interrupt()

    before = {number: signal.signal(number, take) for number in ENDINGS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _no_longer_fits(plan: Plan, progress: RunProgress, message: str) -> UserError:
    return NothingFitsError(
        f"memory ran out after step {progress.steps} ({message}); the plan measured a peak of "
        f"{gib(plan.memory.measured_peak_bytes)} of {gib(plan.memory.limit_bytes)} free then",
        "another program has taken memory since: close it, or plan again with --auto",
    )


def _unexpected_end(worker: Worker, plan: Plan, progress: RunProgress) -> Exception:
    if worker.was_killed:
        return _no_longer_fits(plan, progress, "killed by signal 9, as an out-of-memory killer does")
    return WorkerCrashedError(f"the worker ended with exit code {worker.exit_code}:\n{worker.last_words()}")


def _summarise(progress: RunProgress) -> None:
    if progress.skipped:
        warn(f"{count(progress.skipped, 'step')} had a gradient that is not finite, and changed no weight")
    if not progress.steps:
        out.print("no step was finished; nothing was trained")
        return
    validation = f", validation {progress.validation_loss:.4f}" if progress.validation_loss is not None else ""
    losses = f"{number(progress.first_loss, '.4f')} -> {number(progress.last_loss, '.4f')}"
    out.print(
        f"{progress.ended} after {progress.steps} steps in {duration(progress.seconds)}: loss {losses}{validation}; "
        f"{progress.tokens / max(progress.seconds, 1e-9):,.0f} tokens/s; "
        f"peak {gib(progress.peak_bytes)}"
    )
    out.print(_against(progress.against))
    out.print(f"model: {progress.model}")


def _against(row: dict[str, Any]) -> str:
    """Say in a line how true the plan was."""
    peak = f"worst case {gib(row['planned_peak_bytes'])}, real peak {gib(row['real_peak_bytes'])}"
    if row["planned_seconds"] is None:
        return f"plan against real: {peak}"
    return f"plan against real: {peak}; {duration(row['planned_seconds'])}, really {duration(row['real_seconds'])}"
