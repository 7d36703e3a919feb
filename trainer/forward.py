"""A model's forward on a micro-batch: the masks that keep samples of a row, and padding, apart.

Masks are added to the scores, in the type that attention computes in, so that they are made once and cast nowhere. They
are ready on the device without a look at what they hold: nothing is read back, and fake tensors can pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def forward(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits of a micro-batch's inputs, of whatever positions the model's head is given."""
    if "decoder_input_ids" in inputs:
        return _seq2seq(model, inputs)
    given = {"input_ids": inputs["input_ids"]}
    if "segments" in inputs:
        given["position_ids"] = inputs["position_ids"]
        given["attention_mask"] = _mask(model, inputs["segments"], inputs["segments"], causal=True)
    logits: Tensor = model(**given, use_cache=False).logits
    return logits


def _seq2seq(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    sources, given = inputs["segments"], {"decoder_input_ids": inputs["decoder_input_ids"]}
    if "decoder_segments" not in inputs:
        # One sample a row: an encoder looks to the right, and must not see the padding there.
        real = (sources != 0)[:, None, None, :]
        whole: Tensor = model(
            input_ids=inputs["input_ids"], attention_mask=_added(model, real), **given, use_cache=False
        ).logits
        return whole
    targets, encoder = inputs["decoder_segments"], model.get_encoder()
    with _positions(encoder, inputs["position_ids"]):
        encoded = encoder(input_ids=inputs["input_ids"], attention_mask=_mask(model, sources, sources, causal=False))
    with _positions(model.get_decoder(), inputs["decoder_position_ids"]):
        logits: Tensor = model(
            encoder_outputs=encoded,
            attention_mask=_mask(model, targets, sources, causal=False),
            decoder_attention_mask=_mask(model, targets, targets, causal=True),
            **given,
            use_cache=False,
        ).logits
    return logits


def _mask(model: Any, of: Tensor, to: Tensor, *, causal: bool) -> Tensor:
    """Return [rows, 1, length, length]: a sample of a row sees itself alone, and causally nothing to its right."""
    visible = of[:, :, None] == to[:, None, :]
    if causal:
        visible = visible.tril()
    return _added(model, visible[:, None])


def _added(model: Any, visible: Tensor) -> Tensor:
    """Return what is added to the scores. The lowest number, not infinity: padding may see nothing at all."""
    device, dtype = visible.device.type, model.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


@contextmanager
def _positions(stack: Any, positions: Tensor) -> Iterator[None]:
    """Have a stack that learns absolute positions, and counts them itself (BART), begin anew with each sample."""
    learned = getattr(stack, "embed_positions", None)
    if not isinstance(learned, nn.Embedding):
        yield
        return

    def begin_anew(module: nn.Embedding, _args: Any, _embedded: Tensor) -> Tensor:
        return F.embedding(positions + getattr(module, "offset", 0), module.weight)

    with learned.register_forward_hook(begin_anew):
        yield
