"""Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): Adam's memory of squared gradients, kept by rows and columns.

At a learning rate that acts: the paper's own schedule, and its scaling by the size of a weight, are left out. Like
torch's fused AdamW it divides gradients by `grad_scale` as it reads them, and changes nothing where `found_inf` is 1:
nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

DECAY = 0.8
"""The squares are averaged with 1 - t^-0.8 (section 7.2)."""
LEAST_SQUARE = 1e-30
LARGEST_UPDATE = 1.0
"""Root mean square beyond which an update is scaled down (section 6)."""


class Adafactor(torch.optim.Optimizer):
    """Updates matrices by factored second moments, vectors by whole ones; weight decay is apart, as AdamW's."""

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override] # there is nothing to evaluate again
        """Update each parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, gradient: Tensor, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {name: torch.zeros_like(means) for name, means in _means(parameter).items()}
        taken = 1.0 - self.found_inf
        state["step"] += taken
        gradient = (gradient / self.grad_scale).masked_fill_(self.found_inf.bool(), 0.0)
        weight = taken * state["step"].clamp(min=1.0) ** -DECAY
        for name, means in _means(gradient.square() + LEAST_SQUARE).items():
            state[name].lerp_(means, weight)
        update = _scaled(gradient, state)
        root_mean_square = update.square().mean().sqrt()
        update.div_((root_mean_square / LARGEST_UPDATE).clamp_(min=1.0)).masked_fill_(self.found_inf.bool(), 0.0)
        parameter.mul_(1.0 - rate * decay * taken).sub_(rate * update)


def _means(squares: Tensor) -> dict[str, Tensor]:
    if squares.ndim < 2:
        return {"squares": squares}
    return {"rows": squares.mean(-1, keepdim=True), "columns": squares.mean(-2, keepdim=True)}


def _scaled(gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Divide a gradient by the root of its mean squares: of a matrix rows x columns / mean of rows (algorithm 4)."""
    if gradient.ndim < 2:
        return gradient.mul_(state["squares"].rsqrt())
    rows = state["rows"] / state["rows"].mean(-2, keepdim=True)
    return gradient.mul_(rows.rsqrt()).mul_(state["columns"].rsqrt())
