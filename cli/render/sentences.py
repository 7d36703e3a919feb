"""A plan in sentences, for a table, a banner or a page: batch, memory, layout, hours, and why it is not larger."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from autotune.batching import balanced_cuts, largest_share
from autotune.errands import DataSummary
from autotune.estimate import ERROR
from autotune.plan import CardProcess, Layout, Memory, Plan
from autotune.shapes import padding_share
from cli.render.explain import trials_in_force
from cli.render.notes import balanced_note
from cli.render.units import count, duration, gib

MIB = 2**20
OTHERS_NAMED = 5
"""A desktop of Windows has dozens of small ones on its card."""


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
    share = largest_share(batching.effective_batch_size, batching.world_size)
    cuts = balanced_cuts(share, batching.micro_batch_size)
    last = f" (the last {cuts[-1]})" if cuts[-1] < cuts[0] else ""
    return (
        f"{count(batching.micro_batch_size, 'row')} x {batching.gradient_accumulation_steps} accumulation{last} "
        f"x {count(batching.world_size, 'rank')} "
        f"= effective batch {batching.effective_batch_size}, exactly" + (f" ({note})" if note else "")
    )


def memory_line(plan: Plan) -> str:
    """Say what the peak is, at which length, and of which budget."""
    work, memory = plan.workload, plan.memory
    worst = f"{work.max_seq_len}" + (f" + {work.max_target_len}" if work.max_target_len else "")
    return (
        f"peak {_peak(memory)} at full length ({worst} tokens a row) of a budget of {gib(memory.budget_bytes)} = "
        f"{gib(memory.limit_bytes)} ({memory.limit_from}) - {gib(memory.headroom_bytes)} headroom"
    )


def _peak(memory: Memory) -> str:
    if memory.measured_peak_bytes is None:
        return f"{gib(memory.predicted_peak_bytes)}, give or take {ERROR:.0%},"
    expected = memory.expected_peak_bytes
    return gib(memory.measured_peak_bytes) + (f" (on this data {gib(expected)})" if expected else "")


def nvidia_smi_line(plan: Plan) -> str:
    """Say what the card's own tool will show while it trains: everyone's memory."""
    machine, memory = plan.hardware, plan.memory
    others = machine.device_memory_total_bytes - machine.device_memory_free_bytes
    peak = memory.measured_peak_bytes or memory.predicted_peak_bytes or 0
    return (
        f"about {(others + peak) / MIB:,.0f} MiB of {machine.device_memory_total_bytes / MIB:,.0f} MiB during the run"
    )


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


def forecast_line(plan: Plan) -> str:
    """Say what a run takes, of what parts, how sure that is, and what a limit of time leaves out."""
    cast = plan.forecast
    assert cast is not None
    line = f"{count(cast.total_steps, 'step')} ({cast.epochs:g} x {cast.steps_per_epoch:,} in an epoch), about "
    if cast.left_seconds < cast.total_seconds:
        line += f"{duration(cast.left_seconds)} from now on, "
    line += f"{duration(cast.total_seconds)} give or take {cast.error:.0%}: {duration(cast.seconds_per_epoch)} an epoch"
    parts = (
        (cast.evaluations * cast.validation_seconds, "in evaluations"),
        (cast.evaluations * cast.answer_seconds, "in answers"),
        ((cast.checkpoints + 1) * cast.saving_seconds, "in checkpoints"),
    )
    least = max(1.0, WORTH_SAYING * cast.total_seconds)
    told = [f"{duration(seconds)} {what}" for seconds, what in parts if seconds >= least]
    return line + f", {', '.join(told)}" * bool(told) + _left_out(plan)


def _left_out(plan: Plan) -> str:
    """Say what of the steps that were asked for has time, in epochs, and in rows that would have all epochs."""
    cast = plan.forecast
    assert cast is not None
    if cast.total_steps >= cast.asked_steps:
        return ""
    epochs = cast.total_steps / cast.steps_per_epoch
    line = f"; the time holds {cast.total_steps:,} of {cast.asked_steps:,} steps: {epochs:.2g} epochs"
    rows = int(cast.total_steps / cast.epochs) * plan.batching.effective_batch_size
    if plan.workload.stage == "sft" and rows >= plan.batching.effective_batch_size:  # documents are several samples
        line += f", or {cast.epochs:g} of {rows:,} rows (--limit)"
    return line


WORTH_SAYING = 0.02
"""Share of a run's time."""


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
