"""The token-weighted loss. Positions without a target are dropped before the vocabulary head, by ready indices.

Loss head `full` holds the logits of all targets at once, and again their gradient. `chunked` holds those of a few
hundred: it takes the gradient of each chunk as soon as its loss is known, so that no logits are kept, nor made twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotune.plan import LossHead
from trainer.forward import forward
from trainer.microbatch import IGNORED, MicroBatch

LOGITS = 2**24
"""In a chunk, at most: 64 MiB in fp32. A matrix product of less is slower, and more is no faster."""
LEAST_CHUNK = 256

KNOWN_TAILS = {
    *("bart", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama"),
    *("mbart", "mistral", "mt5", "qwen2", "qwen3", "smollm3", "t5"),
}
"""Families (transformers' model types) of which it is known what they do to their logits: what `_tail` does."""

Tail = Callable[[Tensor], Tensor]


def loss_sum(model: Any, batch: MicroBatch, loss_head: LossHead) -> Tensor:
    """Return the sum of the cross-entropies of all targets, in fp32 at least."""
    hidden, logits = _at_targets(model, batch, loss_head)
    if loss_head == "full":
        return _cross_entropy(logits, batch.targets)
    trained = [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
    size = _chunk_size(logits.shape[-1])
    loss: Tensor = _Chunked.apply(hidden, batch.targets, _tail(model), size, *trained)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def loss_and_right(model: Any, batch: MicroBatch, loss_head: LossHead) -> tuple[Tensor, Tensor]:
    """Return the same sum, and how many targets have the greatest logit: for evaluation, of one forward."""
    hidden, logits = _at_targets(model, batch, loss_head)
    pieces: Iterable[tuple[Tensor, Tensor]] = [(logits, batch.targets)]
    if loss_head == "chunked":
        size, tail = _chunk_size(logits.shape[-1]), _tail(model)
        cuts = zip(torch.split(hidden, size), torch.split(batch.targets, size), strict=True)
        pieces = ((tail(h), targets) for h, targets in cuts)
    sums = [(_cross_entropy(some, targets), (some.argmax(-1) == targets).sum()) for some, targets in pieces]
    losses, right = zip(*sums, strict=True)
    return torch.stack(losses).sum(), torch.stack(right).sum()


def _at_targets(model: Any, batch: MicroBatch, loss_head: LossHead) -> tuple[Tensor, Tensor]:
    """Return what the head is given at the targets, [targets, width], and what the model makes of it.

    The model's own forward runs whole, with all it does before its head (T5 scales there); only the head's input is
    narrowed, from [rows, length, width] to [1, targets, width], so that logits of positions without a target never
    exist. Where the head is chunked it is given a single position.
    """
    hidden: list[Tensor] = []

    def narrowed(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        hidden.append(args[0].flatten(0, 1).index_select(0, batch.target_positions))
        return (hidden[0] if loss_head == "full" else hidden[0][:1].detach()).unsqueeze(0)

    with model.get_output_embeddings().register_forward_pre_hook(narrowed):
        logits = forward(model, batch.inputs).squeeze(0)
    return hidden[0], logits


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits if logits.element_size() >= 4 else logits.float()
    return F.cross_entropy(wide, targets, reduction="sum", ignore_index=IGNORED)


def _chunk_size(vocabulary_size: int) -> int:
    """Return the targets of a chunk: a power of two, so that what is left of a batch is of few lengths too."""
    return int(max(LEAST_CHUNK, 2 ** ((LOGITS // vocabulary_size).bit_length() - 1)))


def _tail(model: Any) -> Tail:
    """Return the head, and what models do after it: BART adds a bias, Gemma caps."""
    head = model.get_output_embeddings()
    bias = getattr(model, "final_logits_bias", None)
    cap = getattr(model.config, "final_logit_softcapping", None)

    def tail(hidden: Tensor) -> Tensor:
        logits: Tensor = head(hidden)
        if bias is not None:
            logits = logits + bias[0].to(logits.dtype)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return tail


class _Chunked(torch.autograd.Function):
    """The sum of losses, chunk by chunk; gradients are taken in the forward, and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, tail: Tail, size: int, *trained: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        of_hidden = torch.empty_like(hidden)
        of_trained = [torch.zeros_like(p) for p in trained]
        for h, t, g in zip(*(torch.split(whole, size) for whole in (hidden, targets, of_hidden)), strict=True):
            with torch.enable_grad():
                piece = h.detach().requires_grad_()
                loss = _cross_entropy(tail(piece), t)
                first, *others = torch.autograd.grad(loss, (piece, *trained))
            g.copy_(first)
            for whole, part in zip(of_trained, others, strict=True):
                whole.add_(part)
            total += loss.detach()
        ctx.save_for_backward(of_hidden, *of_trained)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *of_trained = ctx.saved_tensors
        scale = upstream[0]
        return (of_hidden.mul_(scale), None, None, None, *(g.mul_(scale) for g in of_trained))
