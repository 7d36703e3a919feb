"""How fast this device multiplies matrices and moves memory, and how much of the first a step needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from autotune.plan import Precision

SIDE = {"cpu": 1024, "cuda": 8192}
"""Of square matrices: products that take some milliseconds, of sizes at which devices do best."""
COPIED_BYTES = {"cpu": 128 * 2**20, "cuda": 256 * 2**20}
"""More than caches hold: 96 MiB at most on cards, 32 MiB for each few cores on processors."""
REPEATS = 8
ENOUGH_SECONDS = 1.0
"""After which no more are taken: some cards multiply fp16 at a 64th of their fp32 rate, 16 s for a product."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def matrix_flops(device: torch.device, precision: Precision) -> float:
    """Return the floating-point operations a second of the fastest of a few dense matrix products."""
    side = SIDE.get(device.type, SIDE["cpu"])
    left, right = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: left @ right, device)


def copy_bytes(device: torch.device) -> float:
    """Return the bytes a second, read ones and written ones together, of the fastest of a few large copies.

    As STREAM counts them (McCalpin 1995): what a processor reads of a line before it writes to it is left out.
    """
    held = COPIED_BYTES.get(device.type, COPIED_BYTES["cpu"])
    source = torch.ones(held, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * held / _fastest(lambda: target.copy_(source), device)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest time of several, of two at least."""
    taken = [_seconds(work, device), _seconds(work, device)]
    while len(taken) < 1 + REPEATS and sum(taken) < ENOUGH_SECONDS:
        taken.append(_seconds(work, device))
    return min(taken)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
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
