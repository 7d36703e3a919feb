"""What may be used of a device, and what a plan's peak is made of. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autotune.errands import TraceReport
from autotune.errors import NothingFitsError
from autotune.evidence import traced_bytes, traced_items
from autotune.plan import Hardware, Memory, Plan, Traced, Trial, Workload

GIB = 2**30
MIB = 2**20
HEADROOM_SHARE = 0.05
LEAST_HEADROOM_BYTES = {"cuda": 256 * MIB, "cpu": 128 * MIB}
"""On a processor the kernels that oneDNN keeps for shapes no dry step had: 50 MiB were seen over an epoch."""
DRIFT = {"cuda": 0.0, "cpu": 0.02}
"""By which the peak of a few dry steps may lie below that of many: glibc's heap is not the same in any two steps."""
LIBRARIES_BYTES = 48 * MIB
"""What the libraries take on a processor once steps run: kernels, buffers; 25 to 89 MiB were seen, 44 as a rule."""
CUDA_CONTEXT_BYTES = 500 * MIB
"""Of a process on a card before it has a tensor: 226 MiB (L4) to 501 MiB (A100) were published; a trial then tells."""
RANKS_BYTES = 256 * MIB
"""What several ranks take on each card: NCCL's buffers, a bucket of gradients. An assumption until it is measured."""
ALLOCATOR_SHARE = 0.05
"""What CUDA's allocator keeps beyond what is live: 1.5 to 6.4 % were published, and 5 % are commonly charged."""
AMPLE = 1.75
"""glibc's fast setting may hold so many times what it held in a trial: 1.53 was seen over 152 steps of one shape."""


@dataclass(frozen=True)
class Budget:
    """What may be used of a device."""

    limit_bytes: int
    limit_from: str
    headroom_bytes: int

    @property
    def budget_bytes(self) -> int:
        """What remains."""
        return self.limit_bytes - self.headroom_bytes

    def __str__(self) -> str:
        """Say what it comes from."""
        return (
            f"the budget is {self.budget_bytes / GIB:.2f} GiB ({self.limit_bytes / GIB:.2f} GiB by {self.limit_from}, "
            f"less {self.headroom_bytes / GIB:.2f} GiB of headroom)"
        )


def set_budget(hardware: Hardware, memory_limit_bytes: int | None, headroom: float | None) -> Budget:
    """Take the least of what is free and what the user allows, and keep the headroom back.

    Headroom is bytes from 1 on, below 1 a share of the limit, None the default.
    """
    limit, source = hardware.device_memory_free_bytes, "free device memory"
    if hardware.device == "cpu":
        source = hardware.host_memory_limited_by
    if memory_limit_bytes is not None and memory_limit_bytes < limit:
        limit, source = memory_limit_bytes, "--memory-limit"
    if headroom is None:
        back = max(HEADROOM_SHARE * limit, LEAST_HEADROOM_BYTES[hardware.device])
    else:
        back = headroom if headroom >= 1 else headroom * limit
    if back >= limit:
        raise NothingFitsError(
            f"the limit of {limit / GIB:.2f} GiB ({source}) leaves nothing after {back / GIB:.2f} GiB of headroom",
            "close other programs, raise --memory-limit or lower --headroom",
        )
    return Budget(limit, source, round(back))


def host_budget(hardware: Hardware) -> int:
    """Return what training may hold of the host's memory, in bytes."""
    available = hardware.host_memory_available_bytes
    return round(available - max(HEADROOM_SHARE * available, LEAST_HEADROOM_BYTES["cpu"]))


def check_room(plan: Plan, budget: Budget) -> None:
    """Raise NothingFitsError where a plan that was made earlier, or elsewhere, needs more than there is now."""
    peak = _most(plan)
    if peak > budget.budget_bytes:
        raise NothingFitsError(
            f"the plan may hold {peak / GIB:.2f} GiB at its peak, and now {budget}",
            "close other programs, or plan again with --auto: the effective batch stays the same",
        )


def memory_taken(plan: Plan, now: Budget) -> str:
    """Say that another program has taken memory, as this was planned, which the plan counts on; else ""."""
    peak = _most(plan)
    if peak <= now.limit_bytes:
        return ""
    return (
        f"memory was taken while this was planned: it may hold {peak / GIB:.2f} GiB at its peak, and of "
        f"{plan.memory.limit_bytes / GIB:.2f} GiB that were free then {now.limit_bytes / GIB:.2f} GiB are"
    )


def _most(plan: Plan) -> int:
    """Return the bytes that a plan may hold: glibc's fast setting keeps more than is live."""
    peak = plan.memory.measured_peak_bytes or plan.memory.predicted_peak_bytes or 0
    return round(AMPLE * peak) if plan.workload.cpu_allocator == "fast" else peak


