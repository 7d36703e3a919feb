"""Small real models of several families, and uneven samples, for tests of the step."""

from __future__ import annotations

from typing import Any

import facts
import numpy as np
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from autotune.plan import Workload

VOCABULARY = 97
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Build a model of two layers with fixed random weights and no dropout."""
    torch.manual_seed(0)
    model = MODELS[family]()
    if family == "t5":
        model.config.decoder_start_token_id = 0
    return model.to(dtype)


MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**DECODER, attn_implementation="eager")),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=0,
            eos_token_id=1,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, dropout_rate=0)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            dropout=0,
        )
    ),
}
SEQ2SEQ = ("t5", "bart")


def workload(family: str, **changes: Any) -> Workload:
    """Return a workload of these models, 32 tokens a side."""
    seq2seq = family in SEQ2SEQ
    values: dict[str, Any] = {
        "model": family,
        "task": "seq2seq" if seq2seq else "causal",
        "vocabulary_size": VOCABULARY,
        "max_seq_len": 32,
        "max_target_len": 32 if seq2seq else 0,
        "precision": "fp32",
    }
    return facts.workload(**(values | changes))


class UnevenSamples:
    """Samples of 3 to 32 tokens a side, with one to three spans of targets where the model is causal."""

    def __init__(self, family: str, count: int) -> None:
        random = np.random.Generator(np.random.PCG64(5))
        self._samples = []
        for _ in range(count):
            first, second = random.integers(3, 33, 2)
            if family in SEQ2SEQ:
                tokens, spans = random.integers(2, VOCABULARY, first + second), [[first, first + second]]
            else:
                tokens = random.integers(2, VOCABULARY, first)
                borders = np.unique(random.integers(1, first + 1, 4))
                spans = [[s, e] for s, e in zip(borders[::2], borders[1::2], strict=False)] or [[1, first]]
            self._samples.append((tokens, np.array(spans, np.int32)))

    def tokens(self, i: int) -> Any:
        return self._samples[i][0]

    def spans(self, i: int) -> Any:
        return self._samples[i][1]
