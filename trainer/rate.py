"""How fast this device multiplies matrices, and how much of that a step needs: utilization is one over the other."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from autotune.plan import Precision

SIDE = {"cpu": 1024, "cuda": 8192}
"""Of square matrices: products that take some milliseconds, of sizes at which devices do best."""
REPEATS = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def matrix_flops(device: torch.device, precision: Precision) -> float:
    """Return the floating-point operations a second of the fastest of a few dense matrix products."""
    side = SIDE.get(device.type, SIDE["cpu"])
    left, right = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    fastest = min(_seconds(left, right, device) for _ in range(1 + REPEATS))
    return 2 * side**3 / fastest


def _seconds(left: torch.Tensor, right: torch.Tensor, device: torch.device) -> float:
    began = time.perf_counter()
    left @ right
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


class TokenFlops(NamedTuple):
    """Of forward and backward: of a token that is predicted from, and of one that is predicted."""

    of_others: float
    of_targets: float

    def of_step(self, tokens: int, targets: int) -> float:
        """Return those of a step of so many real tokens."""
        return self.of_others * (tokens - targets) + self.of_targets * targets


def token_flops(model: Any) -> TokenFlops:
    """Count two operations for each weight of a matrix and each token in the forward, and twice that in the backward.

    As in Kaplan et al. 2020 (arXiv 2001.08361), 2.1: attention's own products, which grow with length, are left out.
    The vocabulary head sees targets alone, an encoder sources alone. A frozen matrix is counted for its forward.
    """
    head = model.get_output_embeddings().weight
    tables = {model.get_input_embeddings().weight, head}

    def flops(module: Any) -> float:
        matrices = [p for p in module.parameters() if p.ndim >= 2 and p not in tables]
        return sum(_flops(p) for p in matrices)

    if not model.config.is_encoder_decoder:
        return TokenFlops(flops(model), flops(model) + _flops(head))
    return TokenFlops(flops(model.get_encoder()), flops(model.get_decoder()) + _flops(head))


def _flops(matrix: torch.Tensor) -> float:
    return matrix.numel() * (6 if matrix.requires_grad else 2)
