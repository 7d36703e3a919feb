"""The end of a run as people read it: what was learned, at what speed, and how true its plan was."""

from __future__ import annotations

from typing import Any

from autotune.bottleneck import Spent, bottleneck
from autotune.plan import Plan
from cli.progress import RunProgress
from cli.render.console import tell, warn
from cli.render.units import count, duration, gib, number


def print_run(progress: RunProgress, plan: Plan) -> None:
    """Print what became of a run whose worker has ended."""
    if progress.skipped:
        warn(f"{count(progress.skipped, 'step')} had a gradient that is not finite, and changed no weight")
    if not progress.steps:
        nothing = "nothing was left to train" if progress.ended == "finished" else "no step was finished"
        tell(f"{nothing}; model: {progress.model}" if progress.model else f"{nothing}; nothing was trained")
        return
    validation = f", validation {progress.validation_loss:.4f}" if progress.validation_loss is not None else ""
    losses = f"{number(progress.first_loss, '.4f')} -> {number(progress.last_loss, '.4f')}"
    tell(
        f"{progress.ended} after {progress.steps} steps in {duration(progress.seconds)}: loss {losses}{validation}; "
        f"{progress.tokens / max(progress.seconds, 1e-9):,.0f} tokens/s; "
        f"peak {gib(progress.peak_bytes)}"
    )
    tell(_against(progress.against))
    for line in (_utilization(progress, plan), waiting_line(progress.spent, plan)):
        if line:
            tell(line)
    tell(f"model: {progress.model}")
    if progress.best:
        best, loss = progress.best, number(progress.best["best_loss"], ".4f")
        where = "the last one" if best["best_model"] == progress.model else best["best_model"] or best["best_lost"]
        tell(f"best: {where} (step {best['best_step']}, validation loss {loss})")


def _utilization(progress: RunProgress, plan: Plan) -> str:
    """Say which share of the device's own rate the steps came to, on real tokens."""
    measured = plan.speed if plan.evidence.kind != "estimated" else None
    rate = measured.matrix_flops.get(plan.workload.precision) if measured else None
    if not rate:
        return ""
    return (
        f"utilization: {progress.flops_share / progress.seconds:.0%} of the {rate / 1e12:,.2f} TFLOP/s at which this "
        f"device was measured to multiply {plan.workload.precision} matrices, on real tokens alone"
    )


def waiting_line(spent: Spent, plan: Plan) -> str:
    """Say what kept steps from being faster; empty where nothing is worth saying."""
    found = bottleneck(spent, plan)
    return f"slowest part: {found.share:.0%} {found.what}; {found.advice}" if found else ""


def _against(row: dict[str, Any]) -> str:
    """Say in a line how true the plan was."""
    expected = row["expected_peak_bytes"]
    said = f"plan against real: worst case {gib(row['planned_peak_bytes'])}"
    said += f", expected {gib(expected)}" * (expected is not None) + f", real peak {gib(row['real_peak_bytes'])}"
    if row["planned_seconds"] is not None:
        said += (
            f"; {duration(row['planned_seconds'])} ({row['planned_tokens_per_second']:,.0f} tokens/s), "
            f"really {duration(row['real_seconds'])} ({row['real_tokens_per_second']:,.0f})"
        )
        if row["generation_seconds"]:
            said += f", of which {duration(row['generation_seconds'])} went into answers"
    return said
