"""Other ways to take the same step: what needs less memory, and what each would come to by its trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from autotune.account import ALLOCATOR_SHARE, DRIFT, process_bytes
from autotune.batching import balanced_cuts
from autotune.errands import TraceReport
from autotune.evidence import MemoryModel, fit
from autotune.explore import TraceSizes
from autotune.plan import Alternative, Hardware, SizeRow, Workload
from autotune.search import largest_predicted, sizes_to_trace

GIB = 2**30
KEPT = {"cuda": ALLOCATOR_SHARE, "cpu": DRIFT["cpu"]}
"""By which a process holds more than its tensors and what it began with."""
SHORTEST_SEQUENCE = 64
ENCODER = ("embedding", "encoder")
"""What is frozen when a T5 is fine-tuned as ChatLM-mini-Chinese's was: half of its weights."""
CHECKPOINTING = "--gradient-checkpointing on"


def milder(workload: Workload, hardware: Hardware) -> list[tuple[str, Workload]]:
    """List changes that need less memory, each with the options that make it.

    Each of them needs less than the one before; at last, of full length, an optimizer that keeps
    next to nothing, and what trains half of a T5.
    """
    changes = []
    if workload.gradient_checkpointing == "off":
        workload = checkpointed(workload)
        changes.append((CHECKPOINTING, workload))
    if workload.precision == "fp32" and hardware.fast_bf16:
        changes.append((f"{CHECKPOINTING} --precision bf16", _with(workload, precision="bf16")))
    length = max(workload.max_seq_len, workload.max_target_len)
    while (length := length // 2) >= SHORTEST_SEQUENCE:
        source, target = min(workload.max_seq_len, length), min(workload.max_target_len, length)
        options = f"{CHECKPOINTING} --max-seq-len {source}"
        if workload.task == "seq2seq":
            options += f" --max-target-len {target}"
        changes.append((options, _with(workload, max_seq_len=source, max_target_len=target)))
    if workload.optimizer == "adamw":
        changes.append((f"{CHECKPOINTING} --optimizer adafactor", _with(workload, optimizer="adafactor")))
    if workload.task == "seq2seq" and workload.stage == "sft" and not workload.frozen:
        options = f"{CHECKPOINTING} --freeze {','.join(ENCODER)}"
        changes.append((options, _with(workload, frozen=ENCODER)))
    return changes


def checkpointed(workload: Workload) -> Workload:
    """Return the workload with gradient checkpointing."""
    return _with(workload, gradient_checkpointing="on")


def _with(workload: Workload, **changes: object) -> Workload:
    return workload.model_copy(update=changes)


def estimated_peak(model: MemoryModel, rows: int, hardware: Hardware) -> int:
    """Return the bytes that a step of so many rows would hold, by the trace alone."""
    return round(model.peak_bytes(rows) * (1 + KEPT[hardware.device]))


def estimated_largest(model: MemoryModel, budget_bytes: int, sizes: Sequence[int], hardware: Hardware) -> int:
    """Return the largest of these sizes that would fit by the trace alone, 0 if none does."""
    return largest_predicted(model, round(budget_bytes / (1 + KEPT[hardware.device])), sizes)


def by_trace(
    change: str, report: TraceReport, hardware: Hardware, budget_bytes: int, sizes: Sequence[int]
) -> Alternative:
    """Say what a change would come to."""
    model = fit((), report.traced, process_bytes(report, hardware))
    assert model is not None
    largest = estimated_largest(model, budget_bytes, sizes, hardware)
    return Alternative(
        change=change,
        largest_micro_batch_size=largest,
        gradient_accumulation_steps=len(balanced_cuts(sizes[-1], max(1, largest))),
        peak_bytes=estimated_peak(model, max(1, largest), hardware),
        seconds_per_step=None,
        measured=False,
    )


def what_would_fit(
    trace: TraceSizes, workload: Workload, hardware: Hardware, budget_bytes: int, sizes: Sequence[int]
) -> list[Alternative]:
    """Trace the changes that need less memory, mildest first, and say what each would come to."""
    changes = milder(workload, hardware)
    reports = trace([changed for _, changed in changes], hardware, sizes_to_trace(sizes[-1]))
    return [
        by_trace(name, report, hardware, budget_bytes, sizes)
        for (name, _), report in zip(changes, reports, strict=False)
    ]


def size_rows(
    peak_of: Callable[[int], int],
    largest: int,
    chosen: int,
    useful: Sequence[int],
    measured: Mapping[int, int],
    speed_of: Callable[[int], tuple[float, bool] | None],
) -> tuple[SizeRow, ...]:
    """Tell of 1, 2, 4 ... rows, the chosen, the largest that fits and the next one up: what they hold and how fast.

    `peak_of` predicts bytes, `measured` has those that were measured, by rows; `speed_of` tells the seconds of a
    sample, and whether they were measured.
    """
    next_up = next((size for size in useful if size > largest), largest)
    sizes = {1 << power for power in range(largest.bit_length())} | {chosen, largest, next_up}
    rows = []
    for size in sorted(sizes):
        seconds, timed = speed_of(size) or (None, False)
        peak = measured.get(size)
        rows.append(
            SizeRow(
                micro_batch_size=size,
                peak_bytes=peak_of(size) if peak is None else peak,
                samples_per_second=1 / seconds if seconds else None,
                peak_measured=peak is not None,
                speed_measured=timed,
            )
        )
    return tuple(rows)


def advise(alternatives: Sequence[Alternative]) -> str:
    """List the changes that would fit; if none does, say so."""
    fits = [a for a in alternatives if a.largest_micro_batch_size]
    if not fits:
        return "nothing that was tried by the trace would fit either: take a smaller model"
    lines = (f"{a.change}: up to {a.largest_micro_batch_size} rows, {a.peak_bytes / GIB:.2f} GiB" for a in fits)
    return "by the trace these would fit: " + "; ".join(lines)
