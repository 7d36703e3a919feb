"""Finds the largest safe micro-batch of one workload: traces it, tries sizes, and keeps what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from autotune.account import AMPLE, process_bytes, state_bytes
from autotune.batching import balanced_size
from autotune.errands import Dry, Excerpt, TraceReport
from autotune.evidence import Explored, MemoryModel, fit
from autotune.measure import TIME_LIMIT_SECONDS
from autotune.plan import Backend, CpuAllocator, Hardware, Layout, Trial, Workload
from autotune.search import bracket, largest_predicted, largest_safe, next_size, sizes_to_trace

SMALLER_SIZES = 4
"""How many smaller sizes are timed beside the one that would run, each half of the one before."""
AMPLE_BY_TRACE = 2.5
"""glibc's fast setting may hold so many times what is live."""

NOT_TRACED = TraceReport(process_bytes=0, traced=())

Trials = Iterator[Trial]
TraceSizes = Callable[[Sequence[Workload], Hardware, tuple[int, ...]], list[TraceReport]]
"""Traces each workload at each size; the list ends before a workload that cannot be traced."""


class Measuring(Protocol):
    """Traces, and takes dry steps: a machine with its workers, or what stands for one."""

    def stand_by(self, hardware: Hardware, allocator: CpuAllocator) -> None:
        """Make ready for dry steps under this setting of the allocator, which will be asked for later."""

    def trace_sizes(
        self, workloads: Sequence[Workload], hardware: Hardware, micro_batch_sizes: tuple[int, ...]
    ) -> list[TraceReport]:
        """Trace each workload at each size; the list ends before a workload that cannot be traced."""

    def try_size(
        self, errand: Dry, hardware: Hardware, predicted_peak_bytes: int | None, time_limit_seconds: float | None
    ) -> Trial:
        """Take dry steps, and say what happened."""


@dataclass(frozen=True)
class Timing:
    """On what real samples sizes are timed."""

    store: str
    seed: int
    share: int
    """Samples that a rank takes of a step."""
    smaller: bool
    """Whether smaller sizes than the one that would run are timed beside it."""
    layouts: tuple[Layout, ...]
    """Whether, and which, other layouts than the workload's are."""
    answered: tuple[str, int] | None
    """The store whose rows an evaluation has answered, and how many; None where it has none."""


