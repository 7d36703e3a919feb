"""Epochs of steps, and what is measured of each: yields metrics, prints nothing. The order of samples is the seed's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from autotune.batching import share_of
from autotune.errands import Train
from autotune.plan import Layout, Plan
from trainer.data import Order, TokenStore
from trainer.evaluate import perplexity, total_loss
from trainer.memory import PeakMeter, prepare_heap
from trainer.microbatch import MicroBatch, SpecialTokens, lay_out, target_count
from trainer.model import build_for, save_model
from trainer.proof import TOLERANCE, first_samples, gradient_errors
from trainer.schedule import learning_rate_at, steps_in
from trainer.step import TrainState, start, train_step

Metrics = dict[str, Any]
SAFER: tuple[Layout, ...] = ("sorted", "fixed")
"""What is taken where rows of several samples are not exact."""


def train(errand: Train, stop: Callable[[], bool]) -> Iterator[Metrics]:
    """Train a plan from the beginning to the end, or until `stop` says so; the model is saved either way.

    Yields a `train` row for each step, a `validation` row for each epoch where there is validation data, and `event`
    rows: the start, steps whose gradient was not finite, and at last how it ended.
    """
    workload, recipe = errand.plan.workload, errand.recipe
    device = torch.device(errand.plan.hardware.device)
    meter = PeakMeter(device)
    torch.manual_seed(recipe.seed)
    model, store = build_for(workload, errand.ids, device), TokenStore(Path(errand.store))
    verified = _verify(errand, model, store)
    yield verified
    layout = verified["layout"]
    workload = workload.model_copy(update={"layout": layout})
    errand = errand.model_copy(update={"plan": errand.plan.model_copy(update={"workload": workload})})
    state = start(model, weight_decay=recipe.weight_decay, precision=workload.precision)
    del model
    total_steps = steps_in(len(store), errand.plan.batching.effective_batch_size, recipe)
    yield {"kind": "event", "event": "started", "step": 0, "total_steps": total_steps, "samples": len(store)}
    ended, seconds, training_seconds, peak, tokens = "finished", 0.0, 0.0, 0, 0
    began = time.perf_counter()
    for row in _steps(errand, state, store, total_steps, meter):
        # Since the row before, so that the seconds of all rows come to those of the loop.
        now = time.perf_counter()
        taken, began = now - began, now
        yield _timed(row, taken)
        seconds, peak = seconds + taken, max(peak, row.get("peak_memory_bytes", 0))
        if row["kind"] == "train":
            tokens, training_seconds = tokens + row["tokens"], training_seconds + taken
        if row["kind"] == "train" and not math.isfinite(row["gradient_norm"]):
            yield {"kind": "event", "event": "skipped_step", "step": state.step}
        if stop():
            ended = "stopped"
            break
    step, model = state.step, state.model
    yield _against(errand.plan, step, seconds, peak, tokens / max(training_seconds, 1e-9), tokens)
    # A save serialises the weights: what only training needs goes first.
    del state
    folder = Path(errand.output_dir) / "model"
    save_model(model, Path(errand.tokenizer_dir), folder)
    yield {"kind": "event", "event": ended, "step": step, "model": str(folder)}


def _verify(errand: Train, model: Any, store: TokenStore) -> Metrics:
    """Prove the plan's layout on this model and its first samples, else the next that holds, and say so."""
    workload, special = errand.plan.workload, special_tokens(model, errand)
    ids = first_samples(store, errand.recipe.seed, workload)
    errors: dict[Layout, float] = {}
    for layout in dict.fromkeys((workload.layout, *SAFER)):
        errors |= gradient_errors(model, [layout], workload, store, ids, special)
        if errors[layout] <= TOLERANCE:
            break
    return {
        "kind": "event",
        "event": "verified" if errors[layout] <= TOLERANCE else "unverified",
        "step": 0,
        "layout": layout,
        "asked": workload.layout,
        "errors": errors,
    }


