"""Weights as the repositories have them that people come from, and the same as transformers names them. No files.

MiniMind until April 2025 (its own names, rotary pairs side by side), since May 2025 (Llama's names), and of 2026 (Qwen3
but for its configuration); ChatLM-mini-Chinese (T5's names, without a configuration).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config, T5Config

from autotune.errors import ConfigurationError

OLD_TURN, TURN = "<s>", "<|im_start|>"
"""With which MiniMind's templates begin a turn: tokenizers of both have 6,400 entries."""
ELSEWHERE = "export --format transformers"
MOE = "these are the weights of a mixture of experts, which is not trained here"
MOST_LAYERS = 1000
HEADS = 8
"""Of every model that MiniMind published: the shapes of its weights do not tell."""
NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "norm": "model.norm",
    "output": "lm_head",
}
"""MiniMind's of April 2025 -> Llama's; those of a layer behind its number."""
BUFFERS = re.compile(r"(^|\.)(pos_cis|freqs_cos|freqs_sin|mask|inv_freq)$")
"""Computed, not learned."""
EXPERTS = re.compile(r"\.(experts|shared_experts)\.")
ADAPTER = re.compile(r"(^|\.)lora(_|\.)")
WRAPPED = re.compile(r"^(_orig_mod\.|module\.)+")
"""What torch.compile and DDP put before each name."""


@dataclass(frozen=True)
class Recognised:
    """Weights by transformers' names, with the configuration that their shapes tell, or are known to have."""

    what: str
    config: Any
    tensors: dict[str, Tensor]
    assumed: str = ""
    """What the weights do not tell."""
    marker: str = ""
    """A special token of the tokenizer that they were trained with."""


def recognise(tensors: Mapping[str, Tensor], heads: int | None, known: Mapping[str, Any]) -> Recognised:
    """Say whose weights these are, and what they are to transformers.

    `heads` of attention and what is `known` (MiniMind's config.json) go before what MiniMind's models have. Raises
    ConfigurationError for a mixture of experts, an adapter, and what is of none of these.
    """
    plain = unwrapped(tensors)
    if any(map(EXPERTS.search, plain)):
        raise ConfigurationError(MOE, "import a dense model")
    if plain and all(map(ADAPTER.search, plain)):
        raise ConfigurationError(
            "these are the weights of an adapter (LoRA) alone",
            "merge it into its model where it was made, and import that",
        )
    if "tok_embeddings.weight" in plain:
        return _minimind_of_april(plain, heads, known)
    if "model.embed_tokens.weight" in plain:
        return _minimind(plain, heads, known)
    if "shared.weight" in plain:
        return _chatlm(plain)
    raise ConfigurationError(
        f"these weights are neither MiniMind's nor ChatLM-mini-Chinese's: the first is {min(plain, default='none')!r}",
        "of another model give the folder with its config.json",
    )


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without what wrappers put before their names, and without what is computed."""
    plain = {WRAPPED.sub("", name): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in plain.items() if not BUFFERS.search(name)}


def _minimind_of_april(tensors: dict[str, Tensor], heads: int | None, known: Mapping[str, Any]) -> Recognised:
    """Rename, and turn queries and keys so that a rotary pair is half a head apart."""
    renamed = {_named(name, NAMES): tensor for name, tensor in tensors.items()}
    made = _llama("MiniMind of April 2025", renamed, heads, known, positions=8192)
    config = made.config
    for name, tensor in made.tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            count = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            made.tensors[name] = halves_of_pairs(tensor, count)
    return made


def _minimind(tensors: dict[str, Tensor], heads: int | None, known: Mapping[str, Any]) -> Recognised:
    norm = tensors.get("model.layers.0.self_attn.q_norm.weight")
    if norm is None:
        return _llama("MiniMind of May 2025 or later", tensors, heads, known, positions=32768)
    width = len(norm)
    common = _common(tensors, known, eps=1e-6, positions=32768)
    config = Qwen3Config(
        **common,
        head_dim=width,
        num_attention_heads=_shape(tensors, "model.layers.0.self_attn.q_proj.weight")[0] // width,
        num_key_value_heads=_shape(tensors, "model.layers.0.self_attn.k_proj.weight")[0] // width,
    )
    return Recognised("MiniMind 3 (Qwen3)", config, tensors, marker=TURN)


def _llama(
    what: str, tensors: dict[str, Tensor], heads: int | None, known: Mapping[str, Any], positions: int
) -> Recognised:
    told = heads or known.get("num_attention_heads") or known.get("n_heads")
    count = int(told or HEADS)
    queries = _shape(tensors, "model.layers.0.self_attn.q_proj.weight")[0]
    keys = _shape(tensors, "model.layers.0.self_attn.k_proj.weight")[0]
    width = queries // max(1, count)
    if count < 1 or queries % count or width % 2 or keys % width or count % (keys // width):
        raise ConfigurationError(
            f"{queries} rows of queries and {keys} of keys are not of {count} heads",
            "give --heads N, as it was trained",
        )
    common = _common(tensors, known, eps=1e-5, positions=positions)
    config = LlamaConfig(**common, num_attention_heads=count, num_key_value_heads=keys // width, head_dim=width)
    assumed = "" if told else f"{HEADS} heads of attention, as MiniMind has (--heads)"
    return Recognised(what, config, tensors, assumed, OLD_TURN if "April" in what else TURN)


def _common(tensors: dict[str, Tensor], known: Mapping[str, Any], eps: float, positions: int) -> dict[str, Any]:
    """Return what Llama's and Qwen3's configurations share."""
    entries, width = _shape(tensors, "model.embed_tokens.weight")
    output = tensors.get("lm_head.weight")
    tied = output is None or torch.equal(output, tensors["model.embed_tokens.weight"])
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    if len(layers) > MOST_LAYERS:
        raise ConfigurationError(f"these weights name {len(layers):,} layers, {MOST_LAYERS:,} at most")
    return {
        "vocab_size": entries,
        "hidden_size": width,
        "intermediate_size": _shape(tensors, "model.layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": len(layers),
        "max_position_embeddings": int(known.get("max_position_embeddings") or known.get("max_seq_len") or positions),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(known.get("rope_theta") or 1e6)},
        "rms_norm_eps": float(known.get("rms_norm_eps") or known.get("norm_eps") or eps),
        "tie_word_embeddings": tied,
    }


def _chatlm(tensors: dict[str, Tensor]) -> Recognised:
    """Return T5 as ChatLM-mini-Chinese has it: what its config.py does not set is transformers' default."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = _shape(tensors, f"{attention}.relative_attention_bias.weight")
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in tensors
    inner = f"encoder.block.0.layer.1.DenseReluDense.wi{'_0' * gated}.weight"
    entries, width = _shape(tensors, "shared.weight")
    output = tensors.get("lm_head.weight")
    if output is not None and not torch.equal(output, tensors["shared.weight"]):
        raise ConfigurationError(
            "its output layer is not its embedding, as ChatLM-mini-Chinese's is",
            "of another T5 give the folder with its config.json",
        )
    blocks = {
        side: len({name.split(".")[2] for name in tensors if name.startswith(f"{side}.block.")})
        for side in ("encoder", "decoder")
    }
    config = T5Config(
        vocab_size=entries,
        d_model=width,
        d_kv=_shape(tensors, f"{attention}.q.weight")[0] // heads,
        d_ff=_shape(tensors, inner)[0],
        num_layers=blocks["encoder"],
        num_decoder_layers=blocks["decoder"],
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu" if gated else "relu",
        pad_token_id=0,
        eos_token_id=1,
    )
    config.decoder_start_token_id = 0
    return Recognised("ChatLM-mini-Chinese (T5)", config, tensors, marker="[EOS]")


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    if name not in tensors or tensors[name].ndim != 2:
        raise ConfigurationError(f"{name} is not among these weights, or is no matrix", "import the whole model")
    rows, columns = tensors[name].shape
    return int(rows), int(columns)


