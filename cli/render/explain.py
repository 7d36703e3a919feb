"""What a plan rests on: the trials, and the itemised account of the peak."""

from __future__ import annotations

from operator import attrgetter

from rich.table import Table

from autotune.plan import Device, Memory, Plan, Trial
from autotune.speed import rows_per_second
from cli.render.console import out
from cli.render.units import GIB, count, gib


def trial_line(trial: Trial, device: Device) -> str:
    """Say in a line what a dry trial came to."""
    settings = [f"malloc {trial.cpu_allocator}"] * (device == "cpu")
    settings += ["gradient checkpointing"] * (trial.gradient_checkpointing == "on")
    rows = count(trial.micro_batch_size, "row") + (f" ({', '.join(settings)})" if settings else "")
    if trial.completed:
        return f"dry steps of {rows}: peak {gib(trial.peak_bytes)}, {trial.seconds:.1f} s in all"
    return f"dry steps of {rows}: {trial.outcome.replace('_', ' ')} ({trial.message}), {trial.seconds:.1f} s in all"


def print_trials(plan: Plan) -> None:
    """List what was tried."""
    if plan.evidence.trials:
        out.print(_trials_table(plan))


def _trials_table(plan: Plan) -> Table:
    table = Table(title="What was measured", title_justify="left", title_style="bold")
    for name in ("rows", "dry steps", "outcome", "peak", "of budget", "predicted", "rows/s"):
        table.add_column(name, justify="left" if name == "outcome" else "right")
    for trial in sorted(trials_in_force(plan), key=attrgetter("micro_batch_size")):
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


def trials_in_force(plan: Plan) -> list[Trial]:
    """Return the trials that the choice rests on: those under the allocator's setting that was chosen."""
    return [t for t in plan.evidence.trials if t.cpu_allocator == plan.workload.cpu_allocator]
