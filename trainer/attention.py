"""How processors attend, in pieces; and how cards do, for a trace: by kernels that keep other tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autotune.batching import PADDING_MULTIPLE
from autotune.plan import Workload
from trainer.model import load_config

aten = torch.ops.aten

PIECES = 4
"""They compute 5/8 of the scores; 8 would compute 9/16 and are slower, each taking calls of its own."""
LEAST_LENGTH = 384
"""Of a row: 512 gains, 280 loses."""


@contextmanager
def attention_of_processors() -> Iterator[None]:
    """Have positions that look to their left alone, by a mask, attend in pieces, none to what is right of all of it.

    A processor's kernel computes all scores, up to 512 keys, and then masks half of them.
    """
    whole, keys_of_each = ALL_ATTENTION_FUNCTIONS["sdpa"], nn.Module()

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        position_bias: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        length = query.shape[2]
        looks_back = attention_mask is not None and length == key.shape[2] and getattr(module, "is_causal", False)
        ends = _ends(length) if looks_back and not torch.compiler.is_compiling() else [length]
        if len(ends) == 1:
            made: tuple[Tensor, None] = whole(
                module, query, key, value, attention_mask, position_bias=position_bias, **kwargs
            )
            return made
        assert attention_mask is not None
        groups = getattr(module, "num_key_value_groups", 1)
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)  # once for all pieces
        pieces = []
        for begin, end in zip([0, *ends], ends, strict=False):
            mask, bias = (
                None if added is None else added[:, :, begin:end, :end] for added in (attention_mask, position_bias)
            )
            seen = (key[:, :, :end], value[:, :, :end])
            pieces.append(whole(keys_of_each, query[:, :, begin:end], *seen, mask, position_bias=bias, **kwargs)[0])
        return torch.cat(pieces, 1), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # type: ignore[no-untyped-call]


def _ends(length: int) -> list[int]:
    """Say where pieces of about the same length end, all but the last at a multiple of what lengths are padded to."""
    if length < LEAST_LENGTH:
        return [length]
    size = ceil(length / PIECES / PADDING_MULTIPLE) * PADDING_MULTIPLE
    return [*range(size, length, size), length]


@contextmanager
def attention_of_cards(workload: Workload, fast_bf16: bool) -> Iterator[None]:  # a fact of the card
    """Have scaled dot-product attention keep what it would on a card; `fast_bf16` is one of Ampere or later.

    A processor's own kernel takes no dropout and no mask with a gradient (T5's bias), and falls back on one that keeps
    the scores of each layer: 38 % of the peak of ChatLM-mini-Chinese's T5 at 192 tokens. A card has a kernel for these
    (torch's memory-efficient one) that keeps none. Heads that share keys are its flash kernel's alone, which takes half
    precision on Ampere or later: elsewhere a card keeps the scores, where a processor does not.
    """
    by_processor = functional.scaled_dot_product_attention
    scores = _shares_keys(load_config(workload.model, None, None)) and not (fast_bf16 and workload.precision != "fp32")
    if workload.layout == "packed":
        scores = False  # beside a mask of ours transformers gives each head keys of its own

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        learned = attn_mask is not None and attn_mask.requires_grad
        if not (scores or dropout_p or learned):
            return by_processor(query, key, value, attn_mask, dropout_p, *args, **kwargs)
        query, key, value = (_as_autocast(tensor) for tensor in (query, key, value))
        if scores:
            return _keeping_scores(query, key, value, attn_mask, dropout_p, *args, **kwargs)
        return _efficient(query, key, value, attn_mask, dropout_p, *args, **kwargs)

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = by_processor


def _shares_keys(config: Any) -> bool:
    heads = getattr(config, "num_attention_heads", 1)
    return (getattr(config, "num_key_value_heads", None) or heads) < heads


def _as_autocast(tensor: Tensor) -> Tensor:
    """Return what autocast hands the operator."""
    return tensor.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else tensor


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,  # torch's
) -> Tensor:  # fmt: skip
    if enable_gqa:
        key, value = (kv.repeat_interleave(query.shape[1] // kv.shape[1], 1) for kv in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    attended: Tensor
    attended, *_ = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, compute_log_sumexp=True, dropout_p=dropout_p, is_causal=is_causal, scale=scale
    )
    return attended


def _keeping_scores(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,  # torch's
) -> Tensor:  # fmt: skip
    attended: Tensor
    with torch.autocast("cpu", enabled=False):  # inside the operator nothing is cast: it computes in fp32
        attended, _ = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return attended
