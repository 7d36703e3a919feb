"""What each command does, from settings to result."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autotune import cache
from autotune.account import check_room, memory_taken, set_budget
from autotune.cards import find_rates
from autotune.errands import DataSummary, Preprocessed
from autotune.errors import ConfigurationError, NothingFitsError
from autotune.estimate import estimate
from autotune.evidence import alike
from autotune.hardware import imagine_hardware, read_hardware
from autotune.inputs import PlanInputs
from autotune.levers import Varied, measured_rates, vary
from autotune.measure import SILENT_SECONDS, Workers, trace_sizes
from autotune.plan import Hardware, Plan, Rates, Workload
from autotune.planner import Planner
from autotune.process import WorkerCrashedError, ask
from cli.choices import padding_by_layout
from cli.decisions import advice, decisions
from cli.launched import launched
from cli.lock import hold
from cli.options import as_arguments
from cli.render.banner import print_banner
from cli.render.console import print_json, say, warn
from cli.render.data import print_data, sides
from cli.render.explain import print_account, print_trials, trial_line
from cli.render.notes import data_notes, model_notes, slower_precision
from cli.render.plan import print_plan
from cli.render.settings import print_config
from cli.render.units import count
from cli.render.whatif import print_varied
from cli.runs import Resuming, RunPlace, check_disk, find_run, write_run
from cli.training import Going, Job, follow, time_left, train
from cli.whatif import Stage, check_levers, longest_asked, parse_lever
from cli.wiring import (
    cache_dir,
    check_ranks,
    check_reporting,
    check_same_hardware,
    fit_plan,
    make_inputs,
    make_request,
    make_time_limit,
    memory_wishes,
    preprocess_errand,
    read_plan,
    settings_of_plan,
)
from profiles import Resolved, Settings, resolve


@dataclass(frozen=True)
class Remembering:
    """What to make of an earlier plan's measurements."""

    cache: bool
    """Whether to use and keep them."""
    offline: bool
    """Whether to trust them without a look at the machine."""


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
    compare: bool,
    varied: list[str],
    remembering: Remembering,
) -> None:
    """Plan, by dry steps here or by the trace for a card that is not here, and print the plan."""
    resolved = resolve(given, config, profile)
    if show_config:
        print_config(resolved)
        return
    _check_cards(gpu, gpus, resolved.settings.ranks)
    if compare and varied:
        raise ConfigurationError("--compare and --vary are two tables", "give one of them")
    imagined = imagine_hardware(gpu, gpus, Path(resolved.settings.output_dir or ".")) if gpu else None
    if compare or varied:
        levers = [parse_lever(text) for text in varied]
        check_levers(levers, given, profile, config, gpu)
        _print_what_if(_what_if(given, profile, config, levers, imagined, gpu, remembering), compare, as_json)
        return
    if imagined is not None:
        facts, plan = _estimate(resolved, imagined)
    else:
        facts, plan = _measure_or_estimate(resolved, remembering)
    if as_json:
        print_json(plan.to_json())
        return
    sources = {"profile": profile, "config": config}
    typed = as_arguments({name: value for name, value in sources.items() if value} | given)
    print_plan(plan, facts, _profile_line(resolved, profile), ["chatlm", "train", "--auto", *typed])
    if explain:
        print_trials(plan)
        print_account(plan.memory)


def _check_cards(gpu: str | None, gpus: int, ranks: int) -> None:
    """Raise ConfigurationError where cards are counted that are not named, or counted twice."""
    if gpu is None and gpus > 1:
        raise ConfigurationError("--gpus and --nodes count cards that are named", "give --gpu CARD too")
    if gpu is not None and ranks > 1:
        raise ConfigurationError(
            f"--ranks {ranks}, and ranks are as many as there are of a card that is named",
            f"give --gpus {ranks} in place of --ranks",
        )


