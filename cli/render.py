"""Facts -> what people read. The result goes to stdout, all else to stderr; no colour is needed to understand it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autotune.errands import DataSummary, Preprocessed
from autotune.estimate import ERROR
from autotune.forecast import rows_per_second
from autotune.levers import Varied
from autotune.plan import Alternative, Batching, CardProcess, Device, Memory, Plan, Trial
from cli.wiring import balanced_note, percentile
from profiles import Resolved

GIB = 2**30
MIB = 2**20
OTHERS_NAMED = 5
"""A desktop of Windows has dozens of small ones on its card."""
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Tell on stderr what is being done."""
    err.print(escape(text))


def warn(text: str) -> None:
    """Tell on stderr what the user should know."""
    err.print(f"[bold yellow]warning:[/] {escape(text)}")


def fail(message: str, hint: str) -> None:
    """Tell on stderr what went wrong, and what to do."""
    err.print(f"[bold red]error:[/] {escape(message)}")
    if hint:
        err.print(f"[bold]hint:[/] {escape(hint)}")


def print_json(text: str) -> None:
    """Give the result as data, untouched by any rendering."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def gib(size: int | None) -> str:
    """Render bytes as GiB."""
    return "-" if size is None else f"{size / GIB:.2f} GiB"


def number(value: float | None, how: str) -> str:
    """Render a number that need not be one: a loss may overflow."""
    return "not finite" if value is None else format(value, how)


def count(number: int, noun: str) -> str:
    """Render a number of things: 1 row, 3,000 rows."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def duration(seconds: float) -> str:
    """Render a time as people say it: 42 s, 3 min, 2 h 10 min, 4 d 3 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def short_duration(seconds: float) -> str:
    """Render a time in six characters: 42 s, 3.5 m, 2.2 h, 4.1 d."""
    for unit, name, until in ((1, "s", 90), (60, "m", 5400), (3600, "h", 172_800)):
        if seconds < until:
            return f"{seconds:.0f} s" if unit == 1 else f"{seconds / unit:.1f} {name}"
    return f"{seconds / 86_400:.1f} d"


def trial_line(trial: Trial, device: Device) -> str:
    """Say in a line what a dry trial came to."""
    settings = [f"malloc {trial.cpu_allocator}"] * (device == "cpu")
    settings += ["gradient checkpointing"] * (trial.gradient_checkpointing == "on")
    rows = count(trial.micro_batch_size, "row") + (f" ({', '.join(settings)})" if settings else "")
    if trial.completed:
        return f"dry steps of {rows}: peak {gib(trial.peak_bytes)}, {trial.seconds:.1f} s in all"
    return f"dry steps of {rows}: {trial.outcome.replace('_', ' ')} ({trial.message}), {trial.seconds:.1f} s in all"


def print_plan(plan: Plan, facts: Preprocessed, profile: str | None, command: str) -> None:
    """Print what would run, why it is not larger, and the command that runs it."""
    batching = plan.batching
    out.print(f"[bold]{batch_line(batching)}[/]\n")
    table = Table.grid(padding=(0, 3))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _plan_rows(plan, facts, profile):
        table.add_row(f"  {name}", escape(text))
    out.print(table)
    out.print()
    out.print(_sizes_table(plan))
    if plan.alternatives:
        out.print(_alternatives_table(plan.alternatives))
    out.print(KINDS[plan.evidence.kind])
    out.print(f"[bold]Train it:[/]  {escape(command)}")


KINDS = {
    "measured": "[bold]Measured[/] on this machine.",
    "cached": "[bold]Measured[/] on this machine before, and held against what is free now; --no-cache measures anew.",
    "estimated": "[bold]Estimated[/] by the trace alone: nothing was run, and the card need not be here. Time is that "
    "of a card that does this work at its dense rates, one operator after another, and never waits for data.",
}


def _peak(memory: Memory) -> str:
    if memory.measured_peak_bytes is None:
        return f"{gib(memory.predicted_peak_bytes)}, give or take {ERROR:.0%},"
    expected = memory.expected_peak_bytes
    return gib(memory.measured_peak_bytes) + (f" (on this data {gib(expected)})" if expected else "")


def _nvidia_smi(plan: Plan) -> str:
    """Say what the card's own tool will show while it trains: everyone's memory."""
    machine, memory = plan.hardware, plan.memory
    others = machine.device_memory_total_bytes - machine.device_memory_free_bytes
    peak = memory.measured_peak_bytes or memory.predicted_peak_bytes or 0
    return (
        f"about {(others + peak) / MIB:,.0f} MiB of {machine.device_memory_total_bytes / MIB:,.0f} MiB during the run"
    )


def batch_line(batching: Batching) -> str:
    """Say the batch as a product, and that it is exact."""
    note = balanced_note(batching)
    return (
        f"{count(batching.micro_batch_size, 'row')} x {batching.gradient_accumulation_steps} accumulation "
        f"x {count(batching.world_size, 'rank')} "
        f"= effective batch {batching.effective_batch_size}, exactly" + (f" ({note})" if note else "")
    )


def _plan_rows(plan: Plan, facts: Preprocessed, profile: str | None) -> list[tuple[str, str]]:
    work, machine, memory = plan.workload, plan.hardware, plan.memory
    rows = [
        ("Model", f"{work.model}, {work.parameters / 1e6:.1f} M parameters, {work.task}, {work.precision}"),
        (
            "Machine",
            f"{machine.device_name}, {gib(machine.device_memory_free_bytes)} free, {machine.cores} cores",
        ),
    ]
    if machine.others:
        rows.append(("On the card", others_line(machine.others)))
    if facts.data is not None:
        rows.insert(1, ("Data", _data_line(facts.data)))
    worst = f"{work.max_seq_len}" + (f" + {work.max_target_len}" if work.max_target_len else "")
    rows.append(
        (
            "Memory",
            f"peak {_peak(memory)} at full length ({worst} tokens a row) of a budget of "
            f"{gib(memory.budget_bytes)} = {gib(memory.limit_bytes)} ({memory.limit_from}) "
            f"- {gib(memory.headroom_bytes)} headroom",
        )
    )
    if machine.device == "cuda":
        rows.append(("nvidia-smi", _nvidia_smi(plan)))
    if plan.speed is not None:
        rows.append(
            (
                "Speed",
                f"{plan.speed.seconds_per_step:.2f} s a step, {plan.speed.tokens_per_second:,.0f} tokens/s "
                "at full length",
            )
        )
    if plan.forecast is not None:
        cast = plan.forecast
        rows.append(
            (
                "Forecast",
                f"{cast.total_steps:,} steps ({cast.epochs:g} x {cast.steps_per_epoch:,} in an epoch), "
                f"about {duration(cast.total_seconds)}",
            )
        )
    if profile is not None:
        rows.append(("Profile", f"{profile}; chosen {plan.batching.micro_batch_size}"))
    rows.append(("Not larger", why_not_larger(plan)))
    return rows


def others_line(others: Sequence[CardProcess]) -> str:
    """Name who else is on the card, with what they hold where that is known; the largest come first."""
    named = [
        (process.name or f"process {process.process_id}") + (f" ({gib(process.bytes)})" if process.bytes else "")
        for process in others[:OTHERS_NAMED]
    ]
    if len(others) > OTHERS_NAMED:
        named.append(f"{len(others) - OTHERS_NAMED} more")
    total = sum(process.bytes or 0 for process in others)
    return "taken by others: " + (f"{gib(total)}: " if total else "") + ", ".join(named)


def _data_line(data: DataSummary) -> str:
    sides = ("source", "target") if len(data.lengths) == 2 else ("length",)
    lengths = "; ".join(
        f"{side} half up to {percentile(data, i, 0.5)}, 95 % up to {percentile(data, i, 0.95)}, "
        f"longest {data.longest(i)}"
        for i, side in enumerate(sides)
    )
    return (
        f"{data.rows:,} rows, {data.stage}, {data.tokens:,} tokens, {data.target_tokens / data.tokens:.0%} of them "
        f"trained on; {lengths}"
    )


def why_not_larger(plan: Plan) -> str:
    """Give the reason in a sentence with its numbers."""
    batching = plan.batching
    rows, safe = batching.micro_batch_size, batching.largest_safe_micro_batch_size
    if batching.limited_by == "effective_batch":
        return f"one micro-batch holds all {rows} samples of a rank's step"
    if batching.limited_by == "data":
        return f"there are no more than {rows} samples a rank"
    if batching.limited_by == "user":
        return "this size was given" + ", and measured; --auto would search" * bool(plan.evidence.trials)
    if batching.limited_by == "speed":
        return f"{safe} rows are safe, but {rows} were measured to be faster; --prefer largest takes {safe}"
    if not plan.evidence.trials:
        return f"{safe} rows are the most that the trace lets fit, {_next_size_up(plan)}"
    reason = f"{safe} rows are the largest safe micro-batch, {_next_size_up(plan)}"
    if rows < safe:
        reason += f"; {batching.gradient_accumulation_steps} equal micro-batches of {rows} reach the step"
    return reason


def _next_size_up(plan: Plan) -> str:
    """Say why the next size that would save a micro-batch is not taken."""
    safe, budget = plan.batching.largest_safe_micro_batch_size, plan.memory.budget_bytes
    above = min((row for row in plan.sizes if row.micro_batch_size > safe), key=attrgetter("micro_batch_size"))
    rows = f"{above.micro_batch_size}, the next that would save a micro-batch,"
    failed = [t for t in _in_force(plan) if t.micro_batch_size > safe and not t.completed]
    if failed:
        first = min(failed, key=attrgetter("micro_batch_size"))
        how = "took too long" if first.outcome == "timed_out" else "did not fit"
        return f"{first.micro_batch_size} {how} ({first.message})"
    if above.peak_measured:
        return f"{rows} were measured at {gib(above.peak_bytes)}"
    if above.peak_bytes > budget:
        return f"{rows} would take {gib(above.peak_bytes)}"
    return f"{rows} would gain too little for another trial, or come too near the budget"


def print_account(memory: Memory) -> None:
    """List what the peak is made of, and the peak of each phase, the one that binds marked."""
    peak = memory.measured_peak_bytes or memory.predicted_peak_bytes or 0
    items = Table(title="What the peak is made of", title_justify="left", title_style="bold")
    phases = Table(title="Peak of each phase", title_justify="left", title_style="bold")
    for table, rows in ((items, memory.items), (phases, memory.phases)):
        for name, justify in (("", "left"), ("bytes", "right"), ("GiB", "right"), ("of peak", "right")):
            table.add_column(name, justify="left" if justify == "left" else "right")
        binding = max(rows.values(), default=0) if table is phases else None
        for name, size in rows.items():
            mark = " <- binds" if size == binding else ""
            table.add_row(name.replace("_", " ") + mark, f"{size:,}", f"{size / GIB:.2f}", f"{size / peak:.0%}")
    out.print(items)
    out.print(phases)


def _in_force(plan: Plan) -> list[Trial]:
    """Return the trials that the choice rests on: those under the allocator's setting that was chosen."""
    return [t for t in plan.evidence.trials if t.cpu_allocator == plan.workload.cpu_allocator]


