"""What `chatlm plan` does: a plan, or tables of what would be otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autotune.cards import find_rates
from autotune.errors import ConfigurationError
from autotune.evidence import alike
from autotune.hardware import imagine_hardware
from autotune.levers import Varied, measured_rates, vary
from autotune.measure import trace_sizes
from autotune.plan import Hardware, Rates, Workload
from cli.options import as_arguments
from cli.planning import (
    Remembering,
    decide,
    estimate_for,
    measure_or_estimate,
    preprocess,
    read_hardware_of,
)
from cli.render.console import print_json, say
from cli.render.explain import print_account, print_trials
from cli.render.plan import print_plan
from cli.render.plot import print_curves
from cli.render.settings import print_config
from cli.render.whatif import print_varied
from cli.whatif import Stage, check_levers, longest_asked, parse_lever
from profiles import Resolved, resolve


def plan_command(
    given: dict[str, Any],
    profile: str | None,
    config: str | None,
    *,
    as_json: bool,
    show_config: bool,
    explain: bool,
    plot: bool,
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
    if plot and (as_json or compare or varied):
        raise ConfigurationError("--plot draws one plan, for people", "leave out --json, --compare and --vary")
    if compare and varied:
        raise ConfigurationError("--compare and --vary are two tables", "give one of them")
    imagined = imagine_hardware(gpu, gpus, Path(resolved.settings.output_dir or ".")) if gpu else None
    if compare or varied:
        levers = [parse_lever(text) for text in varied]
        check_levers(levers, given, profile, config, gpu)
        _print_what_if(_what_if(given, profile, config, levers, imagined, gpu, remembering), compare, as_json)
        return
    if imagined is not None:
        facts, plan = estimate_for(resolved, imagined)
    else:
        facts, plan = measure_or_estimate(resolved, remembering)
    if as_json:
        print_json(plan.to_json())
        return
    sources = {"profile": profile, "config": config}
    typed = as_arguments({name: value for name, value in sources.items() if value} | given)
    print_plan(plan, facts, _profile_line(resolved, profile), ["chatlm", "train", "--auto", *typed])
    if plot:
        print_curves(plan)
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
    hardware = imagined or read_hardware_of(settings)
    facts = preprocess(longest_asked(settings, levers), hardware.cores, demo=False)
    stage = Stage(given, profile, config, hardware, facts, gpu)
    scenes = stage.levers(levers) if levers else stage.profiles()
    measured, plan = None, None
    if imagined is None:
        _, planner = decide(resolved, remembering, search=True, demo=False)
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
