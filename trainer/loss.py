"""The token-weighted loss. Positions without a target are dropped before the vocabulary head, by ready indices."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.forward import forward
from trainer.microbatch import IGNORED, MicroBatch


def loss_sum(model: Any, batch: MicroBatch) -> Tensor:
    """Return the sum of the cross-entropies of all targets, in fp32 at least.

    The model's own forward runs whole, with all it does before and after its head (T5 scales, BART adds a bias, Gemma
    caps); only the head's input is narrowed, from [rows, length, width] to [1, targets, width], so that logits of
    positions without a target never exist.
    """
    return _cross_entropies(_logits_at_targets(model, batch), batch)


def loss_and_right(model: Any, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Return the same sum, and how many targets have the greatest logit: for evaluation, of one forward."""
    logits = _logits_at_targets(model, batch)
    right = (logits.argmax(-1) == batch.targets).sum()
    return _cross_entropies(logits, batch), right


def _logits_at_targets(model: Any, batch: MicroBatch) -> Tensor:
    def at_targets(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return args[0].flatten(0, 1).index_select(0, batch.target_positions).unsqueeze(0)

    with model.get_output_embeddings().register_forward_pre_hook(at_targets):
        return forward(model, batch.inputs).squeeze(0)


def _cross_entropies(logits: Tensor, batch: MicroBatch) -> Tensor:
    wide = logits if logits.element_size() >= 4 else logits.float()
    return F.cross_entropy(wide, batch.targets, reduction="sum", ignore_index=IGNORED)