def _sizes_table(plan: Plan) -> Table:
    table = Table(title="Micro-batches", title_justify="left", title_style="bold")
    whole = plan.hardware.device_memory_total_bytes
    of = "of the card" if plan.hardware.device == "cuda" else "of memory"
    for name in ("rows", "peak", of, "samples/s", ""):
        table.add_column(name, justify="left" if name == "" else "right")
    for row in plan.sizes:
        speed = f"{row.samples_per_second:,.1f}" if row.samples_per_second else "-"
        chosen = "<- chosen" if row.micro_batch_size == plan.batching.micro_batch_size else ""
        if row.micro_batch_size > plan.batching.largest_safe_micro_batch_size:
            chosen = "over" if row.peak_bytes > plan.memory.budget_bytes else "not tried"
        table.add_row(
            str(row.micro_batch_size),
            gib(row.peak_bytes) + predicted(measured=row.peak_measured),
            f"{row.peak_bytes / whole:.0%}",
            speed + predicted(measured=row.speed_measured or not row.samples_per_second),
            chosen,
        )
    if not all(row.peak_measured and row.speed_measured for row in plan.sizes):
        table.caption, table.caption_justify = "~ predicted", "left"
    return table


def predicted(*, measured: bool) -> str:
    """Mark what was not measured."""
    return "" if measured else " ~"


