"""Traces and dry steps, by workers -> facts.

One worker a size that is tried: on a processor a peak only rises, and a death costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from autotune.cards import free_card_bytes
from autotune.errands import Dry, DryReport, Trace, TraceReport
from autotune.plan import CpuAllocator, Hardware, Outcome, Trial, Workload
from autotune.process import Worker, WorkerCrashedError, ask

TIME_LIMIT_SECONDS = 600.0
"""Of the dry steps of one size, and of all that is traced at once."""
SILENT_SECONDS = 60.0
"""Without any processor time used, after which a worker hangs: it was stopped, or waits for what does not come."""
GIVEN_BACK_SECONDS = 10.0
NOISE_BYTES = 64 * 2**20
"""By which the free memory of a card varies with what others do on it."""
GIB = 2**30
KILLED = -9
"""Exit code of a process that signal 9 ended."""
UNMEASURED: dict[str, Any] = {
    "peak_bytes": None,
    "phases": {},
    "resident_bytes": None,
    "host_peak_bytes": None,
    "timings": (),
    "timed": (),
    "evaluation_seconds": None,
    "expected_peak_bytes": None,
    "inexact": (),
    "matrix_flops": {},
    "answering": None,
}
"""Of a trial that did not complete, what a report would tell."""


def trace_sizes(
    workloads: Sequence[Workload], hardware: Hardware, micro_batch_sizes: tuple[int, ...]
) -> list[TraceReport]:
    """Trace the step of each workload at each size.

    The list ends before a workload that cannot be traced in time, which dry steps must then tell.
    """
    reports = []
    try:
        errand = Trace(
            device=hardware.device,
            fast_bf16=hardware.fast_bf16,
            workloads=tuple(workloads),
            micro_batch_sizes=micro_batch_sizes,
        )
        for event in ask(errand, hardware.cores, SILENT_SECONDS, TIME_LIMIT_SECONDS):
            if event["event"] == "result":
                reports.append(TraceReport.model_validate(event.get("result")))  # noqa: PERF401 # those before a crash count
    except (WorkerCrashedError, ValidationError):
        pass
    return reports


class Workers:
    """This machine, by its workers; one may begin its imports before it is needed. Leaving the context ends those."""

    def __init__(self) -> None:
        self._standing_by: list[Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        while self._standing_by:
            with self._standing_by.pop():
                pass

    def stand_by(self, hardware: Hardware, allocator: CpuAllocator) -> None:
        """Start a worker for dry steps that will be asked for later: its imports take longer than many a trial."""
        self._standing_by.append(Worker(hardware.cores, allocator, ranks=hardware.local_world_size))

    def trace_sizes(
        self, workloads: Sequence[Workload], hardware: Hardware, micro_batch_sizes: tuple[int, ...]
    ) -> list[TraceReport]:
        """Trace each workload at each size."""
        return trace_sizes(workloads, hardware, micro_batch_sizes)

    def try_size(
        self, errand: Dry, hardware: Hardware, predicted_peak_bytes: int | None, time_limit_seconds: float | None
    ) -> Trial:
        """Take dry steps with a worker that stands by, or a new one."""
        worker = None
        while self._standing_by and worker is None:
            first = self._standing_by.pop(0)
            if first.allocator == errand.workload.cpu_allocator:
                worker = first
            else:  # it was started for what the trace did not choose
                with first:
                    pass
        return try_size(errand, hardware, predicted_peak_bytes, time_limit_seconds, worker)


def try_size(
    errand: Dry,
    hardware: Hardware,
    predicted_peak_bytes: int | None = None,
    time_limit_seconds: float | None = TIME_LIMIT_SECONDS,
    worker: Worker | None = None,
) -> Trial:
    """Take the dry steps of one size, by this worker or a new one, and say what happened; all local ranks take them.

    A worker that holds more than the limit on a processor is ended before the system's own killer has to. Death by
    signal 9 is the fact "does not fit". Raises WorkerCrashedError for any other death: that is a bug, not a size.
    """
    with worker or Worker(hardware.cores, errand.workload.cpu_allocator, ranks=errand.ranks) as worker:
        worker.give(errand)
        outcome, message, report = _watch(worker, errand, time_limit_seconds)
        seconds = worker.seconds
    if outcome != "completed" and hardware.device == "cuda":
        message += _wait_for_memory(hardware.device_memory_free_bytes)
    return Trial(
        micro_batch_size=errand.micro_batch_size,
        cpu_allocator=errand.workload.cpu_allocator,
        gradient_checkpointing=errand.workload.gradient_checkpointing,
        outcome=outcome,
        predicted_peak_bytes=predicted_peak_bytes,
        seconds=seconds,
        message=message,
        **(dict(report) if report else UNMEASURED | {"verified": errand.verify}),
    )


def _watch(worker: Worker, errand: Dry, time_limit_seconds: float | None) -> tuple[Outcome, str, DryReport | None]:
    """Wait for the end of a worker; return what became of it, why, and what it measured if it completed."""
    report: DryReport | None = None
    killed = False
    for event in worker.poll(SILENT_SECONDS):
        if event is None:
            if errand.device == "cpu" and (held := worker.held_bytes()) > errand.limit_bytes:
                worker.kill()
                return "out_of_memory", f"held {held / GIB:.2f} GiB when it was stopped", None
            if time_limit_seconds is not None and worker.seconds > time_limit_seconds:
                worker.kill()
                return "timed_out", f"not done after {time_limit_seconds:.0f} s", None
        elif event["event"] == "result":
            report = _report(event)
        elif event["event"] == "out_of_memory":
            return "out_of_memory", str(event.get("message", "")), None
        elif event["event"] == "rank_failed":
            killed = event.get("exit_code") == KILLED
    if report is not None:
        return "completed", "", report
    if killed or worker.was_killed:
        return "killed", "signal 9, as an out-of-memory killer sends it", None
    raise WorkerCrashedError(
        f"the dry step of {errand.micro_batch_size} rows ended with exit code {worker.exit_code}:\n"
        + worker.last_words()
    )


def _wait_for_memory(free_before: int, read_free: Callable[[], int | None] = free_card_bytes) -> str:
    """Wait until a card has back what a dead worker held: a driver takes a moment; say so if it does not."""
    end = time.monotonic() + GIVEN_BACK_SECONDS
    while (free := read_free()) is not None and free < free_before - NOISE_BYTES:
        if time.monotonic() > end:
            return f"; {(free_before - free) / GIB:.2f} GiB of the card were not given back since"
        time.sleep(0.1)
    return ""


def _report(event: dict[str, object]) -> DryReport | None:
    try:
        return DryReport.model_validate(event.get("result"))
    except ValidationError:
        return None
