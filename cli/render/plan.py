"""A plan as people read it: what would run, why it is not larger, and the command that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from rich.markup import escape
from rich.table import Table

from autotune.batching import largest_share
from autotune.errands import DataSummary, Preprocessed
from autotune.estimate import ERROR
from autotune.plan import Alternative, CardProcess, Forecast, Layout, Memory, Plan
from autotune.shapes import padding_share
from cli.render.console import out, show_command
from cli.render.data import data_line
from cli.render.explain import trials_in_force
from cli.render.notes import balanced_note
from cli.render.units import count, duration, gib, predicted

MIB = 2**20
OTHERS_NAMED = 5
"""A desktop of Windows has dozens of small ones on its card."""


def print_plan(plan: Plan, facts: Preprocessed, profile: str | None, command: Sequence[str]) -> None:
    """Print what would run, why it is not larger, and the command that runs it."""
    out.print(f"[bold]{batch_line(plan)}[/]\n")
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
    show_command(out, "Train it:", command)


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


def batch_line(plan: Plan) -> str:
    """Say the batch, of plain rows as a product, and that it is exact."""
    batching = plan.batching
    if plan.workload.layout != "fixed":
        return (
            f"effective batch {batching.effective_batch_size}, exactly: {plan.workload.layout} in about "
            f"{batching.expected_micro_batches_per_step:.1f} micro-batches of at most "
            f"{count(batching.micro_batch_size, 'full row')} x {count(batching.world_size, 'rank')}"
        )
    note = balanced_note(batching)
    return (
        f"{count(batching.micro_batch_size, 'row')} x {batching.gradient_accumulation_steps} accumulation "
        f"x {count(batching.world_size, 'rank')} "
        f"= effective batch {batching.effective_batch_size}, exactly" + (f" ({note})" if note else "")
    )


def _plan_rows(plan: Plan, facts: Preprocessed, profile: str | None) -> list[tuple[str, str]]:
    work, machine, memory = plan.workload, plan.hardware, plan.memory
    trained = f", {work.trainable_parameters / 1e6:.1f} M of them trained ({', '.join(work.frozen)} frozen)"
    rows = [
        (
            "Model",
            f"{work.model}, {work.parameters / 1e6:.1f} M parameters{trained * bool(work.frozen)}, {work.task}, "
            f"{work.precision}" + ", loss head in chunks" * (work.loss_head == "chunked"),
        ),
        (
            "Machine",
            f"{machine.device_name}, {gib(machine.device_memory_free_bytes)} free, {machine.cores} cores",
        ),
    ]
    if machine.others:
        rows.append(("On the card", others_line(machine.others)))
    if facts.data is not None:
        rows.insert(1, ("Data", data_line(facts.data)))
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
    rows.append(("Layout", layout_line(plan, facts.data)))
    if plan.forecast is not None:
        cast = plan.forecast
        rows.append(
            (
                "Forecast",
                forecast_line(cast),
            )
        )
    if profile is not None:
        rows.append(("Profile", f"{profile}; chosen {plan.batching.micro_batch_size}"))
    rows.append(("Not larger", why_not_larger(plan)))
    return rows


def forecast_line(cast: Forecast) -> str:
    """Say what a run takes, of what parts, how sure that is, and what a limit of time leaves out."""
    line = (
        f"{cast.total_steps:,} steps ({cast.epochs:g} x {cast.steps_per_epoch:,} in an epoch), about "
        f"{duration(cast.total_seconds)} give or take {cast.error:.0%}: "
        f"{duration(cast.seconds_per_epoch)} an epoch"
    )
    parts = (
        (cast.evaluations * cast.validation_seconds, "in evaluations"),
        (cast.evaluations * cast.answer_seconds, "in answers"),
        ((cast.checkpoints + 1) * cast.saving_seconds, "in checkpoints"),
    )
    told = [f"{duration(seconds)} {what}" for seconds, what in parts if seconds >= WORTH_SAYING * cast.total_seconds]
    line += f", {', '.join(told)}" if told else ""
    if cast.total_steps < cast.asked_steps:
        samples = cast.rows * cast.epochs * cast.total_steps / cast.asked_steps
        line += (
            f"; the time holds {cast.total_steps:,} of {cast.asked_steps:,} steps: "
            f"{cast.total_steps / cast.steps_per_epoch:.2g} epochs, "
            f"or {cast.epochs:g} of {samples / cast.epochs:,.0f} rows (--limit)"
        )
    return line


WORTH_SAYING = 0.02
"""Share of a run's time."""


def layout_line(plan: Plan, data: DataSummary | None) -> str:
    """Say how samples share micro-batches, and what of the work is padding; of plain rows beside it."""
    layout = plan.workload.layout
    if data is None:
        return LAYOUTS[layout]
    batching, limits = plan.batching, plan.workload.limits
    share = largest_share(min(data.samples, batching.effective_batch_size), batching.world_size)
    padding, plain = (
        padding_share(data, x, limits, batching.micro_batch_size, share, plan.workload.starting_tokens)
        for x in (layout, "fixed")
    )
    return f"{LAYOUTS[layout]}: {padding:.0%} padding" + f" (plain rows {plain:.0%})" * (layout != "fixed")


LAYOUTS: dict[Layout, str] = {
    "packed": "packed, several samples a row, none of which sees another",
    "sorted": "sorted, samples of like length together",
    "fixed": "fixed, a row for each sample as it comes",
}


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


def why_not_larger(plan: Plan) -> str:
    """Give the reason in a sentence with its numbers."""
    batching = plan.batching
    rows, safe = batching.micro_batch_size, batching.largest_safe_micro_batch_size
    if batching.limited_by == "effective_batch":
        if plan.workload.layout == "fixed":
            return f"one micro-batch holds all {rows} samples of a rank's step"
        return f"{count(rows, 'full row')} would hold all samples of a rank's step"
    if batching.limited_by == "data":
        return f"one micro-batch of {count(rows, 'row')} holds all samples there are"
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
    failed = [t for t in trials_in_force(plan) if t.micro_batch_size > safe and not t.completed]
    if failed:
        first = min(failed, key=attrgetter("micro_batch_size"))
        how = "took too long" if first.outcome == "timed_out" else "did not fit"
        return f"{first.micro_batch_size} {how} ({first.message})"
    if above.peak_measured:
        return f"{rows} were measured at {gib(above.peak_bytes)}"
    if above.peak_bytes > budget:
        return f"{rows} would take {gib(above.peak_bytes)}"
    return f"{rows} would gain too little for another trial, or come too near the budget"


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