def _alternatives_table(alternatives: Sequence[Alternative]) -> Table:
    table = Table(title="What it was weighed against", title_justify="left", title_style="bold")
    for name in ("", "largest", "accumulation", "peak", "a step takes"):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=name == "")
    timed = any(other.seconds_per_step for other in alternatives)
    for other in alternatives:
        mark = predicted(measured=other.measured)
        seconds = other.seconds_per_step
        table.add_row(
            escape(other.change),
            count(other.largest_micro_batch_size, "row"),
            str(other.gradient_accumulation_steps),
            gib(other.peak_bytes) + mark,
            f"{seconds:.2f} s{mark}" if seconds else "no less" if timed else "-",
        )
    return table


def print_varied(rows: Sequence[Varied], title: str, *, recommend: bool) -> None:
    """Put plans side by side, one a row, and say which goes through the data in the least time."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("", overflow="fold", max_width=18)
    for name in ("batch", "GiB", "budget", "host", "steps", "epoch", "in all"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        mark = "" if _is_measured(row) else "~ "
        table.add_row(mark + escape(row.change), *(_varied_cells(row.plan) if row.plan else ["does not fit"]))
    out.print(table)
    for row in rows:
        if row.plan is None:
            out.print(f"{escape(row.change)}: {escape(row.refusal)}")
    out.print(
        "~ estimated by the trace" + "; times at the rates that were measured here" * any(map(_is_measured, rows))
    )
    forecasts = [(row.plan.forecast.seconds_per_epoch, row.change) for row in rows if row.plan and row.plan.forecast]
    if recommend and len(forecasts) > 1:
        (least, fastest), (most, slowest) = min(forecasts), max(forecasts)
        out.print(f"The least time for an epoch: {escape(fastest)}, {most / least:.1f} times as fast as {slowest}")


def _is_measured(row: Varied) -> bool:
    return row.plan is not None and row.plan.memory.measured_peak_bytes is not None


def _varied_cells(plan: Plan) -> list[str]:
    memory, batching, cast = plan.memory, plan.batching, plan.forecast
    peak = memory.measured_peak_bytes or memory.predicted_peak_bytes or 0
    return [
        f"{batching.micro_batch_size} x {batching.gradient_accumulation_steps}"
        + f" x {batching.world_size}" * (batching.world_size > 1)
        + f" = {batching.effective_batch_size}",
        f"{peak / GIB:.2f}",
        f"{peak / memory.budget_bytes:.0%}",
        f"{memory.host_peak_bytes / GIB:.2f}",
        f"{cast.total_steps:,}" if cast else "-",
        short_duration(cast.seconds_per_epoch) if cast else "-",
        short_duration(cast.total_seconds) if cast else "-",
    ]


def print_trials(plan: Plan) -> None:
    """List what was tried."""
    if plan.evidence.trials:
        out.print(_trials_table(plan))


def _trials_table(plan: Plan) -> Table:
    table = Table(title="What was measured", title_justify="left", title_style="bold")
    for name in ("rows", "dry steps", "outcome", "peak", "of budget", "predicted", "rows/s"):
        table.add_column(name, justify="left" if name == "outcome" else "right")
    for trial in sorted(_in_force(plan), key=attrgetter("micro_batch_size")):
        share = f"{trial.peak_bytes / plan.memory.budget_bytes:.0%}" if trial.peak_bytes else "-"
        mark = " <- chosen" if trial.micro_batch_size == plan.batching.micro_batch_size else ""
        speed = rows_per_second(trial)
        table.add_row(
            str(trial.micro_batch_size),
            str(len(trial.timings)),
            trial.outcome.replace("_", " ") + mark,
            gib(trial.peak_bytes),
            share,
            gib(trial.predicted_peak_bytes),
            f"{speed:.1f}" if speed else "-",
        )
    return table


def print_profiles(profiles: Mapping[str, Mapping[str, Any]]) -> None:
    """List profiles with what they set."""
    table = Table()
    for name in ("profile", "per GPU", "effective", "epochs", "other values", "for"):
        table.add_column(name, overflow="fold")
    shown = ("batch_size_per_gpu", "effective_batch_size", "epochs")
    for name, values in profiles.items():
        other = ", ".join(
            f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in values.items()
            if k not in (*shown, "about")
        )
        table.add_row(name, *(str(values.get(key, "-")) for key in shown), other, str(values.get("about", "")))
    out.print(table)


def print_config(resolved: Resolved) -> None:
    """List every value and where it came from."""
    table = Table()
    for name in ("setting", "value", "from"):
        table.add_column(name, overflow="fold")
    for name, value in vars(resolved.settings).items():
        shown = "-" if value in (None, ()) else " ".join(value) if isinstance(value, tuple) else str(value)
        table.add_row(name, escape(shown), escape(resolved.origins[name]))
    out.print(table)
