"""Plans side by side."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from autotune.levers import Varied
from autotune.plan import Plan
from cli.render.console import out
from cli.render.units import GIB, short_duration


def print_varied(rows: Sequence[Varied], title: str, *, recommend: bool) -> None:
    """Put plans side by side, one a row, and say which goes through the data in the least time."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("", overflow="fold")
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
    memory, cast = plan.memory, plan.forecast
    peak = memory.measured_peak_bytes or memory.predicted_peak_bytes or 0
    return [
        _batch(plan),
        f"{peak / GIB:.2f}",
        f"{peak / memory.budget_bytes:.0%}",
        f"{memory.host_peak_bytes / GIB:.2f}",
        f"{cast.total_steps:,}" if cast else "-",
        short_duration(cast.seconds_per_epoch) if cast else "-",
        short_duration(cast.total_seconds) if cast else "-",
    ]


def _batch(plan: Plan) -> str:
    """Say how the effective batch is reached: by a product where it is one, else by how many of so many rows."""
    batching = plan.batching
    rows, ranks = batching.micro_batch_size, f" x {batching.world_size}" * (batching.world_size > 1)
    reached = rows * batching.gradient_accumulation_steps * batching.world_size
    if plan.workload.layout == "fixed" and reached == batching.effective_batch_size:
        return f"{rows} x {batching.gradient_accumulation_steps}{ranks} = {reached}"
    return f"{batching.effective_batch_size} in {batching.expected_micro_batches_per_step:.1f} of <= {rows}{ranks}"
