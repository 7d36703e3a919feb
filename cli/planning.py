"""From settings to a plan: reads the machine, has data tokenized, measures or estimates; tells what it does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autotune import cache
from autotune.account import memory_taken, set_budget
from autotune.cards import find_rates
from autotune.errands import Preprocessed
from autotune.errors import ConfigurationError
from autotune.estimate import estimate
from autotune.hardware import read_hardware
from autotune.inputs import PlanInputs
from autotune.measure import SILENT_SECONDS, Workers, trace_sizes
from autotune.plan import Hardware, Plan
from autotune.planner import Planner
from autotune.process import WorkerCrashedError, ask
from cli.launched import launched
from cli.render.console import say, warn
from cli.render.explain import trial_line
from cli.render.notes import data_notes, model_notes, slower_precision
from cli.render.units import count
from cli.wiring import (
    cache_dir,
    make_inputs,
    make_request,
    preprocess_errand,
)
from profiles import Resolved, Settings


@dataclass(frozen=True)
class Remembering:
    """What to make of an earlier plan's measurements."""

    cache: bool
    """Whether to use and keep them."""
    offline: bool
    """Whether to trust them without a look at the machine."""


def measure_or_estimate(resolved: Resolved, remembering: Remembering) -> tuple[Preprocessed, Plan]:
    """Plan by dry steps; where a worker dies of them, or hangs, by the trace alone, which the plan then says."""
    facts, inputs = inputs_of(resolved, search=True, demo=False, offline=remembering.offline)
    try:
        plan = measure(resolved.settings, inputs, remembering, search=True).plan
        assert plan is not None
    except WorkerCrashedError as error:
        warn(f"{error}\nso nothing was measured: this is an estimate, and chatlm train --auto would not begin")
        rates = find_rates(inputs.hardware.device_name, inputs.workload.precision)
        plan = estimate(inputs, rates, trace_sizes)
    return facts, plan


def decide(resolved: Resolved, remembering: Remembering, *, search: bool, demo: bool) -> tuple[Preprocessed, Planner]:
    """Plan, telling of each trial."""
    facts, inputs = inputs_of(resolved, search=search, demo=demo, offline=remembering.offline)
    return facts, measure(resolved.settings, inputs, remembering, search=search)


def inputs_of(
    resolved: Resolved, *, search: bool, demo: bool, offline: bool = False
) -> tuple[Preprocessed, PlanInputs]:
    """Learn what a plan needs; what can be refused without a worker is refused first."""
    hardware, settings = read_hardware_of(resolved.settings), resolved.settings
    request = make_request(resolved, hardware.world_size, search=search, offline=offline)
    facts = preprocess(settings, hardware.cores, demo=demo)
    return facts, make_inputs(resolved, facts, hardware, request)


def measure(settings: Settings, inputs: PlanInputs, remembering: Remembering, *, search: bool) -> Planner:
    """Plan by dry steps, or by what is remembered of earlier ones, telling of each trial."""
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
    now = set_budget(look_at_hardware(settings), request.memory_limit_bytes, request.headroom)
    for note in (slower_precision(planner.plan), memory_taken(planner.plan, now)):
        if note:
            warn(note)
    return planner


def estimate_for(resolved: Resolved, hardware: Hardware) -> tuple[Preprocessed, Plan]:
    """Plan for a card that is not here."""
    settings = resolved.settings
    request = make_request(resolved, hardware.world_size, search=True)
    facts = preprocess(settings, hardware.cores, demo=False)
    inputs = make_inputs(resolved, facts, hardware, request)
    rates = find_rates(hardware.device_name, inputs.workload.precision)
    say("tracing the step, to know what would fit")
    return facts, estimate(inputs, rates, trace_sizes)


def read_hardware_of(settings: Settings) -> Hardware:
    """Read it, and tell at once what people should know of it: a plan may not come."""
    hardware = look_at_hardware(settings)
    for note in hardware.notes:
        warn(note)
    if settings.backend == "nccl" and hardware.device == "cpu":
        raise ConfigurationError(
            "--backend nccl is for cards, and this trains on a processor", "leave it out, or give gloo"
        )
    return hardware


def look_at_hardware(settings: Settings) -> Hardware:
    """Read what there is now, for all ranks."""
    among = launched(settings.ranks)
    hardware = read_hardware(Path(settings.output_dir or "."), among.local_world_size if among else settings.ranks)
    return hardware if among is None else among.share_out(hardware)


def preprocess(settings: Settings, cores: int, *, demo: bool) -> Preprocessed:
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
