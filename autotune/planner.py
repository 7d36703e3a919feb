"""Ties the rooms together: hardware + workload -> Plan. Decides by the pure rooms, measures by `measure`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from autotune.batching import balanced_size, largest_share, reach
from autotune.errands import DataSummary, Excerpt, Recipe, TraceReport
from autotune.errors import ConfigurationError, NothingFitsError
from autotune.evidence import Evidence, MemoryModel, fit, traced_bytes, traced_items
from autotune.forecast import Histogram, faster_size, forecast, measure_speed, rounded
from autotune.measure import TIME_LIMIT_SECONDS, trace_sizes, try_size
from autotune.plan import (
    SCHEMA,
    Batching,
    EvidenceSummary,
    Forecast,
    Hardware,
    LimitedBy,
    Memory,
    Plan,
    Speed,
    Traced,
    Trial,
    Workload,
)
from autotune.search import is_safe, largest_predicted, largest_safe, next_size, sizes_to_trace

GIB = 2**30
MIB = 2**20
HEADROOM_SHARE = 0.05
LIBRARIES_BYTES = 64 * MIB
"""What the libraries take on a processor once steps run: kernels, threads' buffers; 46 to 87 MiB were seen."""
LEAST_HEADROOM_BYTES = {"cuda": 256 * MIB, "cpu": 128 * MIB}
"""On a processor the kernels that oneDNN keeps for shapes no dry step had: 50 MiB were seen over an epoch."""
FASTER = 1.05
"""A smaller micro-batch is taken when it was faster by this factor in each of its repeats."""
SMALLER_SIZES = 4
"""How many smaller sizes are timed beside the one that would run, each half of the one before."""
AMPLE = 1.5
AMPLE_BY_TRACE = 2.5
"""glibc's fast setting holds up to so much more than it did in a trial, and than is live: it needs room for that."""
CUDA_CONTEXT_BYTES = 500 * MIB
"""Of a process on a card before it has a tensor: 226 MiB (L4) to 501 MiB (A100) were published; a trial then tells."""
ALLOCATOR_SHARE = 0.05
"""What CUDA's allocator keeps beyond what is live: 1.5 to 6.4 % were published, and 5 % are commonly charged."""
ESTIMATE_ERROR = 0.15
"""By which an estimate may be wrong, for people: the published runs it was held against lie within."""
PADDING_MULTIPLE = 8
SHORTEST_SEQUENCE = 64

Trials = Generator[Trial, None, None]
TraceSizes = Callable[[Workload, Hardware, tuple[int, ...]], TraceReport | None]
Measure = Callable[[Workload, Hardware, int, int, int | None, float | None, Excerpt | None], Trial]
"""Tries one size: rows, limit and predicted peak in bytes, most seconds, what to time -> what happened.

Recorded trials replay in its place.
"""


@dataclass(frozen=True)
class Request:
    """What the user wants of a plan, besides the workload."""

    effective_batch_size: int
    micro_batch_size: int | None
    """Fixed by the user: measured, never changed."""
    prefer: Literal["auto", "largest"]
    memory_limit_bytes: int | None
    headroom: float | None
    """Bytes from 1 on, below 1 a share of the limit, None the default."""


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


def set_budget(hardware: Hardware, memory_limit_bytes: int | None, headroom: float | None) -> Budget:
    """Take the least of what is free and what the user allows, and keep the headroom back."""
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