def data_command(
    files: list[str],
    given: dict[str, Any],
    profile: str | None,
    config: str | None,
    *,
    as_json: bool,
    show: int,
    show_config: bool,
) -> None:
    """Tokenize data, or find it tokenized, and print what it holds."""
    if files:
        given = given | {"data": [*given.get("data", []), *files]}
    resolved = resolve(given, config, profile)
    if show_config:
        print_config(resolved)
        return
    settings = resolved.settings
    facts = look_at_data(settings, _read_hardware(settings).cores, demo=True, show=show)
    data = facts.data
    assert data is not None
    padding = padding_by_layout(settings, facts)
    if as_json:
        held_out = facts.validation and _as_data(facts.validation)
        tokens = [[token.model_dump() for token in sample] for sample in facts.shown]
        print_json(json.dumps(_as_data(data) | {"padding": padding, "validation": held_out, "shown": tokens}))
    else:
        print_data(data, facts.validation, padding, facts.shown)


def _as_data(data: DataSummary) -> dict[str, Any]:
    """Return a summary with the percentiles that people look for."""
    points = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    lengths = {
        side: {name: data.percentile(i, share) for name, share in points.items()} for i, side in enumerate(sides(data))
    }
    return data.model_dump(mode="json") | {"percentiles": lengths}


def _what_if(
    given: dict[str, Any],
    profile: str | None,
    config: str | None,
    levers: list[tuple[str, list[str]]],
    imagined: Hardware | None,
    gpu: str | None,
    remembering: Remembering,
) -> list[Varied]:
    """Plan as asked, and estimate the other scenes: by the card's rates, or those that the plan measured here."""
    resolved = resolve(given, config, profile)
    settings = resolved.settings
    hardware = imagined or _read_hardware(settings)
    facts = _preprocess(longest_asked(settings, levers), hardware.cores, demo=False)
    stage = Stage(given, profile, config, hardware, facts, gpu)
    scenes = stage.levers(levers) if levers else stage.profiles()
    measured, plan = None, None
    if imagined is None:
        _, planner = _decide(resolved, remembering, search=True, demo=False)
        plan = planner.plan
        assert plan is not None
        traced = [e.traced for e in planner.evidence.explored if alike(e.workload, plan.workload)]
        measured = measured_rates(plan, traced[0] if traced else ())
    say("tracing what is compared")

    def rates_of(workload: Workload) -> Rates | None:
        if plan is not None and workload.precision == plan.workload.precision and measured:
            return measured
        return find_rates(hardware.device_name, workload.precision) if hardware.device == "cuda" else None

    rows = vary(scenes, rates_of, trace_sizes)
    as_asked = "as asked" if levers else "auto"
    return [Varied(as_asked, plan, "") if plan and row.change == as_asked else row for row in rows]


def _print_what_if(rows: list[Varied], compare: bool, as_json: bool) -> None:
    if as_json:
        print_json(json.dumps([row._asdict() for row in rows], default=lambda plan: json.loads(plan.to_json())))
    else:
        print_varied(rows, "Profiles side by side" if compare else "What each lever does", recommend=compare)


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
    remembering: Remembering,
    resuming: Resuming,
) -> None:
    """Plan unless there is a plan, then train it, from the beginning or from a checkpoint."""
    began = datetime.now().astimezone()
    resolved = resolve(given, config, profile)
    if show_config:
        print_config(resolved)
        return
    check_reporting(resolved.settings)
    make_time_limit(resolved.settings, began)  # refused at once, where it is none
    among = launched(resolved.settings.ranks)
    if among is not None and among.rank > 0:
        _follow(resolved.settings)
        return
    folder = find_run(resolved.settings, resuming).folder
    with hold(folder) as lock:
        # Looked at again now that it is ours: one that was just leaving may have left a run, or a checkpoint.
        run = find_run(replace(resolved.settings, output_dir=str(folder)), resuming)
        if resuming and run.resume is None:
            say(f"{run.folder} has no checkpoint: beginning at the start")
        if plan_file:
            job = _planned(resolved, read_plan(plan_file))
        else:
            job = _plan_of(run, resolved) or _plan_job(resolved, remembering, auto=auto)
        check_disk(run.folder, job.plan, job.settings.keep_last, job.hardware)
        assert job.facts.data is not None
        typed = as_arguments(
            {name: value for name, value in (("profile", profile), ("config", config), ("plan", plan_file)) if value}
            | given
            | {"output_dir": str(run.folder)}
        )
        again = ["chatlm", "train", *["--auto"] * auto, *typed, "--resume"]
        by_plan = job.evidence is None
        limit = time_left(job.settings, began)
        print_banner(
            resolved,
            profile,
            job.plan,
            job.facts,
            run.folder,
            decisions(resolved, job.plan, job.facts, by_plan=by_plan),
            advice(job.plan),
            again,
            limit.seconds if limit else None,
        )
        write = partial(write_run, run.folder, resolved, job.settings, job.plan, job.evidence)
        if run.resume is None:
            write()
        train(job, run, lock, Going(write, again, among is None, began))


