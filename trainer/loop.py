"""Epochs of steps, and what is measured of each: yields metrics, prints nothing. The order of samples is the seed's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autotune.batching import share_of
from autotune.errands import Train
from autotune.plan import Layout, Plan
from trainer.data import Order, TokenStore
from trainer.evaluate import Evaluator, Metrics, special_tokens
from trainer.memory import PeakMeter, prepare_heap
from trainer.microbatch import lay_out, target_count
from trainer.model import build_for, save_model
from trainer.proof import TOLERANCE, first_samples, gradient_errors
from trainer.rate import token_flops
from trainer.schedule import learning_rate_at, steps_in
from trainer.step import TrainState, start, train_step

WAITS = ("cpu",)
"""Devices that compute while they are asked to: on others a step runs on while the next is laid out."""
SAFER: tuple[Layout, ...] = ("sorted", "fixed")
"""What is taken where rows of several samples are not exact."""


def train(errand: Train, stop: Callable[[], bool]) -> Iterator[Metrics]:
    """Train a plan from the beginning to the end, or until `stop` says so; the model is saved either way.

    Yields a `train` row for each step; for each evaluation a `sample` row for each fixed prompt, and a `validation` row
    where there is validation data; and `event` rows: the start, steps whose gradient was not finite, and at last how it
    ended. The model with the least validation loss is kept beside the last, where the two are not the same.
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
    counted = _utilization(errand.plan, model)
    evaluator, best = Evaluator(errand, store, model, meter), Best(Path(errand.output_dir) / "best")
    state = start(model, workload, recipe.weight_decay)
    del model
    total_steps = steps_in(len(store), errand.plan.batching.effective_batch_size, recipe)
    yield {"kind": "event", "event": "started", "step": 0, "total_steps": total_steps, "samples": len(store)}
    seconds, training_seconds, generation_seconds, peak, tokens = 0.0, 0.0, 0.0, 0, 0
    began = time.perf_counter()
    for row in _steps(errand, state, store, total_steps, meter, evaluator, best, stop):
        if row["kind"] == "sample":  # its time is that of its evaluation
            yield row
            continue
        # Since the row before, so that the seconds of all rows come to those of the loop.
        now = time.perf_counter()
        taken, began = now - began, now
        yield _timed(row, taken, counted)
        seconds, peak = seconds + taken, max(peak, row.get("peak_memory_bytes", 0))
        generation_seconds += row.get("generation_seconds", 0.0)
        if row["kind"] == "train":
            tokens, training_seconds = tokens + row["tokens"], training_seconds + taken
        if row["kind"] == "train" and not math.isfinite(row["gradient_norm"]):
            yield {"kind": "event", "event": "skipped_step", "step": row["step"]}
    ended = "stopped" if stop() and state.step < total_steps else "finished"
    step, model = state.step, state.model
    against = _against(errand.plan, step, seconds, peak, tokens / max(training_seconds, 1e-9), tokens)
    yield against | {"generation_seconds": generation_seconds}
    # A save serialises the weights: what only training needs goes first.
    del state
    folder = Path(errand.output_dir) / "model"
    if best.step == step:
        best.folder.rename(folder)
        best.folder = folder
    else:
        save_model(model, Path(errand.tokenizer_dir), folder)
    yield {"kind": "event", "event": ended, "step": step, "model": str(folder)} | best.told()


