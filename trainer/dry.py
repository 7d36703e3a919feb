"""The dry step: the real step on worst-case samples, measured by phase. What a plan promises is what this held."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autotune.errands import DRY_LENGTHS, DRY_MICRO_BATCHES, EXPLORING_LENGTHS, Dry, DryReport
from autotune.plan import Answering, Layout, Precision, Timed, Timing
from trainer.answering import measure_answering
from trainer.data import Order, TokenStore
from trainer.evaluate import scored_rows, totals
from trainer.memory import PeakMeter, is_memory_error, prepare_heap, trim_heap
from trainer.microbatch import SpecialTokens, WorstCase, collate, cut, lay_out, padded_size, target_count
from trainer.model import build_for
from trainer.proof import SAMPLES as PROVEN_ON
from trainer.proof import TOLERANCE, first_samples, gradient_errors
from trainer.ranks import ALONE, Ranks
from trainer.rate import matrix_flops
from trainer.step import TrainState, accumulate, start, trained, update

NO_SPECIAL = SpecialTokens(0, 0)
LEARNING_RATE = 1e-4
CLIP = 1.0
REPEATS = 3
TIMED_SAMPLES = 16
"""In a repeat at least: a few samples tell little of the rest."""
BEGINNING_SAMPLES = 2**14
"""Among so many, as a run takes them, the heaviest micro-batches are looked for."""
TIMED_SECONDS = 5.0
"""After which no further size is timed, and no repeat begun where there is nothing to compare."""
WAYS = 4
"""At least so many layouts and sizes should be timed within those seconds."""


def take_dry_steps(errand: Dry, ranks: Ranks = ALONE) -> DryReport:
    """Build the model, take the steps and one evaluation batch; the peak of each phase is its highest over all steps.

    Several ranks take them at the same time, and add their gradients: the report is that of the weakest.

    A first step is no guide: the optimizer's moments are made in it, and held in all later ones. Once those that tell
    where to look have held more than the budget, no other is taken.
    """
    workload, device = errand.workload, torch.device(errand.device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, errand.limit_bytes / total))
    meter = PeakMeter(device)
    torch.manual_seed(0)
    model = build_for(workload, None, device)
    account = Account(meter)
    # Held while a micro-batch runs, whatever its size: gradients and two moments (AdamW's) come to what there is now.
    kept = 3 if workload.optimizer == "adamw" else 1
    resident = meter.held_bytes() + kept * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    inexact = _inexact(model, errand)
    state = start(model, workload, weight_decay=0.1)
    timings: list[Timing] = []
    for share in DRY_LENGTHS if errand.verify else EXPLORING_LENGTHS:
        if len(timings) >= len(EXPLORING_LENGTHS) and ranks.most(account.peak_bytes)[0] > errand.budget_bytes:
            break
        timings.append(_step(state, errand, share, account, ranks))
    _evaluate(state, errand, account)
    verified, peak = len(timings) == len(DRY_LENGTHS), account.peak_bytes
    store = TokenStore(Path(errand.excerpt.store)) if errand.excerpt and verified else None
    per_token = min(t.seconds / t.padded_tokens for t in timings)
    timed = _time(state, errand, store, inexact, per_token) if store else ()
    expected_peak = _expected_peak(state, errand, store, meter, peak) if store else None
    report = DryReport(
        verified=verified,
        peak_bytes=peak,
        phases=account.phases,
        resident_bytes=resident,
        host_peak_bytes=account.host_peak_bytes,
        timings=tuple(timings),
        timed=timed,
        evaluation_seconds=account.seconds["evaluation"],
        expected_peak_bytes=expected_peak,
        inexact=inexact,
        matrix_flops=_rates(device, workload.precision) if verified else {},
        answering=_answering(state, errand, peak - resident, account.seconds["evaluation"]) if verified else None,
    )
    return _of_the_weakest(report, ranks)


def _of_the_weakest(report: DryReport, ranks: Ranks) -> DryReport:
    """Take of what the ranks held, and of the time that full steps took, the most."""
    names = ["peak_bytes", "resident_bytes", "host_peak_bytes"]
    names += ["expected_peak_bytes"] if report.expected_peak_bytes is not None else []
    held = ranks.most(*(getattr(report, name) for name in names))
    phases = ranks.most(*report.phases.values())
    seconds = ranks.most(*(s for t in report.timings for s in (t.seconds, t.update_seconds)))
    timings = [
        t.model_copy(update={"seconds": seconds[2 * i], "update_seconds": seconds[2 * i + 1]})
        for i, t in enumerate(report.timings)
    ]
    return report.model_copy(
        update={
            **dict(zip(names, map(int, held), strict=True)),
            "phases": dict(zip(report.phases, map(int, phases), strict=True)),
            "timings": tuple(timings),
        }
    )


def _answering(state: TrainState, errand: Dry, room_bytes: int, evaluation_seconds: float) -> Answering | None:
    """Time answers in what a peak leaves between two steps; None where there is no room, or none are asked for."""
    if errand.excerpt is None or errand.excerpt.answered is None:
        return None
    workload, (place, count) = errand.workload, errand.excerpt.answered
    store = TokenStore(Path(place))
    rows = scored_rows(store, errand.excerpt.seed, count)
    per_token = evaluation_seconds / (errand.micro_batch_size * workload.tokens_per_row)
    try:
        return measure_answering(state.model, store, workload, rows, room_bytes, per_token)
    except (RuntimeError, MemoryError) as error:
        if not is_memory_error(error):
            raise
        return None


def _rates(device: torch.device, own: Precision) -> dict[Precision, float]:
    """Measure how fast matrices are multiplied here; a device that has no room for them left says nothing."""
    precisions: tuple[Precision, ...] = (own, "fp32")
    try:
        return {precision: matrix_flops(device, precision) for precision in dict.fromkeys(precisions)}
    except (RuntimeError, MemoryError) as error:
        if not is_memory_error(error):
            raise
        return {}


def _step(state: TrainState, errand: Dry, share: float, account: Account, ranks: Ranks) -> Timing:
    """Take the step that a run takes, its two phases apart, on rows of this share of the worst-case length."""
    workload, samples, ids = errand.workload, WorstCase(errand.workload, share), range(errand.micro_batch_size)
    batch = collate([[i] for i in ids], samples, workload, NO_SPECIAL)
    targets = DRY_MICRO_BATCHES * target_count(ids, samples)
    prepare_heap(account.device, workload.cpu_allocator)
    with account.phase("forward_backward"):  # reading a result waits for the device
        loss = accumulate(state, [batch] * DRY_MICRO_BATCHES, targets, workload)
        loss.item()
    with account.phase("optimizer"):
        loss = ranks.add_gradients(trained(state), loss)
        update(state, loss, workload, LEARNING_RATE, CLIP).item()
    return Timing(
        padded_tokens=batch.padded_tokens,
        seconds=account.seconds["forward_backward"] / DRY_MICRO_BATCHES,
        update_seconds=account.seconds["optimizer"],
    )


def _evaluate(state: TrainState, errand: Dry, account: Account) -> None:
    """Take the loss of one worst-case batch, as an evaluation does."""
    workload = errand.workload
    rows = [[i] for i in range(errand.micro_batch_size)]
    batch = collate(rows, WorstCase(workload, 1.0), workload, NO_SPECIAL)
    for _ in range(2):  # the first one warms up
        prepare_heap(account.device, workload.cpu_allocator)
        with account.phase("evaluation"):
            totals(state.model, [batch], workload, account.device).tolist()


def _inexact(model: Any, errand: Dry) -> tuple[Layout, ...]:
    """Prove the layouts as a run does before its first step, for what that leaves behind too: kernels, a heap."""
    workload, excerpt = errand.workload, errand.excerpt
    if excerpt is None:
        worst, ids = WorstCase(workload), list(range(PROVEN_ON))
        errors = gradient_errors(model, [workload.layout], workload, worst, ids, NO_SPECIAL)
    else:
        store = TokenStore(Path(excerpt.store))
        ids = first_samples(store, excerpt.seed, workload)
        errors = gradient_errors(model, [workload.layout, *excerpt.layouts], workload, store, ids, NO_SPECIAL)
    return tuple(layout for layout, error in errors.items() if not error <= TOLERANCE)


def _time(
    state: TrainState, errand: Dry, store: TokenStore, inexact: tuple[Layout, ...], seconds_per_token: float
) -> tuple[Timed, ...]:
    """Time real samples under each layout and at each size in turn: what slows one repeat slows all of them."""
    assert errand.excerpt is not None
    own, excerpt = errand.workload.layout, errand.excerpt
    ways = [(own, excerpt.sizes[0])] + [(layout, excerpt.sizes[0]) for layout in excerpt.layouts]
    ways = [(layout, rows) for layout, rows in ways if layout not in inexact]
    ways += [(own, rows) for rows in excerpt.sizes[1:] if own not in inexact]
    beginning = Order(len(store), excerpt.seed, 0)
    samples = _timed_samples(errand, store, beginning[:BEGINNING_SAMPLES], seconds_per_token)
    taken: dict[tuple[Layout, int], list[tuple[int, float]]] = {}
    began = time.perf_counter()
    for ids in np.resize(beginning[: REPEATS * samples], REPEATS * samples).reshape(REPEATS, samples):
        for way in list(taken) or ways:
            if errand.workload.compile == "on" and way not in taken:
                before = time.perf_counter()
                _run(state, errand, ids, *way, store)  # makes the kernels that are missing
                began += time.perf_counter() - before
            in_time = time.perf_counter() - began < TIMED_SECONDS
            again = way in taken
            if not in_time and (len(taken) == 1 if again else taken):
                continue
            try:
                taken.setdefault(way, []).append(_run(state, errand, ids, *way, store))
            except (RuntimeError, MemoryError) as error:
                if way[0] == own or not is_memory_error(error):
                    raise
                del taken[way]  # whose memory was not measured
                state.optimizer.zero_grad(set_to_none=True)
    return tuple(
        Timed(
            layout=layout,
            rows=rows,
            samples=samples,
            padded_tokens=tuple(padded for padded, _ in runs),
            seconds=tuple(seconds for _, seconds in runs),
        )
        for (layout, rows), runs in taken.items()
    )


def _timed_samples(errand: Dry, store: TokenStore, beginning: Any, seconds_per_token: float) -> int:
    """Say how many samples tell the speed of a run: whole micro-batches, if they take little, of a step's share."""
    assert errand.excerpt is not None
    rows, workload = errand.micro_batch_size, errand.workload
    tokens = float(np.mean([len(store.tokens(i)) for i in beginning]))
    whole = rows * ceil(TIMED_SAMPLES / rows)
    if workload.layout == "packed":
        whole = max(whole, ceil(rows * workload.tokens_per_row / tokens))
    in_time = int(TIMED_SECONDS / WAYS / (seconds_per_token * tokens))
    return max(TIMED_SAMPLES, min(whole, in_time, errand.excerpt.share))


