"""What is going to happen, in one screen, before the first step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from autotune.errands import Preprocessed
from autotune.plan import Plan
from cli.decisions import Decision
from cli.render.console import err, say, show_command, warn
from cli.render.data import data_line
from cli.render.sentences import batch_line, forecast_line, layout_line, memory_line, nvidia_smi_line
from cli.render.units import count, gib
from profiles import Resolved, load_profile

NAMED_ELSEWHERE = ("data", "validation", "model", "output_dir")


def print_banner(
    resolved: Resolved,
    profile: str | None,
    plan: Plan,
    facts: Preprocessed,
    folder: Path,
    decided: Sequence[Decision],
    advised: Sequence[str],
    again: Sequence[str],
) -> None:
    """Print it to stderr: the result of training is not this."""
    work = plan.workload
    frozen = f", {', '.join(work.frozen)} frozen" if work.frozen else ""
    err.print(
        f"[bold]chatlm train[/]: {escape(work.model)}, {work.parameters / 1e6:.1f} M parameters{frozen}, {work.task}, "
        f"{work.stage} -> {escape(str(folder))}"
    )
    rows = _rows(resolved, profile, plan, facts)
    _print_grid((name, text) for name, text in rows if text)
    if decided:
        say("decided for you:")
        _print_grid((name, f"{value}: {reason}") for name, value, reason in decided)
    for text in advised:
        warn(text)
    say("Ctrl-C ends after the step that runs, and saves; see it go: " + f"chatlm monitor {folder}")
    show_command(err, "after a stop:", again)


def _print_grid(rows: Iterator[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(f"  {name}", escape(text))
    err.print(table)


def _rows(resolved: Resolved, profile: str | None, plan: Plan, facts: Preprocessed) -> Iterator[tuple[str, str]]:
    machine, work = plan.hardware, plan.workload
    if profile is not None:
        yield "profile", f"{profile}: {load_profile(profile).get('about', 'of your own')}"
    yield "changed", "; ".join(changes(resolved))
    yield (
        "machine",
        f"{machine.device_name}, {count(machine.cores, 'core')}; memory available: "
        f"{gib(machine.host_memory_available_bytes)}, disk space available: {gib(machine.disk_free_bytes)}",
    )
    yield "batch", batch_line(plan) + _last_step(plan)
    if facts.data is not None:
        yield "data", data_line(facts.data)
    if facts.validation is not None:
        yield "validation", f"{facts.validation.rows:,} rows, {facts.validation.tokens:,} tokens"
    yield "layout", layout_line(plan, facts.data)
    yield (
        "proof",
        f"before the first step, the gradient of {work.layout} rows is held against that of each sample by itself",
    )
    yield "memory", memory_line(plan)
    if machine.device == "cuda":
        yield "nvidia-smi", nvidia_smi_line(plan)
    yield "time", _time(resolved, plan)


def _time(resolved: Resolved, plan: Plan) -> str:
    cast, limit = plan.forecast, resolved.limit
    decayed = ", with the learning rate at its end" if resolved.settings.schedule != "constant" else ""
    by = f"ends by {_clock(limit.ends_at)}{decayed}" if limit else ""
    if cast is None:
        return by
    if limit and cast.total_steps < cast.asked_steps:
        return f"{forecast_line(plan)}; {by}"
    return f"{forecast_line(plan)}; done by about {_clock(time.time() + cast.left_seconds)}"


def _last_step(plan: Plan) -> str:
    """Say how many samples are left for the last step of an epoch, where it is smaller."""
    cast, whole = plan.forecast, plan.batching.effective_batch_size
    left = cast.rows % whole if cast else 0
    return f"; the last step of an epoch has {left}" if left else ""


def _clock(at: float) -> str:
    """Return a moment as a time of day, with its date where it is another day."""
    try:
        then = datetime.fromtimestamp(at).astimezone()
    except (OverflowError, ValueError, OSError):
        return "a day beyond all calendars"
    return f"{then:%H:%M}" if then.date() == datetime.now().astimezone().date() else f"{then:%Y-%m-%d %H:%M}"


def changes(resolved: Resolved) -> list[str]:
    """Say what was given over a profile or a default: old -> new, and where it was."""
    return [
        f"{name} {_shown(before)} -> {_shown(getattr(resolved.settings, name))} ({resolved.origins[name]})"
        for name, before in resolved.replaced.items()
        if name not in NAMED_ELSEWHERE and before != getattr(resolved.settings, name)
    ]


def _shown(value: object) -> str:
    if value in (None, ()):
        return "none"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