@dataclass
class Best:
    """The evaluation with the least validation loss so far, and where its model is."""

    folder: Path
    step: int | None = None
    loss: float = math.inf
    without: int = 0
    """Evaluations since, none of which had less."""

    def take(self, step: int, loss: float) -> bool:
        """Say whether this is the best there was."""
        if not loss < self.loss:  # nor is what is no number
            self.without += 1
            return False
        self.step, self.loss, self.without = step, loss, 0
        return True

    def told(self) -> Metrics:
        """Return what a row says of it; nothing where nothing was evaluated."""
        if self.step is None:
            return {}
        return {"best_step": self.step, "best_loss": self.loss, "best_model": str(self.folder)}


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
    errand: Train,
    state: TrainState,
    store: TokenStore,
    total_steps: int,
    meter: PeakMeter,
    evaluator: Evaluator,
    best: Best,
    stop: Callable[[], bool],
) -> Iterator[Metrics]:
    """Take steps and evaluate between them; a row is read when the device has begun the next step, where it can."""
    recipe, effective = errand.recipe, errand.plan.batching.effective_batch_size
    every = recipe.eval_every or (math.ceil(len(store) / effective) if evaluator.validation else total_steps)
    epoch, waits, unread = 0, state.loss_scale.device.type in WAITS, None
    while state.step < total_steps:
        permutation = Order(len(store), recipe.seed, epoch)
        for first in range(0, len(store), effective):
            taken = _one_step(errand, state, store, permutation[first : first + effective], total_steps, meter, epoch)
            if unread is not None:
                yield _read(unread)
            unread = taken
            stopped = stop()
            ended = stopped or state.step == total_steps
            evaluates = not stopped and (ended or state.step % every == 0)
            if waits or ended or evaluates:
                yield _read(unread)
                unread = None
            if evaluates:
                yield from _evaluate(errand, state, evaluator, best)
            if best.without >= (recipe.early_stopping or math.inf):
                ending = {"kind": "event", "event": "early_stopping", "step": state.step}
                yield ending | {"evaluations": best.without} | best.told()
                return
            if ended or (unread is None and stop()):
                return
        epoch += 1


def _evaluate(errand: Train, state: TrainState, evaluator: Evaluator, best: Best) -> Iterator[Metrics]:
    """Evaluate, and keep the model if it is the best so far."""
    for row in evaluator.evaluate(state.model, state.step):
        if row["kind"] == "validation":
            row["best"] = best.take(state.step, row["loss"])
            if row["best"]:
                save_model(state.model, Path(errand.tokenizer_dir), best.folder)
        yield row


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
    began = time.perf_counter()
    batches = lay_out(share, plan.batching.micro_batch_size, store, plan.workload, special)
    targets = target_count(ids, store)
    data_seconds = time.perf_counter() - began
    rate = learning_rate_at(state.step, total_steps, recipe)
    prepare_heap(state.loss_scale.device, plan.workload.cpu_allocator)
    meter.reset()
    loss, norm = train_step(state, batches, targets, plan.workload, rate, recipe.clip)
    state.step += 1
    state.samples += len(ids)
    return {
        "kind": "train",
        "step": state.step,
        "epoch": epoch + 1,
        "loss": loss,
        "learning_rate": rate,
        "gradient_norm": norm,
        "samples": len(ids),
        "tokens": sum(batch.tokens for batch in batches),
        "target_tokens": targets,
        "padded_tokens": sum(batch.padded_tokens for batch in batches),
        "micro_batches": len(batches),
        "data_seconds": data_seconds,
        "peak_memory_bytes": meter.peak_bytes(),
    }


def _read(row: Metrics) -> Metrics:
    """Read what a step left on the device, which waits for it."""
    return row | {name: row[name].item() for name in ("loss", "gradient_norm")}


def _utilization(plan: Plan, model: Any) -> Callable[[Metrics, float], Metrics]:
    """Return what says of a step which share it took of the device's rate of matrix products, where that is known."""
    flops, rates = token_flops(model), plan.speed.matrix_flops if plan.speed else {}
    rate = rates.get(plan.workload.precision)

    def utilization(row: Metrics, seconds: float) -> Metrics:
        used = flops.of_step(row["tokens"], row["target_tokens"]) / seconds
        return {"model_flops_utilization": used / rate} if rate else {}

    return utilization


def _timed(row: Metrics, seconds: float, utilization: Callable[[Metrics, float], Metrics]) -> Metrics:
    row = row | {"seconds": seconds}
    if row["kind"] != "train":
        return row
    return row | {"tokens_per_second": row["tokens"] / seconds} | utilization(row, seconds)
