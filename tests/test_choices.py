"""What is taken by rule where nothing was typed."""

from __future__ import annotations

from typing import Any

import facts
import pytest

from autotune.errands import DataSummary, Preprocessed
from autotune.errors import ConfigurationError
from cli.choices import choose_layout, choose_loss_head, choose_precision
from profiles import Settings


@pytest.mark.parametrize(
    ("asked", "packs", "window", "layout"),
    [
        ("auto", True, None, "packed"),
        ("auto", True, 512, "packed"),
        ("auto", True, 511, "sorted"),
        ("auto", False, None, "sorted"),
        ("packed", True, 4096, "packed"),
        ("fixed", False, 128, "fixed"),
    ],
)
def test_samples_share_rows_where_the_model_lets_them(asked: Any, packs: bool, window: int | None, layout: str) -> None:
    assert choose_layout(Settings(layout=asked), known(packs, window), (512,)) == layout


def known(packs: bool, window: int | None, data: DataSummary | None = None) -> Preprocessed:
    model = facts.preprocessed().model.model_copy(update={"packs": packs, "window": window})
    return facts.preprocessed(model=model, data=data)


@pytest.mark.parametrize(
    ("asked", "family", "device", "fast_bf16", "precision"),
    [
        ("auto", "llama", "cpu", True, "bf16"),
        ("auto", "llama", "cpu", False, "fp32"),
        ("auto", "llama", "cuda", False, "fp16"),
        ("auto", "t5", "cuda", False, "fp32"),
        ("fp16", "llama", "cpu", True, "fp16"),
    ],
)
def test_half_precision_is_taken_where_it_is_fast_and_the_model_bears_it(
    asked: str, family: str, device: Any, fast_bf16: bool, precision: str
) -> None:
    assert choose_precision(asked, family, facts.hardware(device=device, fast_bf16=fast_bf16)) == precision


def test_fp16_is_refused_for_t5_which_overflows_in_it() -> None:
    with pytest.raises(ConfigurationError, match="T5 overflows in fp16") as error:
        choose_precision("fp16", "t5", facts.hardware())
    assert "bf16" in error.value.hint


@pytest.mark.parametrize(("short", "layout"), [(0, "fixed"), (5, "fixed"), (50, "packed")])
def test_documents_that_fill_their_rows_are_not_packed(short: int, layout: str) -> None:
    data = DataSummary(
        files=("a.jsonl",), store="store", fingerprint="data", contents="c0de", stage="pretrain", rows=100, samples=100,
        tokens=512 * (100 - short) + 64 * short, target_tokens=100, cuts={}, unknown_share=0.0,
        longest_row=(512, "data.jsonl: line 1"),
        lengths=(((64, short), (512, 100 - short))[not short:],),
    )  # fmt: skip
    assert choose_layout(Settings(), known(packs=True, window=None, data=data), (512,)) == layout


@pytest.mark.parametrize(("packs", "window", "why"), [(True, 128, "128 tokens of 512"), (False, None, "no mask")])
def test_packed_rows_that_a_model_cannot_keep_apart_are_refused(packs: bool, window: int | None, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        choose_layout(Settings(layout="packed"), known(packs, window), (512,))


@pytest.mark.parametrize(
    ("asked", "chunks", "limit", "loss_head"),
    [
        # 32 x 512 x 6400 logits of 8 bytes are 0.78 GiB.
        ("auto", True, "12GiB", "chunked"),
        ("auto", True, "13GiB", "full"),
        ("auto", False, "12GiB", "full"),
        ("chunked", False, "13GiB", "chunked"),
        ("full", True, "1GiB", "full"),
    ],
)
def test_logits_are_taken_in_chunks_where_they_are_much(asked: Any, chunks: bool, limit: str, loss_head: str) -> None:
    model = facts.preprocessed().model.model_copy(update={"chunks": chunks, "vocabulary_size": 6400})
    settings = Settings(loss_head=asked, memory_limit=limit)
    assert choose_loss_head(settings, facts.preprocessed(model=model), facts.hardware(world_size=1), 512) == loss_head
