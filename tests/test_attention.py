"""Attention in blocks: the same gradient, of the scores that are seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import MODELS, UnevenSamples, build, workload
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autotune.plan import Layout
from trainer import attention as room
from trainer.attention import attend, attention_of_processors, ranges_of
from trainer.microbatch import SpecialTokens, lay_out, target_count
from trainer.step import accumulate, start

SAMPLES = 12


def gradient(family: str, dtype: torch.dtype, layout: Layout) -> Tensor:
    torch.manual_seed(0)
    work, samples, ids = workload(family, layout=layout), UnevenSamples(family, SAMPLES), range(SAMPLES)
    state = start(build(family, dtype), work, weight_decay=0.1)
    accumulate(state, lay_out(ids, 8, samples, work, SpecialTokens(0, 0)), target_count(ids, samples), work)
    return torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("layout", ["packed", "sorted"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", MODELS)
def test_the_gradient_is_that_of_the_whole(
    family: str, dtype: torch.dtype, tolerance: float, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "BLOCK", 8)
    monkeypatch.setattr(room, "STRIDE", 4)
    whole = gradient(family, dtype, layout)
    with attention_of_processors():
        in_blocks = gradient(family, dtype, layout)
    assert float((in_blocks - whole).norm()) <= tolerance * float(whole.norm())


def mask_of(lengths: list[list[int]], length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the mask [rows, 1, length, length] of samples so long, each of which sees itself and to its left."""
    segments = torch.zeros(len(lengths), length, dtype=torch.int64)
    for row, of_row in zip(segments, lengths, strict=True):
        parts = [torch.full((n,), at) for at, n in enumerate(of_row, 1)]
        row[: sum(of_row)] = torch.cat(parts)
    seen = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


rows_of_samples = st.lists(st.lists(st.integers(1, 150), min_size=1, max_size=5), min_size=1, max_size=3)


@given(rows_of_samples, st.integers(0, 40))
def test_every_key_that_is_seen_is_in_the_range_of_its_block(lengths: list[list[int]], padding: int) -> None:
    length = max(map(sum, lengths)) + padding
    mask = mask_of(lengths, length)
    ranges = ranges_of(mask)
    assert ranges.shape == (len(lengths), -(-length // room.BLOCK), 2)
    for row, blocks in enumerate(ranges.tolist()):
        for block, (first, end) in zip(mask[row, 0].split(room.BLOCK), blocks, strict=True):
            seen = (block == 0).any(0).nonzero().flatten()
            assert first <= int(seen[0]) < first + room.STRIDE
            assert end - room.STRIDE <= int(seen[-1]) < end <= length


def of_all_three(function: Any, dtype: torch.dtype) -> list[Tensor]:
    """Return what is attended to in rows of several samples, heads sharing keys, and the gradients of it."""
    lengths, length = [[200, 100, 88], [388], [60, 70, 150]], 392
    torch.manual_seed(0)
    given = [torch.randn(3, length, heads, 32).to(torch.bfloat16) for heads in (6, 2, 2)]
    inputs = [tensor.to(dtype).transpose(1, 2).requires_grad_() for tensor in given]
    made = function(*inputs, mask_of(lengths, length, dtype))
    real = torch.tensor([sum(of_row) for of_row in lengths])[:, None] > torch.arange(length)
    (made * real[:, :, None, None] * torch.randn(made.shape).to(torch.bfloat16)).sum().backward()
    return [made[real].detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def torchs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    repeated = (tensor.repeat_interleave(3, 1) for tensor in (key, value))
    return scaled_dot_product_attention(query, *repeated, attn_mask=mask).transpose(1, 2)


def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return attend(query, key, value, mask, ranges_of(mask), query.shape[3] ** -0.5)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_as_exact_as_torchs_kernel(dtype: torch.dtype) -> None:
    exact = of_all_three(torchs, torch.float64)
    for true, its, mine in zip(exact, of_all_three(torchs, dtype), of_all_three(ours, dtype), strict=True):
        assert float((mine - true).norm()) <= 1.5 * float((its - true).norm())


def test_what_sees_nothing_spoils_nothing() -> None:
    mask = mask_of([[3], [300]], 304)
    query = torch.randn(2, 2, 304, 8, requires_grad=True)
    made = ours(query, query, query, mask)
    made[1].sum().backward()
    assert query.grad is not None
    assert made.isfinite().all()
    assert not query.grad[0].any()
    assert query.grad.isfinite().all()


def test_five_eighths_of_the_scores_of_a_long_sample_are_computed_and_of_a_short_one_those_near_it() -> None:
    def scores(lengths: list[list[int]], length: int) -> int:
        return sum(
            room.BLOCK * (end - first) for row in ranges_of(mask_of(lengths, length)).tolist() for first, end in row
        )

    assert scores([[512]], 512) == 512 * 512 * 5 / 8
    assert scores([[128] * 4], 512) == 512 * 128


class Looking(nn.Module):
    """What an attention function is told of its layer."""

    is_causal = True


@pytest.mark.parametrize("what", ["dropout", "bias", "of each head", "of true and false"])
def test_what_blocks_do_not_know_is_left_to_torch(what: str) -> None:
    given, mask = torch.randn(2, 4, 64, 8), mask_of([[64], [30, 20]], 64)
    options: dict[str, Any] = {"dropout": 0.0, "scaling": 1.0}
    if what == "dropout":
        options["dropout"] = 0.5
    if what == "bias":
        options["position_bias"] = torch.randn(1, 4, 64, 64)
    if what == "of each head":
        mask = mask + torch.randn(1, 4, 1, 1)
    if what == "of true and false":
        mask = mask == 0
    whole = ALL_ATTENTION_FUNCTIONS["sdpa"]
    torch.manual_seed(0)
    expected, _ = whole(Looking(), given, given, given, mask, **options)
    torch.manual_seed(0)
    with attention_of_processors():
        made, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](Looking(), given, given, given, mask, **options)
    assert torch.equal(made, expected)


def test_many_cores_are_left_to_torch() -> None:
    before, threads = ALL_ATTENTION_FUNCTIONS["sdpa"], torch.get_num_threads()
    torch.set_num_threads(room.MOST_THREADS + 1)
    try:
        with attention_of_processors():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    finally:
        torch.set_num_threads(threads)


def test_afterwards_attention_is_what_it_was() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with attention_of_processors():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