@dataclass
class Exploration:
    """One workload on one machine: iterate `search` for the trials as they end, then read `largest`."""

    workload: Workload
    hardware: Hardware
    limit_bytes: int
    budget_bytes: int
    sizes: Sequence[int]
    """Worth trying, rising; the last one is a rank's whole share."""
    backend: Backend | None
    timing: Timing | None
    measuring: Measuring
    report: TraceReport = NOT_TRACED
    tried: list[Trial] = field(default_factory=list)
    remembered: int = 0
    """How many of them were tried at another time."""

    @property
    def explored(self) -> Explored:
        """What was learned."""
        return Explored(
            workload=self.workload,
            process_bytes=self.report.process_bytes,
            traced=self.report.traced,
            trials=tuple(self.tried),
        )

    def remember(self, known: Explored) -> None:
        """Take what was learned at another time as learned; what failed then may have had less memory, or less time."""
        self.report = TraceReport(process_bytes=known.process_bytes, traced=known.traced)
        self.tried = [trial for trial in known.trials if trial.completed]
        self.remembered = len(self.tried)

    @property
    def trials(self) -> list[Trial]:
        """Those under the allocator's setting that is in force: the other's tell nothing of it."""
        return [trial for trial in self.tried if trial.cpu_allocator == self.workload.cpu_allocator]

    @property
    def largest(self) -> int:
        """The largest size measured to be safe, 0 if none was."""
        return largest_safe(self.trials, self.budget_bytes)

    @property
    def model(self) -> MemoryModel | None:
        """What memory is taken to be, by all that is known."""
        return fit(self.trials, self.report.traced, self._process_bytes)

    @property
    def _process_bytes(self) -> int:
        return process_bytes(self.report, self.hardware)

    def trial_of(self, rows: int) -> Trial:
        """Return the trial that took all dry steps of a size."""
        return next(t for t in reversed(self.trials) if t.micro_batch_size == rows and t.verified)

    def has_verified(self, rows: int) -> bool:
        """Whether all dry steps of a size were taken, with whatever outcome."""
        return any(t.micro_batch_size == rows and t.verified for t in self.trials)

    def trace(self) -> None:
        """Trace the step, if that can be done and was not."""
        if not self.report.traced:
            reports = self.measuring.trace_sizes([self.workload], self.hardware, sizes_to_trace(self.sizes[-1]))
            self.report = reports[0] if reports else self.report

    def search(self) -> Trials:
        """Try sizes until the largest safe one is known; at glibc's fast setting as long as memory is ample."""
        if not self.trials:
            self.measuring.stand_by(self.hardware, self._likely_allocator)
        self.trace()
        while True:
            if self.workload.cpu_allocator == "fast" and not self._is_ample(self.sizes[-1]):
                self._set_tight()
            size = next_size(self.trials, self.budget_bytes, self.sizes, self.report.traced, self._process_bytes)
            if size is None:
                return
            verify = bool(self.trials) or size == self.predicted_largest
            if not verify:  # it only tells where to look, and another will follow
                self.measuring.stand_by(self.hardware, self.workload.cpu_allocator)
            yield from self.try_size(size, verify=verify)

    def fix(self, rows: int) -> Trials:
        """Try this one size, however long it takes."""
        if not self.has_verified(rows):
            yield from self.try_size(rows, time_limit_seconds=None)
        if self.workload.cpu_allocator == "fast" and not self._is_ample(rows):
            self._set_tight()
            yield from self.try_size(rows, time_limit_seconds=None)

    def try_size(
        self, rows: int, *, verify: bool = True, time_limit_seconds: float | None = TIME_LIMIT_SECONDS
    ) -> Trials:
        """Take the dry steps of a size."""
        trial = self._take(rows, verify, time_limit_seconds)
        self.tried.append(trial)
        yield trial

    def check(self, rows: int) -> Trial:
        """Take the first dry steps of a size once more, and learn nothing from them."""
        return self._take(rows, verify=False, time_limit_seconds=TIME_LIMIT_SECONDS)

    def _take(self, rows: int, verify: bool, time_limit_seconds: float | None) -> Trial:
        model = self.model
        errand = Dry(
            workload=self.workload,
            device=self.hardware.device,
            micro_batch_size=rows,
            ranks=self.hardware.local_world_size,
            backend=self.backend,
            verify=verify,
            budget_bytes=self.budget_bytes,
            limit_bytes=self.limit_bytes,
            excerpt=self._excerpt(rows) if verify else None,
        )
        predicted = model.peak_bytes(rows) if model else None
        return self.measuring.try_size(errand, self.hardware, predicted, time_limit_seconds)

    def _excerpt(self, rows: int) -> Excerpt | None:
        """Say what to time beside a size: real samples at it; and at smaller ones, if this is what would run."""
        if self.timing is None:
            return None
        sizes = [rows]
        if self.timing.smaller and rows == self.predicted_largest:
            while sizes[-1] > 1 and len(sizes) <= SMALLER_SIZES:
                sizes.append(balanced_size(self.sizes[-1], sizes[-1] // 2))
        return Excerpt(
            store=self.timing.store,
            seed=self.timing.seed,
            share=self.timing.share,
            sizes=tuple(sizes),
            layouts=self.timing.layouts,
            answered=self.timing.answered,
        )

    @property
    def predicted_largest(self) -> int:
        """The size that a run would use by what is known so far, 0 if nothing is known."""
        low, high = bracket(self.trials, self.budget_bytes)
        model, open_sizes = self.model, [size for size in self.sizes if low < size < high]
        return max(low, largest_predicted(model, self.budget_bytes, open_sizes) if model else 0)

    @property
    def _likely_allocator(self) -> CpuAllocator:
        """What the trace will choose, guessed by the state and the logits, with their gradient, of all rows."""
        work = self.workload
        logits = 4 * self.sizes[-1] * work.tokens_per_row * work.vocabulary_size
        ample = AMPLE_BY_TRACE * (state_bytes(work) + 2 * logits) <= self.budget_bytes
        return work.cpu_allocator if ample else "tight"

    def _set_tight(self) -> None:
        self.workload = self.workload.model_copy(update={"cpu_allocator": "tight"})

    def _is_ample(self, rows: int) -> bool:
        """Whether so many rows would leave room for what the fast setting holds beyond what is live."""
        trials, model = self.trials, self.model
        if model is None:
            return not trials  # nothing is known yet
        if trials and not trials[-1].completed:
            return trials[-1].outcome == "timed_out"  # which more memory would not mend
        if not self.report.traced and len(trials) == 1:
            rows = trials[0].micro_batch_size
        room = AMPLE if trials else AMPLE_BY_TRACE
        return room * model.peak_bytes(rows) <= self.budget_bytes