def check_host(hardware: Hardware, workload: Workload, trial: Trial) -> None:
    """Raise NothingFitsError where the card has room and the host has none: fewer rows would not change that.

    Every rank holds what a worker held, and the first one the weights once more while it saves them. A card that shares
    the host's memory holds its own there too.
    """
    ranks = hardware.local_world_size * (trial.host_peak_bytes or 0)
    saving = 4 * workload.parameters
    shared = trial.peak_bytes or 0 if hardware.device_memory_total_bytes == hardware.host_memory_total_bytes else 0
    needed, budget = ranks + saving + shared, host_budget(hardware)
    if hardware.device == "cuda" and needed > budget:
        raise NothingFitsError(
            f"training holds {needed / GIB:.2f} GiB of host memory ({ranks / GIB:.2f} GiB for "
            f"{hardware.local_world_size} ranks here, {saving / GIB:.2f} GiB to save the weights"
            + f", {shared / GIB:.2f} GiB of the card's"
            * (shared > 0)
            + f"), and the budget there is {budget / GIB:.2f} GiB ({hardware.host_memory_available_bytes / GIB:.2f} "
            f"GiB by {hardware.host_memory_limited_by}, less headroom)",
            "close other programs",
        )


def process_bytes(report: TraceReport, hardware: Hardware) -> int:
    """Return what is held besides tensors, as far as is known before anything was tried."""
    if hardware.device == "cpu":
        return report.process_bytes + LIBRARIES_BYTES
    return CUDA_CONTEXT_BYTES + (RANKS_BYTES if hardware.world_size > 1 else 0)


def state_bytes(workload: Workload) -> int:
    """Return the bytes of fp32 weights and gradients, and of the optimizer's state."""
    return 4 * (workload.parameters + workload.trainable_parameters) + workload.optimizer_state_bytes


def measured_account(
    budget: Budget, hardware: Hardware, workload: Workload, report: TraceReport, trial: Trial
) -> Memory:
    """Draw up the account of a size that was verified."""
    assert trial.peak_bytes is not None
    assert trial.resident_bytes is not None
    return Memory(
        **_limits(budget),
        predicted_peak_bytes=trial.predicted_peak_bytes,
        measured_peak_bytes=trial.peak_bytes,
        expected_peak_bytes=trial.expected_peak_bytes,
        phases=trial.phases,
        items=_measured_items(workload, report, hardware, trial),
        host_budget_bytes=budget.budget_bytes if hardware.device == "cpu" else host_budget(hardware),
        host_peak_bytes=trial.host_peak_bytes or 0,
    )


def estimated_account(budget: Budget, hardware: Hardware, report: TraceReport, rows: int, peak_bytes: int) -> Memory:
    """Draw up the account of a size by the trace alone."""
    items = {name: round(size) for name, size in traced_items(report.traced, rows).items()}
    items["process"] = process_bytes(report, hardware)
    items["allocator"] = peak_bytes - sum(items.values())
    return Memory(
        **_limits(budget),
        predicted_peak_bytes=peak_bytes,
        measured_peak_bytes=None,
        expected_peak_bytes=None,
        phases={name: round(size) for name, size in traced_bytes(report.traced, rows).items()},
        items=items,
        host_budget_bytes=host_budget(hardware),
        host_peak_bytes=peak_bytes if hardware.device == "cpu" else report.process_bytes,
    )


def _limits(budget: Budget) -> dict[str, int | str]:
    return {
        "limit_bytes": budget.limit_bytes,
        "limit_from": budget.limit_from,
        "headroom_bytes": budget.headroom_bytes,
        "budget_bytes": budget.budget_bytes,
    }


def _measured_items(workload: Workload, report: TraceReport, hardware: Hardware, trial: Trial) -> dict[str, int]:
    """Say what the peak is made of, by the trace where there is one; what is held beyond it is the process."""
    assert trial.peak_bytes is not None
    if not report.traced:
        return itemise(workload, trial.resident_bytes or 0, trial.peak_bytes)
    return itemise_by_trace(report.traced, trial.micro_batch_size, trial.peak_bytes, process_bytes(report, hardware))


def itemise(workload: Workload, resident_bytes: int, peak_bytes: int) -> dict[str, int]:
    """Say what the peak is made of: weights, gradients, optimizer state, the process, and what grows with rows."""
    items = {
        "weights": 4 * workload.parameters,
        "gradients": 4 * workload.trainable_parameters,
        "optimizer_state": workload.optimizer_state_bytes,
    }
    items["process"] = max(0, resident_bytes - sum(items.values()))
    items["activations_and_temporaries"] = max(0, peak_bytes - sum(items.values()))
    return items


def itemise_by_trace(traced: Sequence[Traced], rows: int, peak_bytes: int, process: int) -> dict[str, int]:
    """Say what a measured peak is made of. A trace that is too high is so in what grows with rows."""
    items = traced_items(traced, rows)
    # The process is there in any case.
    room = max(0, peak_bytes - process)
    scale = min(1.0, room / max(1.0, sum(items.values())))
    whole = {name: int(scale * size) for name, size in items.items()}
    process = min(process, peak_bytes)
    return whole | {"process": process, "allocator": peak_bytes - sum(whole.values()) - process}