def _follow(settings: Settings) -> None:
    """Train as one of several ranks that were launched from outside, what the first of them has planned."""
    hardware = _read_hardware(settings)
    facts = _preprocess(settings, hardware.cores, demo=True)
    follow(settings, facts, hardware)


def _plan_of(run: RunPlace, resolved: Resolved) -> Job | None:
    """Obey the plan of the run that goes on, so that it goes on to the bit; None where it cannot be, which is said."""
    if run.plan_file is None:
        return None
    try:
        return _planned(resolved, read_plan(str(run.plan_file)), as_it_was=True)
    except (ConfigurationError, NothingFitsError) as error:
        say(f"the run's own plan cannot be gone on with: {error.message}; planning anew, for the same samples")
        return None


def _plan_job(resolved: Resolved, remembering: Remembering, *, auto: bool) -> Job:
    facts, planner = _decide(resolved, remembering, search=auto, demo=True)
    assert planner.plan is not None
    evidence = planner.evidence.model_dump_json(indent=2)
    return Job(resolved.settings, facts, planner.plan.hardware, planner.plan, evidence)


def _planned(resolved: Resolved, plan: Plan, *, as_it_was: bool = False) -> Job:
    """Take a plan that was made before, here or elsewhere, or, to go on, on hardware that must be the same."""
    settings = settings_of_plan(plan, resolved)
    hardware = _read_hardware(settings)
    check_ranks(plan, hardware)
    if as_it_was:
        check_same_hardware(plan, hardware)
    limit, headroom = memory_wishes(settings)
    check_room(plan, set_budget(hardware, limit, headroom))
    facts = _preprocess(settings, hardware.cores, demo=True)
    return Job(settings, facts, hardware, fit_plan(plan, facts), None)


def _measure_or_estimate(resolved: Resolved, remembering: Remembering) -> tuple[Preprocessed, Plan]:
    """Plan by dry steps; where a worker dies of them, or hangs, by the trace alone, which the plan then says."""
    facts, inputs = _inputs(resolved, search=True, demo=False, offline=remembering.offline)
    try:
        plan = _measure(resolved.settings, inputs, remembering, search=True).plan
        assert plan is not None
    except WorkerCrashedError as error:
        warn(f"{error}\nso nothing was measured: this is an estimate, and chatlm train --auto would not begin")
        rates = find_rates(inputs.hardware.device_name, inputs.workload.precision)
        plan = estimate(inputs, rates, trace_sizes)
    return facts, plan


def _decide(resolved: Resolved, remembering: Remembering, *, search: bool, demo: bool) -> tuple[Preprocessed, Planner]:
    """Plan, telling of each trial."""
    facts, inputs = _inputs(resolved, search=search, demo=demo, offline=remembering.offline)
    return facts, _measure(resolved.settings, inputs, remembering, search=search)


