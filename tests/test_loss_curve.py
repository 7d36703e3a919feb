"""The whole loop against one that anyone would write: the same losses, step after step, in every layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import facts
import pytest
import tiny_models
import torch
from facts import recipe
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from autotune.batching import reach
from autotune.errands import Preprocess, Preprocessed, Recipe, Train
from trainer.data import Order, TokenStore
from trainer.loop import train
from trainer.model import save_model
from trainer.preprocess import preprocess

STEPS, SAMPLES, EFFECTIVE, ROWS, LENGTH = 50, 60, 8, 3, 96
"""The eighth step of an epoch has the four samples that are left."""


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_losses_are_those_of_a_plain_loop(family: str, tmp_path: Path) -> None:
    asked = recipe(max_steps=STEPS, epochs=10, learning_rate=3e-3, clip=1.0)
    done = tokenized(family, tmp_path / "cache")
    assert done.data is not None
    model = small_model(family, done)
    save_model(model, Path(str(done.tokenizer_dir)), tmp_path / "model")
    losses, norms = plain_loop(model, TokenStore(Path(done.data.store)), asked)
    assert losses[-1] < 0.9 * losses[0]
    assert min(norms) < asked.clip < max(norms)
    for layout in ("packed", "sorted", "fixed"):
        rows = list(train(errand_of(done, tmp_path, asked, layout), lambda: False))
        (verified,) = [row for row in rows if row.get("event") == "verified"]
        assert verified["layout"] == layout
        steps = [row for row in rows if row["kind"] == "train"]
        assert len(steps) == STEPS
        assert [row["loss"] for row in steps] == pytest.approx(losses, abs=1e-5, rel=0), layout
        # AdamW and clipping hide a gradient of the wrong length from the losses.
        assert [row["gradient_norm"] for row in steps] == pytest.approx(norms, rel=1e-4), layout


def plain_loop(model: Any, store: TokenStore, asked: Recipe) -> tuple[list[float], list[float]]:
    """Padded rows, the model's own loss, AdamW by the book, one cosine; losses, and norms before clipping."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": asked.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False, foreach=False)
    a_epoch, warmup = math.ceil(len(store) / EFFECTIVE), round(asked.warmup * STEPS)
    losses, norms = [], []
    model.train()
    for step in range(STEPS):
        epoch, place = divmod(step, a_epoch)
        ids = Order(len(store), asked.seed, epoch)[place * EFFECTIVE : (place + 1) * EFFECTIVE]
        loss = model(**padded(store, ids, seq2seq=model.config.is_encoder_decoder)).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), asked.clip).item())
        done = (step - warmup) / (STEPS - 1 - warmup)
        rate = 0.1 + 0.45 * (1 + math.cos(math.pi * done)) if step >= warmup else (step + 1) / (warmup + 1)
        for group in optimizer.param_groups:
            group["lr"] = asked.learning_rate * rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def padded(store: TokenStore, ids: Any, *, seq2seq: bool) -> dict[str, torch.Tensor]:
    inputs, labels = [], []
    for i in ids:
        tokens, spans = torch.tensor(store.tokens(i).astype(int)), store.spans(i)
        inputs.append(tokens[: spans[0, 0]] if seq2seq else tokens)
        wanted = torch.full_like(tokens, -100)
        for start, end in spans:
            wanted[start:end] = tokens[start:end]
        labels.append(wanted[spans[0, 0] :] if seq2seq else wanted)
    return {
        "input_ids": pad_sequence(inputs, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in inputs], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def tokenized(family: str, cache: Path) -> Preprocessed:
    """The demo's first dialogues, by a tokenizer that is trained on them."""
    return preprocess(
        Preprocess(
            model={"llama": "tiny", "t5": "tiny-t5"}[family],
            tokenizer=None,
            dropout=None,
            freeze=(),
            data=(),
            validation=(),
            validation_split=None,
            show=0,
            stage=None,
            max_seq_len=LENGTH,
            max_target_len=LENGTH,
            limit=SAMPLES,
            cache_dir=str(cache),
        ),
        lambda *_: None,
    )


def small_model(family: str, done: Preprocessed) -> Any:
    torch.manual_seed(0)
    size, ids = done.model.vocabulary_size, done.ids
    assert ids is not None
    if family == "llama":
        decoder = tiny_models.DECODER | {"vocab_size": size, "max_position_embeddings": LENGTH}
        return LlamaForCausalLM(LlamaConfig(**decoder, tie_word_embeddings=True))
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=size,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_heads=4,
            num_layers=2,
            dropout_rate=0,
            decoder_start_token_id=ids.pad,
            pad_token_id=ids.pad,
        )
    )


def errand_of(done: Preprocessed, folder: Path, asked: Recipe, layout: str) -> Train:
    """An errand in micro-batches of three rows, which eight samples do not go into evenly."""
    assert done.data is not None
    seq2seq = done.model.task == "seq2seq"
    plan = facts.plan(
        workload=facts.workload(
            model=str(folder / "model"),
            task=done.model.task,
            vocabulary_size=done.model.vocabulary_size,
            max_seq_len=LENGTH,
            max_target_len=LENGTH if seq2seq else 0,
            precision="fp32",
            layout=layout,
        ),
        hardware=facts.processor(),
        batching=reach(EFFECTIVE, 1, ROWS, ROWS, "memory"),
    )
    return Train(
        plan=plan,
        recipe=asked,
        store=done.data.store,
        validation_store=None,
        tokenizer_dir=str(done.tokenizer_dir),
        ids=done.ids,
        output_dir=str(folder / layout),
        data_contents=done.data.contents,
        saving=facts.saving(),
        resume=None,
        backend=None,
        heartbeat_seconds=60.0,
        tensorboard=False,
        time_limit=None,
        longest=None,
    )
