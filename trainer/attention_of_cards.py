"""How a card attends, for a trace on a processor: by kernels that keep other tensors. Knows torch's operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autotune.plan import Workload
from trainer.model import load_config

aten = torch.ops.aten


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
