"""The proof that a layout changes nothing: gradients of this model on the first real samples, against one by one.

Packed rows may leak from one sample into another, in a model that ignores the mask or counts positions its own way.
What is proven is the model, not the idea: in fp32 and without dropout, so that nothing else differs; on samples that
are cut short, so that it takes little time, and no more memory than a dry step does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autotune.errors import ConfigurationError
from autotune.plan import Layout, Workload
from trainer.data import Order, TokenStore
from trainer.loss import loss_sum
from trainer.microbatch import Array, MicroBatch, Samples, SpecialTokens, lay_out, target_count

TOLERANCE = 1e-3
"""Of the gradient's norm. Rounding comes to 1e-6, half-precision matrix units to 1e-4, a leak to 1e-2 and more."""
SAMPLES, TOKENS, LOOKED_AT = 4, 64, 256
"""How many are taken, cut to so many tokens a side, of the first so many of a run."""


def first_samples(store: TokenStore, seed: int, workload: Workload) -> list[int]:
    """Return the first few samples of a run that have a target."""
    short = Short(store, workload)
    beginning = Order(len(store), seed, 0)[:LOOKED_AT].tolist()
    return [i for i in beginning if target_count([i], short)][:SAMPLES]


def gradient_errors(
    model: Any,
    layouts: Sequence[Layout],
    workload: Workload,
    whole: Samples,
    ids: Sequence[int],
    special: SpecialTokens,
) -> dict[Layout, float]:
    """Return by how much each layout moves the gradient and the loss of a few samples, as a share of either.

    Raises ConfigurationError where they are no number: nothing could be trained.
    """
    samples = Short(whole, workload)
    if not ids:
        return dict.fromkeys(layouts, 0.0)  # there is no gradient that could change
    parameters = [p for p in model.parameters() if p.requires_grad]
    was_training = model.training
    model.eval()
    alone = workload.model_copy(update={"layout": "fixed"})
    errors: dict[Layout, float] = {}
    for layout in layouts:
        arranged = workload.model_copy(update={"layout": layout})
        loss = _backward(model, [b for i in ids for b in lay_out([i], 1, samples, alone, special)], 1.0)
        norm = _norm(parameters)
        # What one layout adds the other takes away, so that one gradient is held, as in a step.
        its_loss = _backward(model, lay_out(ids, len(ids), samples, arranged, special), -1.0)
        moved = _norm(parameters) / norm
        model.zero_grad(set_to_none=True)
        if not math.isfinite(moved):
            raise ConfigurationError(
                f"the gradient of {workload.model} on its first samples is not finite",
                "its weights may be damaged: give the folder of another checkpoint",
            )
        errors[layout] = max(moved, abs(its_loss / loss - 1))
    model.train(was_training)
    return errors


class Short:
    """Samples cut short, so that several of them fit into any row: their end, or the beginning of both sides."""

    def __init__(self, samples: Samples, workload: Workload) -> None:
        self._samples = samples
        self._seq2seq = workload.task == "seq2seq"
        self._most = max(2, min(TOKENS, min(workload.limits) // SAMPLES))

    def tokens(self, i: int) -> Array:
        """Return the tokens that are left of sample i."""
        tokens = self._samples.tokens(i)
        if not self._seq2seq:
            return tokens[-self._most :]
        border = self._border(i)
        return tokens[[*range(min(border, self._most)), *range(border, min(len(tokens), border + self._most))]]

    def spans(self, i: int) -> Array:
        """Return the target spans that are left, [spans, 2]."""
        if self._seq2seq:
            return np.array([[min(self._border(i), self._most), len(self.tokens(i))]])
        cut = max(0, len(self._samples.tokens(i)) - self._most)
        spans = (self._samples.spans(i) - cut).clip(min=1 if cut else 0)
        return spans[spans[:, 1] > spans[:, 0]]

    def _border(self, i: int) -> int:
        return int(self._samples.spans(i)[0, 0])


def _backward(model: Any, batches: Iterable[MicroBatch], sign: float) -> float:
    total = 0.0
    for batch in batches:
        loss: Tensor = loss_sum(model, batch.to(model.device))
        (sign * loss).backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def _norm(parameters: list[Tensor]) -> float:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
