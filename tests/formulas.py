"""What MiniMind and ChatLM-mini-Chinese compute, written from their definitions on the weights by their own names."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def turned(x: Tensor, pairs: str, theta: float = 1e6) -> Tensor:
    """Turn each pair of [length, heads, width] by its angle, as complex numbers: pairs beside each other, or halves."""
    length, _, width = x.shape
    angles = torch.outer(torch.arange(length), theta ** (-torch.arange(0, width, 2) / width))[:, None]
    if pairs == "beside":
        turns = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turns).flatten(-2)
    a, b = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def minimind(w: Weights, ids: Tensor, heads: int, eps: float, of_april: bool) -> Tensor:
    """Return logits [length, vocabulary] of one row of ids."""
    names = ("wq", "wk", "wv", "wo") if of_april else ("q_proj", "k_proj", "v_proj", "o_proj")
    attention, inner = ("attention", "feed_forward") if of_april else ("self_attn", "mlp")
    gate, up, down = ("w1", "w3", "w2") if of_april else ("gate_proj", "up_proj", "down_proj")
    before, after = ("attention_norm", "ffn_norm") if of_april else ("input_layernorm", "post_attention_layernorm")
    stem = "" if of_april else "model."
    x = w["tok_embeddings.weight" if of_april else "model.embed_tokens.weight"][ids]
    length = len(ids)
    layers = 1 + max(int(name.split("layers.")[1].split(".")[0]) for name in w if "layers." in name)
    for i in range(layers):
        at = f"{stem}layers.{i}."
        h = norm(x, w[f"{at}{before}.weight"], eps)
        q, k, v = (h @ w[f"{at}{attention}.{name}.weight"].T for name in names[:3])
        width = q.shape[-1] // heads
        q, k, v = (t.view(length, -1, width) for t in (q, k, v))
        if f"{at}self_attn.q_norm.weight" in w:
            q, k = (norm(t, w[f"{at}self_attn.{n}_norm.weight"], eps) for t, n in ((q, "q"), (k, "k")))
        q, k = (turned(t, "beside" if of_april else "halves") for t in (q, k))
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(width)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", scores, v).flatten(1) @ w[f"{at}{attention}.{names[3]}.weight"].T
        h = norm(x, w[f"{at}{after}.weight"], eps)
        x = (
            x
            + (F.silu(h @ w[f"{at}{inner}.{gate}.weight"].T) * (h @ w[f"{at}{inner}.{up}.weight"].T))
            @ w[f"{at}{inner}.{down}.weight"].T
        )
    return norm(x, w[f"{stem}norm.weight"], eps) @ w["output.weight" if of_april else "lm_head.weight"].T


def t5(w: Weights, source: Tensor, target: Tensor) -> Tensor:
    """Return logits [target length, vocabulary] (Raffel et al., 2020, section 2.1): no biases, no scale of scores."""

    def bucket(distance: int, both: bool) -> int:
        """Halve the 32 buckets by direction where both are seen; half of those are exact, the others logarithmic."""
        count, offset = (16, 16 * (distance > 0)) if both else (32, 0)
        far = abs(distance) if both else max(-distance, 0)
        exact = count // 2
        if far < exact:
            return offset + far
        return offset + min(count - 1, exact + int(math.log(far / exact) / math.log(128 / exact) * (count - exact)))

    def attend(at: str, x: Tensor, over: Tensor, bias: Tensor | float) -> Tensor:
        heads = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape[1]
        q, k, v = (t @ w[f"{at}.{n}.weight"].T for t, n in ((x, "q"), (over, "k"), (over, "v")))
        q, k, v = (t.view(len(t), heads, -1) for t in (q, k, v))
        scores = (torch.einsum("qhd,khd->hqk", q, k) + bias).softmax(-1)
        return torch.einsum("hqk,khd->qhd", scores, v).flatten(1) @ w[f"{at}.o.weight"].T

    def stack(side: str, x: Tensor, memory: Tensor | None) -> Tensor:
        table = w[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        places = range(len(x))
        bias = table[torch.tensor([[bucket(k - q, memory is None) for k in places] for q in places])].permute(2, 0, 1)
        if memory is not None:
            bias = bias + torch.full((len(x), len(x)), -math.inf).triu(1)
        for i in range(1 + max(int(n.split(".")[2]) for n in w if n.startswith(f"{side}.block."))):
            at = f"{side}.block.{i}.layer"
            h = norm(x, w[f"{at}.0.layer_norm.weight"], 1e-6)
            x = x + attend(f"{at}.0.SelfAttention", h, h, bias)
            last = 1
            if memory is not None:
                h = norm(x, w[f"{at}.1.layer_norm.weight"], 1e-6)
                x, last = x + attend(f"{at}.1.EncDecAttention", h, memory, 0.0), 2
            h = norm(x, w[f"{at}.{last}.layer_norm.weight"], 1e-6)
            dense = f"{at}.{last}.DenseReluDense"
            x = x + (h @ w[f"{dense}.wi.weight"].T).relu() @ w[f"{dense}.wo.weight"].T
        return norm(x, w[f"{side}.final_layer_norm.weight"], 1e-6)

    memory = stack("encoder", w["shared.weight"][source], None)
    width = w["shared.weight"].shape[1]
    return stack("decoder", w["shared.weight"][target], memory) * width**-0.5 @ w["shared.weight"].T