def _run(state: TrainState, errand: Dry, ids: Any, layout: Layout, rows: int, store: TokenStore) -> tuple[int, float]:
    """Run forward and backward of some samples; return the tokens that they were padded to, and the seconds."""
    began = time.perf_counter()
    prepare_heap(state.loss_scale.device, errand.workload.cpu_allocator)
    workload = errand.workload.model_copy(update={"layout": layout})
    batches = lay_out(ids, rows, store, workload, NO_SPECIAL)
    accumulate(state, batches, target_count(ids, store), workload).item()
    return sum(batch.padded_tokens for batch in batches), time.perf_counter() - began


def _expected_peak(state: TrainState, errand: Dry, store: TokenStore, meter: PeakMeter, worst_case: int) -> int:
    """Measure the micro-batches of a run's beginning that are padded to most tokens and that have most targets."""
    assert errand.excerpt is not None
    workload, share = errand.workload, errand.excerpt.share
    if errand.device == "cpu" and workload.cpu_allocator == "fast":
        return worst_case  # such a heap comes to it, and keeps it
    beginning = Order(len(store), errand.excerpt.seed, 0)[:BEGINNING_SAMPLES].tolist()
    batches = [
        batch
        for first in range(0, len(beginning), share)
        for batch in cut(beginning[first : first + share], errand.micro_batch_size, store, workload)
    ]
    _give_back(meter)
    heaviest = (
        max(batches, key=lambda batch: padded_size(batch, store, workload)),
        max(batches, key=lambda batch: target_count([i for row in batch for i in row], store)),
    )
    for batch in heaviest:
        prepare_heap(state.loss_scale.device, workload.cpu_allocator)
        accumulate(state, [collate(batch, store, workload, NO_SPECIAL)], 1, workload).item()
    return meter.peak_bytes()


def _give_back(meter: PeakMeter) -> None:
    """Give back what allocators keep of the worst case, and start a new peak."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()
    meter.reset()


class Account:
    """The highest peak of each phase over all steps, and the seconds that each took the last time."""

    def __init__(self, meter: PeakMeter) -> None:
        self._meter, self.device = meter, meter.device
        self.peak_bytes = meter.peak_bytes()
        self.host_peak_bytes = meter.host_peak_bytes()
        self.phases = {"start": meter.allocated_peak_bytes()}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        self._meter.reset()
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
        self.peak_bytes = max(self.peak_bytes, self._meter.peak_bytes())
        self.host_peak_bytes = max(self.host_peak_bytes, self._meter.host_peak_bytes())
        self.phases[name] = max(self.phases.get(name, 0), self._meter.allocated_peak_bytes())
