"""One optimizer step. Three callers: the loop, the dry step, and the trace.

So it has no shape that depends on data and reads nothing back to the host: positions with a target come as indices,
clipping, scaling and skipping are tensor operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotune.plan import Precision, Workload
from trainer.adafactor import Adafactor
from trainer.loss import loss_sum
from trainer.microbatch import MicroBatch

BETAS = (0.9, 0.95)
FIRST_LOSS_SCALE = 2.0**16
SCALE_GROWTH_STEPS = 2000
"""fp16 only: torch's own defaults (torch.amp.GradScaler)."""


@dataclass
class TrainState:
    """What a step changes."""

    model: Any
    optimizer: torch.optim.Optimizer
    loss_scale: Tensor
    """What the loss is multiplied by before the backward; 1 but for fp16."""
    steps_since_overflow: Tensor


def start(model: Any, workload: Workload, weight_decay: float) -> TrainState:
    """Return the state before the first step; the optimizer decays no vectors (norms and biases)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if workload.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    else:
        optimizer = Adafactor(groups)
    device = parameters[0].device
    scale = FIRST_LOSS_SCALE if workload.precision == "fp16" else 1.0
    return TrainState(model, optimizer, torch.tensor(scale, device=device), torch.zeros((), device=device))


def trained(state: TrainState) -> list[Tensor]:
    """Return the parameters that a step changes."""
    return [p for group in state.optimizer.param_groups for p in group["params"]]


def train_step(
    state: TrainState,
    micro_batches: Iterable[MicroBatch],
    target_tokens: int,
    workload: Workload,
    learning_rate: float,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """Take one step; return its loss (mean over target tokens) and gradient norm before clipping, as tensors."""
    loss = accumulate(state, micro_batches, target_tokens, workload)
    return loss, update(state, loss, workload, learning_rate, clip)


def accumulate(
    state: TrainState, micro_batches: Iterable[MicroBatch], target_tokens: int, workload: Workload
) -> Tensor:
    """Add up the gradient of (sum of token losses) / `target_tokens`, those of the whole step over all ranks.

    So the gradient is that of one big batch however the step is cut. Gradients are scaled by `state.loss_scale`.
    """
    device = state.loss_scale.device
    total = torch.zeros((), device=device)
    state.model.train()
    for batch in micro_batches:
        batch = batch.to(device)
        with autocast(device, workload.precision):
            loss = loss_sum(state.model, batch, workload.loss_head)
        (loss * (state.loss_scale / max(target_tokens, 1))).backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach()
    return total / max(target_tokens, 1)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Compute in half precision where that is safe; weights stay fp32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def update(state: TrainState, loss: Tensor, workload: Workload, learning_rate: float, clip: float) -> Tensor:
    """Clip, step and zero; return the norm of the unscaled gradient.

    A gradient or a loss that is not finite changes no weight and no moment.

    Unscaling and clipping ride on the optimizer, which divides by `grad_scale` as it reads the gradient, and
    leaves weights and moments alone where `found_inf` is 1 (what torch.amp.GradScaler hands it).
    """
    gradients = [p.grad for p in trained(state) if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) / state.loss_scale
    shrink = torch.clamp(clip / (norm + 1e-6), max=1.0) if clip > 0 else torch.ones_like(norm)
    overflow = 1.0 - (norm + loss).isfinite().float()
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.grad_scale = (state.loss_scale / shrink).float()  # type: ignore[attr-defined]
    state.optimizer.found_inf = overflow  # type: ignore[attr-defined]
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if workload.precision == "fp16":
        _adapt_loss_scale(state, overflow)
    return norm


def _adapt_loss_scale(state: TrainState, overflow: Tensor) -> None:
    """Halve the scale after an overflow, double it after many steps without one."""
    state.steps_since_overflow = (state.steps_since_overflow + 1.0) * (1.0 - overflow)
    grown = (state.steps_since_overflow >= SCALE_GROWTH_STEPS).float()
    state.steps_since_overflow = state.steps_since_overflow * (1.0 - grown)
    state.loss_scale = state.loss_scale * (1.0 + grown) * (1.0 - 0.5 * overflow)