class Planner:
    """Makes one plan: iterate `make` for the trials as they end, then read `plan` and `evidence`."""

    def __init__(
        self,
        workload: Workload,
        hardware: Hardware,
        request: Request,
        recipe: Recipe,
        data: DataSummary | None,
        validation: DataSummary | None = None,
        measure: Measure = try_size,
        trace: TraceSizes = trace_sizes,
    ) -> None:
        self._workload, self._hardware, self._request = workload, hardware, request
        self._recipe, self._data, self._validation = recipe, data, validation
        self._measure, self._trace = measure, trace
        self.budget = set_budget(hardware, request.memory_limit_bytes, request.headroom)
        self._tried: list[Trial] = []
        self._asked = workload
        self._report = TraceReport(process_bytes=0, traced=())
        self.plan: Plan | None = None

    @property
    def evidence(self) -> Evidence:
        """What the plan rests on: replayed, it gives the same plan."""
        return Evidence(
            workload=self._asked,
            hardware=self._hardware,
            budget_bytes=self.budget.budget_bytes,
            process_bytes=self._report.process_bytes,
            traced=self._report.traced,
            trials=tuple(self._tried),
        )

    @property
    def _trials(self) -> list[Trial]:
        """Those under the allocator's setting that is in force: the other's tell nothing of it."""
        return [trial for trial in self._tried if trial.cpu_allocator == self._workload.cpu_allocator]

    def make(self) -> Trials:
        """Yield each trial as it ends; raises NothingFitsError, with the nearest change that would fit."""
        fixed = self._request.micro_batch_size
        if fixed is not None:
            yield from self._try(fixed)
            if self._workload.cpu_allocator == "fast" and not self._is_ample():
                self._set_tight()
                yield from self._try(fixed)
            self._check_fixed(self._tried[-1])
            self.plan = self._write(fixed, "user")
        else:
            self._trace_step()
            yield from self._search()
            if largest_safe(self._trials, self.budget.budget_bytes) == 0:
                yield from self._explain_nothing_fits()
            rows, limited_by = yield from self._choose()
            self.plan = self._write(rows, limited_by)

    def estimate(self) -> Plan:
        """Plan by the trace alone, for a card that is not here; raises NothingFitsError, as `make` does."""
        budget, share = self.budget.budget_bytes, self._share
        self._trace_step()
        model = self._model
        if model is None:
            raise ConfigurationError(
                f"the model {self._workload.model} cannot be traced, so nothing is known of a card that is not here",
                "plan on a machine that has the card",
            )

        fixed = self._request.micro_batch_size
        fits = [r for r in range(1, share + 1) if _estimated(model, r) <= budget]
        largest = fixed or max(fits, default=1)
        if _estimated(model, largest) > budget:
            raise NothingFitsError(
                f"{largest} rows of {self._workload.tokens_per_row} tokens would take "
                f"{_estimated(model, largest) / GIB:.2f} GiB by the trace, the budget is {budget / GIB:.2f} GiB",
                "try --gradient-checkpointing on, or a shorter --max-seq-len",
            )
        rows = fixed or balanced_size(share, largest)
        limited_by: LimitedBy = "user" if fixed else "effective_batch" if rows == share else "memory"
        effective, world_size = self._request.effective_batch_size, self._hardware.world_size
        return Plan(
            schema_name=SCHEMA,
            workload=self._workload,
            hardware=self._hardware,
            batching=reach(effective, world_size, rows, largest, limited_by),
            memory=self._estimated_account(rows, _estimated(model, rows)),
            speed=None,
            forecast=None,
            evidence=summarise((), "estimated"),
        )

    def _estimated_account(self, rows: int, peak_bytes: int) -> Memory:
        items = {name: round(size) for name, size in traced_items(self._traced, rows).items()}
        items["process"] = self._process_bytes
        items["allocator"] = peak_bytes - sum(items.values())
        return Memory(
            limit_bytes=self.budget.limit_bytes,
            limit_from=self.budget.limit_from,
            headroom_bytes=self.budget.headroom_bytes,
            budget_bytes=self.budget.budget_bytes,
            predicted_peak_bytes=peak_bytes,
            measured_peak_bytes=None,
            expected_peak_bytes=None,
            phases={name: round(size) for name, size in traced_bytes(self._traced, rows).items()},
            items=items,
            host_budget_bytes=_host_budget(self._hardware),
            host_peak_bytes=0,
        )

    @property
    def _share(self) -> int:
        """The most rows that a micro-batch can use: a rank's share of a step."""
        samples = self._request.effective_batch_size
        if self._data is not None:
            samples = min(samples, self._data.samples)
        return largest_share(samples, self._hardware.world_size)

    def _trace_step(self) -> None:
        report = self._trace(self._workload, self._hardware, sizes_to_trace(self._share))
        if report is not None:
            self._report = report

    @property
    def _traced(self) -> tuple[Traced, ...]:
        return self._report.traced

    @property
    def _process_bytes(self) -> int:
        """What is held besides tensors, as far as is known before anything was tried."""
        on_cpu = self._hardware.device == "cpu"
        return self._report.process_bytes + LIBRARIES_BYTES if on_cpu else CUDA_CONTEXT_BYTES

    @property
    def _model(self) -> MemoryModel | None:
        return fit(self._trials, self._traced, self._process_bytes)

    def _try(self, rows: int) -> Trials:
        model = self._model
        predicted = model.peak_bytes(rows) if model else None
        seconds = TIME_LIMIT_SECONDS if self._request.micro_batch_size is None else None
        limit, excerpt = self.budget.limit_bytes, self._excerpt(rows)
        trial = self._measure(self._workload, self._hardware, rows, limit, predicted, seconds, excerpt)
        self._tried.append(trial)
        yield trial

    def _excerpt(self, rows: int) -> Excerpt | None:
        """Say what to time beside a size: real samples at it; and at smaller ones, if this is what would run."""
        if self._data is None:
            return None
        sizes = [rows]
        if self._request.prefer == "auto" and self._request.micro_batch_size is None and rows == self._runs_at():
            while sizes[-1] > 1 and len(sizes) <= SMALLER_SIZES:
                sizes.append(balanced_size(self._share, sizes[-1] // 2))
        return Excerpt(store=self._data.store, seed=self._recipe.seed, sizes=tuple(sizes))

    def _runs_at(self) -> int:
        """Return the size that a run would use by what is known so far, 0 if nothing is known."""
        model, budget, share = self._model, self.budget.budget_bytes, self._share
        largest = largest_safe(self._trials, budget)
        failed = [t.micro_batch_size for t in self._trials if t.micro_batch_size > largest and not is_safe(t, budget)]
        fits = largest_predicted(model, budget, largest, min(failed, default=share + 1)) if model else largest
        return balanced_size(share, fits) if fits else 0

    def _search(self) -> Trials:
        """Search at glibc's fast setting as long as memory is ample, else at the tight one."""
        while True:
            if self._workload.cpu_allocator == "fast" and not self._is_ample():
                self._set_tight()
            budget = self.budget.budget_bytes
            size = next_size(self._trials, budget, self._share, self._traced, self._process_bytes)
            if size is None:
                return
            yield from self._try(size)

    def _set_tight(self) -> None:
        self._workload = self._workload.model_copy(update={"cpu_allocator": "tight"})

    def _is_ample(self) -> bool:
        """Whether a rank's whole share would leave room for what the fast setting holds beyond what is live."""
        trials, model = self._trials, self._model
        if model is None:
            return not trials  # nothing is known yet
        if trials and not trials[-1].completed:
            return trials[-1].outcome == "timed_out"  # which more memory would not mend
        rows = self._share if self._traced or len(trials) > 1 else trials[0].micro_batch_size
        room = AMPLE if trials else AMPLE_BY_TRACE
        return room * model.peak_bytes(rows) <= self.budget.budget_bytes

    def _choose(self) -> Generator[Trial, None, tuple[int, LimitedBy]]:
        """Balance the micro-batches below the largest safe one; take a smaller size only where it is faster."""
        budget, share = self.budget.budget_bytes, self._share
        largest = largest_safe(self._trials, budget)
        rows = largest + 1
        while True:  # memory need not be monotone in rows: what the balanced cut uses has to be safe itself
            rows = balanced_size(share, rows - 1)
            if rows not in (tried := {t.micro_batch_size: t for t in self._trials}):
                yield from self._try(rows)
                tried = {t.micro_batch_size: t for t in self._trials}
            if rows == 1 or is_safe(tried[rows], budget):
                break
        if not is_safe(tried[rows], budget):
            yield from self._explain_nothing_fits()
        limited_by: LimitedBy = "memory"
        if rows == share:
            whole = largest_share(self._request.effective_batch_size, self._hardware.world_size)
            limited_by = "effective_batch" if share == whole else "data"
        faster = faster_size(tried[rows].timed, FASTER) if self._request.prefer == "auto" else None
        if faster is not None:
            if faster not in tried:
                yield from self._try(faster)
            if is_safe(next(t for t in self._trials if t.micro_batch_size == faster), budget):
                return faster, "speed"
        return rows, limited_by

    def _check_fixed(self, trial: Trial) -> None:
        if is_safe(trial, self.budget.budget_bytes):
            return
        needs = f"needs {trial.peak_bytes / GIB:.2f} GiB" if trial.peak_bytes else f"did not fit ({trial.message})"
        raise NothingFitsError(
            f"a batch of {trial.micro_batch_size} rows of {self._workload.tokens_per_row} tokens {needs}, "
            f"the budget is {self.budget.budget_bytes / GIB:.2f} GiB ({self.budget.limit_bytes / GIB:.2f} GiB by "
            f"{self.budget.limit_from}, less headroom)",
            "leave --batch-size-per-gpu out and give --auto: the effective batch stays the same",
        )

    def _explain_nothing_fits(self) -> Trials:
        """Try the changes that would fit, mildest first, and raise with the first that does."""
        first = self._tried[-1]
        row = f"one row of {self._workload.tokens_per_row} tokens"
        needs = f"{row} needs {first.peak_bytes / GIB:.2f} GiB" if first.peak_bytes else f"{row} does not fit"
        budget = self.budget
        if first.outcome == "timed_out":
            raise NothingFitsError(f"{row} is too slow for this machine: {first.message}", "take a smaller model")
        message = (
            f"{needs}; the budget is {budget.budget_bytes / GIB:.2f} GiB ({budget.limit_bytes / GIB:.2f} GiB by "
            f"{budget.limit_from}, less {budget.headroom_bytes / GIB:.2f} GiB of headroom), and the weights, "
            f"gradients and optimizer state alone take {_state_bytes(self._workload) / GIB:.2f} GiB"
        )
        for change, workload in milder(self._workload):
            trial = self._measure(workload, self._hardware, 1, budget.limit_bytes, None, TIME_LIMIT_SECONDS, None)
            yield trial
            if is_safe(trial, budget.budget_bytes):
                raise NothingFitsError(message, f"{change} would fit: {(trial.peak_bytes or 0) / GIB:.2f} GiB")
        raise NothingFitsError(message, "no shorter sequence would fit either: take a smaller model")

    def _write(self, rows: int, limited_by: LimitedBy) -> Plan:
        trial = next(t for t in reversed(self._trials) if t.micro_batch_size == rows)
        effective = self._request.effective_batch_size
        self._check_host(trial)
        batching = reach(
            effective if self._data is None else min(effective, self._data.samples),
            self._hardware.world_size,
            rows,
            max(rows, largest_safe(self._trials, self.budget.budget_bytes)),
            limited_by,
        )
        speed = measure_speed(trial, self._workload, batching)
        return Plan(
            schema_name=SCHEMA,
            workload=self._workload,
            hardware=self._hardware,
            batching=batching,
            memory=self._account(trial),
            speed=speed,
            forecast=self._forecast(batching, speed, trial),
            evidence=summarise(self._tried),
        )

    def _account(self, trial: Trial) -> Memory:
        assert trial.peak_bytes is not None
        assert trial.resident_bytes is not None
        on_cpu = self._hardware.device == "cpu"
        return Memory(
            limit_bytes=self.budget.limit_bytes,
            limit_from=self.budget.limit_from,
            headroom_bytes=self.budget.headroom_bytes,
            budget_bytes=self.budget.budget_bytes,
            predicted_peak_bytes=trial.predicted_peak_bytes,
            measured_peak_bytes=trial.peak_bytes,
            expected_peak_bytes=None,
            phases=trial.phases,
            items=self._itemise(trial),
            host_budget_bytes=self.budget.budget_bytes if on_cpu else _host_budget(self._hardware),
            host_peak_bytes=trial.host_peak_bytes or 0,
        )

    def _itemise(self, trial: Trial) -> dict[str, int]:
        """Say what the peak is made of, by the trace where there is one; what is held beyond it is the process."""
        assert trial.peak_bytes is not None
        assert trial.resident_bytes is not None
        if not self._traced:
            return itemise(self._workload, trial.resident_bytes, trial.peak_bytes)
        items = traced_items(self._traced, trial.micro_batch_size)
        # A trace that is too high is so in what grows with rows, and the process is there in any case.
        room = max(0, trial.peak_bytes - self._process_bytes)
        scale = min(1.0, room / max(1.0, sum(items.values())))
        whole = {name: int(scale * size) for name, size in items.items()}
        process = min(self._process_bytes, trial.peak_bytes)
        return whole | {"process": process, "allocator": trial.peak_bytes - sum(whole.values()) - process}

    def _forecast(self, batching: Batching, speed: Speed | None, trial: Trial) -> Forecast | None:
        if self._data is None or speed is None:
            return None
        recipe, samples = self._recipe, self._data.samples
        lengths, validation = self._lengths(self._data), self._lengths(self._validation)
        timed = [t for tried in self._trials for t in tried.timed if t.rows == trial.micro_batch_size]
        most = max(timed, key=lambda t: t.samples * len(t.seconds), default=None)
        return forecast(samples, recipe.epochs, recipe.max_steps, lengths, validation, batching, speed, most)

    def _lengths(self, data: DataSummary | None) -> list[Histogram]:
        """Return the lengths that rows of this data are padded to."""
        limits = (self._workload.max_seq_len, self._workload.max_target_len)
        histograms = data.lengths if data else ()
        return [rounded(h, PADDING_MULTIPLE, limit) for h, limit in zip(histograms, limits, strict=False)]

    def _check_host(self, trial: Trial) -> None:
        """Raise NothingFitsError where the card has room and the host has none: fewer rows would not change that."""
        needed, budget = trial.host_peak_bytes or 0, _host_budget(self._hardware)
        if self._hardware.device == "cuda" and needed > budget:
            raise NothingFitsError(
                f"training holds {needed / GIB:.2f} GiB of host memory, and the budget there is {budget / GIB:.2f} GiB "
                f"({self._hardware.host_memory_available_bytes / GIB:.2f} GiB by "
                f"{self._hardware.host_memory_limited_by}, less headroom)",
                "close other programs",
            )


def _estimated(model: MemoryModel, rows: int) -> int:
    """Return the bytes that a card would hold, by the trace alone."""
    return round(model.peak_bytes(rows) * (1 + ALLOCATOR_SHARE))


def check_room(plan: Plan, budget: Budget) -> None:
    """Raise NothingFitsError where a plan that was made earlier, or elsewhere, needs more than there is now."""
    peak = plan.memory.measured_peak_bytes or plan.memory.predicted_peak_bytes or 0
    if plan.workload.cpu_allocator == "fast":
        peak = round(AMPLE * peak)
    if peak > budget.budget_bytes:
        raise NothingFitsError(
            f"the plan may hold {peak / GIB:.2f} GiB at its peak, the budget here and now is "
            f"{budget.budget_bytes / GIB:.2f} GiB ({budget.limit_bytes / GIB:.2f} GiB by {budget.limit_from}, "
            f"less {budget.headroom_bytes / GIB:.2f} GiB of headroom)",
            "close other programs, or plan again with --auto: the effective batch stays the same",
        )


def milder(workload: Workload) -> list[tuple[str, Workload]]:
    """List changes that need less memory, mildest first, each with the option that makes it."""
    changes = []
    if workload.gradient_checkpointing == "off":
        workload = workload.model_copy(update={"gradient_checkpointing": "on"})
        changes.append(("--gradient-checkpointing on", workload))
    length = max(workload.max_seq_len, workload.max_target_len)
    while (length := length // 2) >= SHORTEST_SEQUENCE:
        shorter = {
            "max_seq_len": min(workload.max_seq_len, length),
            "max_target_len": min(workload.max_target_len, length),
        }
        options = f"--gradient-checkpointing on --max-seq-len {shorter['max_seq_len']}"
        if workload.task == "seq2seq":
            options += f" --max-target-len {shorter['max_target_len']}"
        changes.append((options, workload.model_copy(update=shorter)))
    return changes


def itemise(workload: Workload, resident_bytes: int, peak_bytes: int) -> dict[str, int]:
    """Say what the peak is made of: fp32 weights and gradients, two moments, the process, and what grows with rows."""
    items = {
        "weights": 4 * workload.parameters,
        "gradients": 4 * workload.trainable_parameters,
        "optimizer_state": 8 * workload.trainable_parameters,
    }
    items["process"] = max(0, resident_bytes - sum(items.values()))
    items["activations_and_temporaries"] = max(0, peak_bytes - sum(items.values()))
    return items


def _host_budget(hardware: Hardware) -> int:
    available = hardware.host_memory_available_bytes
    return round(available - max(HEADROOM_SHARE * available, LEAST_HEADROOM_BYTES["cpu"]))


def _state_bytes(workload: Workload) -> int:
    return 4 * workload.parameters + 12 * workload.trainable_parameters


def summarise(trials: Sequence[Trial], kind: Literal["measured", "estimated"] = "measured") -> EvidenceSummary:
    """Count what was tried."""
    return EvidenceSummary(
        kind=kind,
        dry_steps=sum(len(t.timings) for t in trials),
        timing_steps=sum(len(timed.seconds) for t in trials for timed in t.timed),
        trials=tuple(trials),
        out_of_memory_count=sum(t.outcome in ("out_of_memory", "killed") for t in trials),
        seconds=sum(t.seconds for t in trials),
    )