def _named(name: str, names: Mapping[str, str]) -> str:
    """Return the other name of a weight; that of one that has none is its own."""
    layer = re.match(r"((?:model\.)?layers\.\d+\.)(.+)", name)
    before, inner = layer.groups() if layer else ("", name)
    stem, _, kind = inner.rpartition(".")
    if stem not in names:
        return name
    other = names[stem]
    if not before:
        return f"{other}.{kind}"
    number = before.split(".")[-2]
    return f"{'model.' if names is NAMES else ''}layers.{number}.{other}.{kind}"


def halves_of_pairs(weight: Tensor, heads: int) -> Tensor:
    """Turn rows of queries or keys [heads x width, inputs] from rotary pairs (2i, 2i + 1) to (i, i + width / 2).

    The first is Su et al., RoFormer (2021), equation 34; the second what transformers' Llama takes.
    """
    width = len(weight) // heads
    return weight.reshape(heads, width // 2, 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def pairs_of_halves(weight: Tensor, heads: int) -> Tensor:
    """Turn them back."""
    width = len(weight) // heads
    return weight.reshape(heads, 2, width // 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def to_minimind(config: Any, tensors: Mapping[str, Tensor], *, of_april: bool) -> dict[str, Tensor]:
    """Return a Llama or Qwen3 model's weights as MiniMind's own code loads them, the output layer too.

    Raises ConfigurationError for a model whose computation MiniMind's code does not have.
    """
    if config.model_type not in (("llama",) if of_april else ("llama", "qwen3")):
        raise ConfigurationError(f"MiniMind's code does not compute this model: {config.model_type}", ELSEWHERE)
    rope, heads = config.rope_parameters or {}, config.hidden_size // config.num_attention_heads
    strange = [
        name
        for name, differs in (
            ("attention_bias", getattr(config, "attention_bias", False)),
            ("an output layer of its own", not config.tie_word_embeddings),
            ("an activation other than silu", getattr(config, "hidden_act", "silu") != "silu"),
            ("heads of another width", config.model_type == "llama" and heads != config.head_dim),
            ("mlp_bias", getattr(config, "mlp_bias", False)),
            ("a scaled rotary embedding", rope.get("rope_type", "default") != "default"),
            ("a window of attention", bool(getattr(config, "sliding_window", None))),
        )
        if differs
    ]
    if strange:
        raise ConfigurationError(f"MiniMind's code does not compute this model: {', '.join(strange)}", ELSEWHERE)
    made = dict(tensors) | {"lm_head.weight": tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])}
    if not of_april:
        return made
    back = {other: name for name, other in NAMES.items()}
    for name in [n for n in made if n.endswith(("q_proj.weight", "k_proj.weight"))]:
        made[name] = pairs_of_halves(
            made[name], config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        )
    return {_named(name, back): tensor for name, tensor in made.items()}
