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
from autotune.plan import Layout, LossHead, Workload
from trainer.compiled import eagerly
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
    """Return by how much each layout moves the gradient and the loss of a few samples, as a share of either, 1 at most.

    The workload's loss head is part of it: what is moved from is one sample at a time, and the model's own logits.
    Raises ConfigurationError where they are no number, so that nothing could be trained, and for a head that is wrong.
    """
    samples = Short(whole, workload)
    if not ids:
        return dict.fromkeys(layouts, 0.0)  # there is no gradient that could change
    was_training = model.training
    model.eval()
    plain = workload.model_copy(update={"layout": "fixed"})
    alone = [batch for i in ids for batch in lay_out([i], 1, samples, plain, special)]
    errors: dict[Layout, float] = {}
    with eagerly(workload.compile):
        for layout in layouts:
            arranged = workload.model_copy(update={"layout": layout})
            together = lay_out(ids, len(ids), samples, arranged, special)
            moved = _moved(model, alone, together, workload.loss_head)
            errors[layout] = moved if moved <= 1 else 1.0  # what is not finite, too
        if not min(errors.values()) <= TOLERANCE:
            _check_itself(model, alone, workload)
    model.train(was_training)
    return errors


def _check_itself(model: Any, alone: Sequence[MicroBatch], workload: Workload) -> None:
    """Where no layout holds, see whether it is for the model itself, or its loss head."""
    if not math.isfinite(_moved(model, alone, alone, "full")):
        raise ConfigurationError(
            f"the gradient of {workload.model} on its first samples is not finite",
            "its weights may be damaged: give the folder of another checkpoint",
        )
    error = _moved(model, alone, alone, workload.loss_head)
    if not error <= TOLERANCE:
        raise ConfigurationError(
            f"the {workload.loss_head} loss head changes the gradient of {workload.model} by {error:.0e}",
            "use --loss-head full, or leave it out",
        )


def _moved(model: Any, alone: Sequence[MicroBatch], together: Sequence[MicroBatch], loss_head: LossHead) -> float:
    """Return the greater change, that of the gradient by norm or of the loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = _backward(model, alone, 1.0, "full")
    norm = _norm(parameters)
    # What one way adds the other takes away, so that one gradient is held, as in a step.
    its_loss = _backward(model, together, -1.0, loss_head)
    moved = _norm(parameters) / norm
    model.zero_grad(set_to_none=True)
    return max(moved, abs(its_loss / loss - 1))


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


def _backward(model: Any, batches: Iterable[MicroBatch], sign: float, loss_head: LossHead) -> float:
    total = 0.0
    for batch in batches:
        loss: Tensor = loss_sum(model, batch.to(model.device), loss_head)
        (sign * loss).backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def _norm(parameters: list[Tensor]) -> float:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
