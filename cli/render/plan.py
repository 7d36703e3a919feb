"""A plan as people read it: what would run, why it is not larger, and the command that runs it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from autotune.errands import DataSummary, Preprocessed
from autotune.plan import Alternative, Plan
from cli.render.console import out, show_command
from cli.render.data import data_line
from cli.render.sentences import (
    batch_line,
    forecast_line,
    layout_line,
    memory_line,
    nvidia_smi_line,
    others_line,
    why_not_larger,
)
from cli.render.units import count, gib, predicted


def print_plan(plan: Plan, facts: Preprocessed, profile: str | None, command: Sequence[str]) -> None:
    """Print what would run, why it is not larger, and the command that runs it."""
    out.print(f"[bold]{batch_line(plan)}[/]\n")
    table = Table.grid(padding=(0, 3))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in plan_rows(plan, facts.data, profile):
        table.add_row(f"  {name}", escape(text))
    out.print(table)
    out.print()
    out.print(_sizes_table(plan))
    if plan.alternatives:
        out.print(_alternatives_table(plan.alternatives))
    out.print(KINDS[plan.evidence.kind])
    show_command(out, "Train it:", command)


KINDS = {
    "measured": "[bold]Measured[/] on this machine.",
    "cached": "[bold]Measured[/] on this machine before, and held against what is free now; --no-cache measures anew.",
    "estimated": "[bold]Estimated[/] by the trace alone: nothing was run, and the card need not be here. Time is that "
    "of a card that does this work at its dense rates, one operator after another, and never waits for data.",
}


def plan_rows(plan: Plan, data: DataSummary | None, profile: str | None) -> list[tuple[str, str]]:
    """Return what would run and why, by what it is about."""
    work, machine = plan.workload, plan.hardware
    trained = f", {work.trainable_parameters / 1e6:.1f} M of them trained ({', '.join(work.frozen)} frozen)"
    rows = [
        (
            "Model",
            f"{work.model}, {work.parameters / 1e6:.1f} M parameters{trained * bool(work.frozen)}, {work.task}, "
            f"{work.precision}" + ", loss head in chunks" * (work.loss_head == "chunked"),
        ),
        (
            "Machine",
            f"{machine.device_name}, {gib(machine.device_memory_free_bytes)} free, {count(machine.cores, 'core')}",
        ),
    ]
    if machine.others:
        rows.append(("On the card", others_line(machine.others)))
    if data is not None:
        rows.insert(1, ("Data", data_line(data)))
    rows.append(("Memory", memory_line(plan)))
    if machine.device == "cuda":
        rows.append(("nvidia-smi", nvidia_smi_line(plan)))
    if plan.speed is not None:
        rows.append(
            (
                "Speed",
                f"{plan.speed.seconds_per_step:.2f} s a step, {plan.speed.tokens_per_second:,.0f} tokens/s "
                "at full length",
            )
        )
    rows.append(("Layout", layout_line(plan, data)))
    if plan.forecast is not None:
        rows.append(("Forecast", forecast_line(plan)))
    if profile is not None:
        rows.append(("Profile", f"{profile}; chosen {plan.batching.micro_batch_size}"))
    rows.append(("Not larger", why_not_larger(plan)))
    return rows


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
