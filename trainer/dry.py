"""The dry step: the real step on worst-case samples, measured by phase. What a plan promises is what this held."""

from __future__ import annotations

import time

import torch

from autotune.errands import DRY_LENGTHS, DRY_MICRO_BATCHES, Dry, DryReport
from autotune.plan import Timing
from trainer.evaluate import total_loss
from trainer.memory import PeakMeter
from trainer.microbatch import MicroBatch, SpecialTokens, WorstCase, collate, target_count
from trainer.model import build_for
from trainer.step import TrainState, accumulate, start, update

LEARNING_RATE = 1e-4
CLIP = 1.0


def take_dry_steps(errand: Dry) -> DryReport:
    """Build the model, take the steps and one evaluation batch; the peak of each phase is its highest over all steps.

    A first step is no guide: the optimizer's moments are made in it, and held in all later ones.
    """
    workload, device = errand.workload, torch.device(errand.device)
    meter = PeakMeter(device)
    torch.manual_seed(0)
    model = build_for(workload, None, device)
    phases = {"start": meter.peak_bytes()}
    # What is held while a micro-batch runs, whatever its size: gradients and two moments come to what there is now.
    resident = meter.held_bytes() + 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    state = start(model, weight_decay=0.1, precision=workload.precision)
    special = SpecialTokens(0, 0)
    ids, timings = range(errand.micro_batch_size), []
    for share in DRY_LENGTHS:
        samples = WorstCase(workload, share)
        batch = collate(ids, samples, workload, special)
        targets = DRY_MICRO_BATCHES * target_count(ids, samples)
        began = time.perf_counter()
        for name, peak in _step_by_phase(state, batch, targets, errand, meter).items():
            phases[name] = max(phases.get(name, 0), peak)
        seconds = (time.perf_counter() - began) / DRY_MICRO_BATCHES
        timings.append(Timing(padded_tokens=batch.padded_tokens, seconds=seconds))
    meter.reset()
    total_loss(model, [batch], workload.precision, device).item()
    phases["evaluation"] = meter.peak_bytes()
    peak = max(phases.values())
    return DryReport(
        peak_bytes=peak,
        phases=phases,
        resident_bytes=resident,
        host_peak_bytes=meter.host_peak_bytes() if device.type == "cuda" else peak,
        timings=tuple(timings),
    )


def _step_by_phase(state: TrainState, batch: MicroBatch, targets: int, errand: Dry, meter: PeakMeter) -> dict[str, int]:
    """Take the step that `train_step` takes, its two phases apart; reading the loss waits for the device."""
    precision = errand.workload.precision
    meter.reset()
    accumulate(state, [batch] * DRY_MICRO_BATCHES, targets, precision).item()
    forward_backward = meter.peak_bytes()
    meter.reset()
    update(state, precision, LEARNING_RATE, CLIP).item()
    return {"forward_backward": forward_backward, "optimizer": meter.peak_bytes()}
