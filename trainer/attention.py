"""How processors attend: in blocks of queries, each over the keys that it sees. Knows torch's operators, no model.

torch's own kernel computes all scores of up to 512 keys, then masks those to the right and of other samples of the row:
of packed conversations more than half. In bf16 its backward takes four times as long for a score of a short row. Here
scores are products of matrices, in fp32 as on a card, and what they are multiplied with after that is in the type of
the values (Dao, "FlashAttention-2", 2023, algorithms 1 and 2). Queries, keys and values are all that is kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BLOCK = 128
"""Queries that share a range of keys: fewer compute fewer scores, in smaller products."""
STRIDE = 32
"""What ranges begin and end at a multiple of: oneDNN makes a kernel for each shape."""
MOST_THREADS = 8
"""Blocks come one after another, and each is too little work for more; torch's kernel shares out heads and rows."""


@contextmanager
def attention_of_processors() -> Iterator[None]:
    """Have a model's layers attend in blocks, all but those that drop scores or learn what is added to them."""
    if torch.get_num_threads() > MOST_THREADS:
        yield
        return
    whole, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], _Ranges()

    def in_blocks(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        mask = attention_mask
        looks_back = getattr(module, "is_causal", False) if is_causal is None else is_causal
        if mask is None and looks_back and query.shape[2] == key.shape[2]:
            mask = _triangle(query)
        if mask is None or dropout or kwargs.get("position_bias") is not None or not _is_shared(mask):
            made: tuple[Tensor, None] = whole(
                module, query, key, value, attention_mask,
                dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
            )  # fmt: skip
            return made
        if torch.is_autocast_enabled("cpu"):
            value = value.to(torch.get_autocast_dtype("cpu"))
        ranges = seen.of(mask, query.shape[2])
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        return attend(query, key, value, mask.expand(-1, -1, query.shape[2], -1), ranges, scale), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = in_blocks
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # type: ignore[no-untyped-call]


class _Ranges:
    """Remembers those of the last mask: all layers are given the same."""

    def __init__(self) -> None:
        self._of: tuple[weakref.ref[Tensor], int] | None = None
        self._ranges: Tensor

    def of(self, mask: Tensor, queries: int) -> Tensor:
        """Return the ranges of a mask that is the same for all queries, or has that of each."""
        of_each = mask.expand(-1, -1, queries, -1)
        if torch.compiler.is_compiling():
            ranges: Tensor = ranges_of(of_each)
            return ranges
        if self._of is None or self._of[0]() is not mask or self._of[1] != queries:
            self._of, self._ranges = (weakref.ref(mask), queries), ranges_of(of_each)
        return self._ranges


def _is_shared(mask: Tensor) -> bool:
    """Say whether a mask is of all heads, and nothing but added."""
    return mask.shape[1] == 1 and mask.is_floating_point() and not mask.requires_grad


def _triangle(query: Tensor) -> Tensor:
    """Return the mask [1, 1, length, length] of positions that look to their left alone."""
    length = query.shape[2]
    return query.new_full((length, length), torch.finfo(query.dtype).min).triu(1)[None, None]


@torch.library.custom_op("chatlm::ranges_of", mutates_args=())
def ranges_of(mask: Tensor) -> Tensor:
    """Return [rows, blocks, 2]: the first key that any query of a block sees, and the one after the last.

    `mask` [rows, 1, queries, keys] is added to the scores; what it hides is the lowest number of its type, or less.
    Ranges begin and end at a multiple of `STRIDE`.
    """
    keys = mask.shape[3]
    seen = torch.stack([block.amax(1) for block in torch.split(mask[:, 0], BLOCK, 1)], 1) > torch.finfo(mask.dtype).min
    places = torch.arange(keys).expand(seen.shape)
    first = torch.where(seen, places, keys).amin(2) // STRIDE * STRIDE
    end = (torch.where(seen, places, -1).amax(2) // STRIDE + 1) * STRIDE
    return torch.stack([first.minimum(end), end.clamp(max=keys)], 2)


@ranges_of.register_fake
def _(mask: Tensor) -> Tensor:
    return mask.new_empty((len(mask), -(-mask.shape[2] // BLOCK), 2), dtype=torch.int64)


@torch.library.custom_op("chatlm::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, ranges: Tensor, scale: float) -> Tensor:
    """Return what each query attends to, [rows, queries, heads, width of a value], in the type of the values.

    `query` is [rows, heads, queries, width]; `key` and `value` are [rows, heads, keys, width], of as many heads or of
    fewer, which queries share; `mask` is [rows or 1, 1, queries, keys], and `ranges` are its own.
    """
    made = _result(query, value)
    for row, block, seen in _blocks(len(query), ranges):
        p = _probabilities(query, key, mask, scale, row, block, seen)
        made[row, block] = _apart(torch.bmm(p.to(value.dtype), value[row, :, seen]), query).transpose(0, 1)
    return made


@torch.library.custom_op("chatlm::attend_backward", mutates_args=())
def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, ranges: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value from that of what was attended to."""
    narrow, wide = value.dtype, _wide(query)
    of_query, of_key, of_value = _empty_like(query), *(_empty_like(of, wide).zero_() for of in (key, value))
    for row, block, seen in _blocks(len(query), ranges):
        q, k, v = _together(query[row, :, block], key), key[row, :, seen], value[row, :, seen]
        g = _together(gradient[row, block].transpose(0, 1), key)
        p = _probabilities(query, key, mask, scale, row, block, seen)
        of_value[row, :, seen] += torch.bmm(p.to(narrow).transpose(1, 2), g)
        of_p = torch.bmm(g.to(wide), v.to(wide).transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_p, p, -1, wide).mul_(scale).to(narrow)
        of_query[row, :, block] = _apart(torch.bmm(of_scores, k.to(narrow)), query)
        of_key[row, :, seen] += torch.bmm(of_scores.transpose(1, 2), q.to(narrow))
    return of_query, of_key.to(key.dtype), of_value.to(narrow)


def _probabilities(
    query: Tensor, key: Tensor, mask: Tensor, scale: float, row: int, block: slice, seen: slice
) -> Tensor:
    """Return [heads of keys, queries of all heads that share them, keys]."""
    wide = _wide(query)
    q = _together(query[row, :, block], key).to(wide) * scale
    scores = torch.bmm(q, key[row, :, seen].to(wide).transpose(1, 2))
    hidden = mask[row % len(mask), 0, block, seen]
    scores.view(-1, *hidden.shape).add_(hidden)
    return torch.softmax(scores, -1)


def _blocks(rows: int, ranges: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Yield row, queries and keys of each block; ranges of one row are those of all."""
    every = ranges.tolist()
    with torch.autocast("cpu", enabled=False):
        for row in range(rows):
            for at, (first, end) in enumerate(every[row % len(every)]):
                yield row, slice(at * BLOCK, (at + 1) * BLOCK), slice(first, end)


def _together(of_heads: Tensor, key: Tensor) -> Tensor:
    """[heads, queries, width] -> [heads of keys, queries of all heads that share them, width]."""
    return of_heads.reshape(key.shape[1], -1, of_heads.shape[2])


def _apart(together: Tensor, query: Tensor) -> Tensor:
    """[heads of keys, queries of all heads that share them, width] -> [heads, queries, width]."""
    return together.view(query.shape[1], -1, together.shape[2])


def _wide(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _result(query: Tensor, value: Tensor) -> Tensor:
    rows, heads, queries, _ = query.shape
    return value.new_empty(rows, queries, heads, value.shape[3])


def _empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return [rows, heads, length, width] as a layer makes it: with the heads of a position side by side."""
    return torch.empty_like(tensor.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return _result(query, value)


@attend_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return _empty_like(query), _empty_like(key), _empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*attend_backward(gradient, *ctx.saved_tensors, ctx.scale), None, None, None)


attend.register_autograd(_backward, setup_context=_keep)