def _against(plan: Plan, step: int, seconds: float, peak: int, tokens_per_second: float, tokens: int) -> Metrics:
    """Say how true the plan was: its peaks and its forecast, for the steps that were taken, and what became.

    Tokens a second are those of the steps alone, without evaluation.
    """
    memory, cast = plan.memory, plan.forecast
    planned = planned_training = None
    if cast is not None:
        planned = cast.total_seconds * step / cast.total_steps
        planned_training = cast.seconds_per_epoch * step / cast.steps_per_epoch
    return {
        "kind": "event",
        "event": "plan_against_real",
        "step": step,
        "planned_peak_bytes": memory.measured_peak_bytes or memory.predicted_peak_bytes,
        "expected_peak_bytes": memory.expected_peak_bytes,
        "real_peak_bytes": peak,
        "planned_seconds": planned,
        "real_seconds": seconds,
        "planned_tokens_per_second": tokens / planned_training if planned_training else None,
        "real_tokens_per_second": tokens_per_second,
    }


def _steps(
    errand: Train, state: TrainState, store: TokenStore, total_steps: int, meter: PeakMeter
) -> Iterator[Metrics]:
    effective = errand.plan.batching.effective_batch_size
    validation = TokenStore(Path(errand.validation_store)) if errand.validation_store else None
    epoch = 0
    while state.step < total_steps:
        permutation = Order(len(store), errand.recipe.seed, epoch)
        for first in range(0, len(store), effective):
            if state.step >= total_steps:
                break
            yield _one_step(errand, state, store, permutation[first : first + effective], total_steps, meter, epoch)
        epoch += 1
        if validation is not None:
            yield _validate(errand, state, validation, meter)


def _one_step(
    errand: Train,
    state: TrainState,
    store: TokenStore,
    ids: Any,
    total_steps: int,
    meter: PeakMeter,
    epoch: int,
) -> Metrics:
    plan, recipe = errand.plan, errand.recipe
    share = ids[: share_of(len(ids), plan.batching.world_size, 0)]
    special = special_tokens(state.model, errand)
    batches = lay_out(share, plan.batching.micro_batch_size, store, plan.workload, special)
    targets = target_count(ids, store)
    rate = learning_rate_at(state.step, total_steps, recipe)
    prepare_heap(state.loss_scale.device, plan.workload.cpu_allocator)
    meter.reset()
    loss, norm = train_step(state, batches, targets, plan.workload.precision, rate, recipe.clip)
    state.step += 1
    state.samples += len(ids)
    return {
        "kind": "train",
        "step": state.step,
        "epoch": epoch + 1,
        "loss": loss.item(),
        "learning_rate": rate,
        "gradient_norm": norm.item(),
        "samples": len(ids),
        "tokens": sum(batch.tokens for batch in batches),
        "target_tokens": targets,
        "padded_tokens": sum(batch.padded_tokens for batch in batches),
        "micro_batches": len(batches),
        "peak_memory_bytes": meter.peak_bytes(),
    }


def _timed(row: Metrics, seconds: float) -> Metrics:
    rates = {"tokens_per_second": row["tokens"] / seconds} if "tokens" in row else {}
    return row | {"seconds": seconds} | rates


def special_tokens(model: Any, errand: Train) -> SpecialTokens:
    """Return the ids that rows are padded and targets started with."""
    start_id = getattr(model.config, "decoder_start_token_id", None)
    return SpecialTokens(errand.ids.pad, errand.ids.pad if start_id is None else int(start_id))


def _validate(errand: Train, state: TrainState, store: TokenStore, meter: PeakMeter) -> Metrics:
    plan = errand.plan
    ids = range(len(store))
    special = special_tokens(state.model, errand)
    batches = _in_order(ids, plan, store, special)
    prepare_heap(state.loss_scale.device, plan.workload.cpu_allocator)
    meter.reset()
    total = total_loss(state.model, batches, plan.workload.precision, state.loss_scale.device).item()
    loss = total / max(1, target_count(ids, store))
    return {
        "kind": "validation",
        "step": state.step,
        "loss": loss,
        "perplexity": perplexity(loss),
        "samples": len(store),
        "peak_memory_bytes": meter.peak_bytes(),
    }


def _in_order(ids: range, plan: Plan, store: TokenStore, special: SpecialTokens) -> Iterator[MicroBatch]:
    rows, together = plan.batching.micro_batch_size, plan.batching.effective_batch_size
    for first in range(0, len(ids), together):
        yield from lay_out(ids[first : first + together], rows, store, plan.workload, special)