def _inputs(resolved: Resolved, *, search: bool, demo: bool, offline: bool = False) -> tuple[Preprocessed, PlanInputs]:
    """Learn what a plan needs; what can be refused without a worker is refused first."""
    hardware, settings = _read_hardware(resolved.settings), resolved.settings
    request = make_request(resolved, hardware.world_size, search=search, offline=offline)
    facts = _preprocess(settings, hardware.cores, demo=demo)
    return facts, make_inputs(settings, facts, hardware, request)


def _measure(settings: Settings, inputs: PlanInputs, remembering: Remembering, *, search: bool) -> Planner:
    hardware, request = inputs.hardware, inputs.request
    key = (cache_dir(), inputs.workload, hardware, request)
    known = cache.recall(*key) if remembering.cache else None
    if known is not None:
        say("this was planned here before: what was measured then is held against what is free now")
    elif search:
        say("tracing the step, to know what will fit")
    with Workers() as workers:
        planner = Planner(inputs, workers, known)
        for trial in planner.make():
            say(trial_line(trial, hardware.device))
    cache.keep(*key, planner.evidence)
    if (
        search
        and request.micro_batch_size is None
        and not any(explored.traced for explored in planner.evidence.explored)
    ):
        warn("this model cannot be traced: it was planned by dry steps alone")
    assert planner.plan is not None
    now = set_budget(_look_at_hardware(settings), request.memory_limit_bytes, request.headroom)
    for note in (slower_precision(planner.plan), memory_taken(planner.plan, now)):
        if note:
            warn(note)
    return planner


def _estimate(resolved: Resolved, hardware: Hardware) -> tuple[Preprocessed, Plan]:
    """Plan for a card that is not here."""
    settings = resolved.settings
    request = make_request(resolved, hardware.world_size, search=True)
    facts = _preprocess(settings, hardware.cores, demo=False)
    inputs = make_inputs(settings, facts, hardware, request)
    rates = find_rates(hardware.device_name, inputs.workload.precision)
    say("tracing the step, to know what would fit")
    return facts, estimate(inputs, rates, trace_sizes)


def _read_hardware(settings: Settings) -> Hardware:
    """Read it, and tell at once what people should know of it: a plan may not come."""
    hardware = _look_at_hardware(settings)
    for note in hardware.notes:
        warn(note)
    if settings.backend == "nccl" and hardware.device == "cpu":
        raise ConfigurationError(
            "--backend nccl is for cards, and this trains on a processor", "leave it out, or give gloo"
        )
    return hardware


def _look_at_hardware(settings: Settings) -> Hardware:
    among = launched(settings.ranks)
    hardware = read_hardware(Path(settings.output_dir or "."), among.local_world_size if among else settings.ranks)
    return hardware if among is None else among.share_out(hardware)


def _preprocess(settings: Settings, cores: int, *, demo: bool) -> Preprocessed:
    """Learn what the model and the data are, and tell at once what people should know of them."""
    facts = look_at_data(settings, cores, demo=demo)
    for note in model_notes(settings, facts):
        warn(note)
    return facts


def look_at_data(settings: Settings, cores: int, *, demo: bool, show: int = 0) -> Preprocessed:
    """Have data tokenized, or found tokenized, and tell at once what people should know of it."""
    answer: Any = None
    # No limit: gigabytes take hours, and are told of. One that waits for another that tokenizes the same looks, and
    # so uses the processor.
    for event in ask(preprocess_errand(settings, demo=demo, show=show), cores, SILENT_SECONDS):
        if event["event"] == "progress":
            say(f"{event['doing']}: {count(event['rows'], 'row')}")
        elif event["event"] == "result":
            answer = event.get("result")
    try:
        facts = Preprocessed.model_validate(answer)
    except ValidationError as error:
        raise WorkerCrashedError(f"the worker's answer is none: {error}") from None
    for note in data_notes(facts):
        warn(note)
    return facts
