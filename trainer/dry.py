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
from autotune.plan import Timed, Timing
from trainer.data import TokenStore, order
from trainer.evaluate import total_loss
from trainer.memory import PeakMeter, prepare_heap, trim_heap
from trainer.microbatch import SpecialTokens, WorstCase, collate, lay_out, target_count
from trainer.model import build_for
from trainer.step import TrainState, accumulate, start, update

NO_SPECIAL = SpecialTokens(0, 0)
LEARNING_RATE = 1e-4
CLIP = 1.0
REPEATS = 3
TIMED_SAMPLES = 16
"""In a repeat at least: a few samples tell little of the rest."""
BEGINNING_SAMPLES = 2**16
"""Among so many, as a run takes them, the heaviest micro-batches are looked for."""
TIMED_SECONDS = 5.0
"""After which no further size is timed, and no repeat begun where there is nothing to compare."""


def take_dry_steps(errand: Dry) -> DryReport:
    """Build the model, take the steps and one evaluation batch; the peak of each phase is its highest over all steps.

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
    # What is held while a micro-batch runs, whatever its size: gradients and two moments come to what there is now.
    resident = meter.held_bytes() + 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    state = start(model, weight_decay=0.1, precision=workload.precision)
    timings: list[Timing] = []
    for share in DRY_LENGTHS if errand.verify else EXPLORING_LENGTHS:
        if len(timings) >= len(EXPLORING_LENGTHS) and account.peak_bytes > errand.budget_bytes:
            break
        timings.append(_step(state, errand, share, account))
    _evaluate(state, errand, account)
    verified, peak = len(timings) == len(DRY_LENGTHS), account.peak_bytes
    store = TokenStore(Path(errand.excerpt.store)) if errand.excerpt and verified else None
    return DryReport(
        verified=verified,
        peak_bytes=peak,
        phases=account.phases,
        resident_bytes=resident,
        host_peak_bytes=account.host_peak_bytes,
        timings=tuple(timings),
        timed=_time(state, errand, store) if store else (),
        evaluation_seconds=account.seconds["evaluation"],
        expected_peak_bytes=_expected_peak(state, errand, store, meter, peak) if store else None,
    )


def _step(state: TrainState, errand: Dry, share: float, account: Account) -> Timing:
    """Take the step that `train_step` takes, its two phases apart, on rows of this share of the worst-case length."""
    workload, samples, ids = errand.workload, WorstCase(errand.workload, share), range(errand.micro_batch_size)
    batch = collate(ids, samples, workload, NO_SPECIAL)
    targets = DRY_MICRO_BATCHES * target_count(ids, samples)
    prepare_heap(account.device, workload.cpu_allocator)
    with account.phase("forward_backward"):  # reading a result waits for the device
        accumulate(state, [batch] * DRY_MICRO_BATCHES, targets, workload.precision).item()
    with account.phase("optimizer"):
        update(state, workload.precision, LEARNING_RATE, CLIP).item()
    return Timing(
        padded_tokens=batch.padded_tokens,
        seconds=account.seconds["forward_backward"] / DRY_MICRO_BATCHES,
        update_seconds=account.seconds["optimizer"],
    )


def _evaluate(state: TrainState, errand: Dry, account: Account) -> None:
    """Take the loss of one worst-case batch, as an evaluation does."""
    workload = errand.workload
    batch = collate(range(errand.micro_batch_size), WorstCase(workload, 1.0), workload, NO_SPECIAL)
    prepare_heap(account.device, workload.cpu_allocator)
    with account.phase("evaluation"):
        total_loss(state.model, [batch], workload.precision, account.device).item()


def _time(state: TrainState, errand: Dry, store: TokenStore) -> tuple[Timed, ...]:
    """Time real samples, cut into micro-batches of each size in turn: what slows one repeat slows all sizes in it."""
    assert errand.excerpt is not None
    samples = errand.micro_batch_size * ceil(TIMED_SAMPLES / errand.micro_batch_size)
    ids = np.resize(order(len(store), errand.excerpt.seed, 0), REPEATS * samples)
    first, *others = ids.reshape(REPEATS, samples)
    taken: dict[int, list[tuple[int, float]]] = {}
    began = time.perf_counter()
    for rows in errand.excerpt.sizes:
        if not taken or time.perf_counter() - began < TIMED_SECONDS:
            taken[rows] = [_run(state, errand, first, rows, store)]
    for repeat in others:
        if len(taken) > 1 or time.perf_counter() - began < TIMED_SECONDS:
            for rows, runs in taken.items():
                runs.append(_run(state, errand, repeat, rows, store))
    return tuple(
        Timed(rows=rows, samples=samples, padded_tokens=tuple(p for p, _ in runs), seconds=tuple(s for _, s in runs))
        for rows, runs in taken.items()
    )


def _run(state: TrainState, errand: Dry, ids: Any, rows: int, store: TokenStore) -> tuple[int, float]:
    """Run forward and backward of some samples; return the tokens that they were padded to, and the seconds."""
    began = time.perf_counter()
    prepare_heap(state.loss_scale.device, errand.workload.cpu_allocator)
    batches = lay_out(ids, rows, store, errand.workload, NO_SPECIAL)
    accumulate(state, batches, target_count(ids, store), errand.workload.precision).item()
    return sum(batch.padded_tokens for batch in batches), time.perf_counter() - began


def _expected_peak(state: TrainState, errand: Dry, store: TokenStore, meter: PeakMeter, worst_case: int) -> int:
    """Measure the micro-batches of a run's beginning that are padded to most tokens and that have most targets."""
    assert errand.excerpt is not None
    if errand.device == "cpu" and errand.workload.cpu_allocator == "fast":
        return worst_case  # such a heap comes to it, and keeps it
    rows = min(errand.micro_batch_size, len(store))
    whole = max(rows, min(len(store), BEGINNING_SAMPLES) // rows * rows)
    cuts: Any = order(len(store), errand.excerpt.seed, 0)[:whole].reshape(-1, rows)
    targets = np.array([[target_count([i], store) for i in cut] for cut in cuts])
    lengths = np.array([[len(store.tokens(i)) for i in cut] for cut in cuts])
    if errand.workload.task == "seq2seq":  # source and target are padded apart
        padded = (lengths - targets).max(axis=1) + targets.max(axis=1)
    else:
        padded = lengths.max(axis=1)
    _give_back(meter)
    for heaviest in {int(padded.argmax()), int(targets.sum(axis=1).argmax())}:
        _run(state, errand, cuts[heaviest], rows, store)
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
