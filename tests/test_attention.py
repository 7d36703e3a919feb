"""Attention in pieces: the same gradient, of fewer scores."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny_models import MODELS, UnevenSamples, build, workload
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autotune.plan import Layout
from trainer import attention as room
from trainer.attention import _ends, attention_of_processors
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
    monkeypatch.setattr(room, "LEAST_LENGTH", 8)
    whole = gradient(family, dtype, layout)
    with attention_of_processors():
        pieces = gradient(family, dtype, layout)
    assert float((pieces - whole).norm()) <= tolerance * float(whole.norm())


class Looking(nn.Module):
    """What an attention function is told of its layer."""

    def __init__(self, *, back: bool) -> None:
        super().__init__()
        self.is_causal = back


def scores_of(length: int, keys: int, *, back: bool, pieces: bool) -> int:
    """Count the products of an attention under a mask."""
    query, key = torch.randn(2, 4, length, 8), torch.randn(2, 4, keys, 8)
    mask = torch.zeros(2, 1, length, keys)
    with attention_of_processors() if pieces else nullcontext(), FlopCounterMode(display=False) as counted:
        ALL_ATTENTION_FUNCTIONS["sdpa"](Looking(back=back), query, key, key, mask, dropout=0.5, scaling=1.0)
    return int(counted.get_total_flops())


def test_five_eighths_of_the_scores_are_computed_where_positions_look_back_and_all_elsewhere() -> None:
    whole = scores_of(512, 512, back=True, pieces=False)
    assert scores_of(512, 512, back=True, pieces=True) == whole * 5 / 8
    assert scores_of(512, 512, back=False, pieces=True) == whole
    assert scores_of(512, 256, back=True, pieces=True) == whole / 2, "keys of another sequence have no left"
    short = room.LEAST_LENGTH - 8
    assert scores_of(short, short, back=True, pieces=True) == scores_of(short, short, back=True, pieces=False)


def test_afterwards_attention_is_what_it_was() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with attention_of_processors():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


@pytest.mark.parametrize("length", [1, 8, 127, 128, 200, 280, 512, 1000])
def test_pieces_cover_a_row_that_is_long_enough(length: int) -> None:
    ends = _ends(length)
    assert ends[-1] == length
    assert ends == sorted(set(ends))
    assert len(ends) <= room.PIECES
    assert (len(ends) > 1) == (length >= room.LEAST_LENGTH)
