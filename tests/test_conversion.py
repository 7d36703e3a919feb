"""Weights in and out: what comes in computes what it computed there, to 1e-5, or is refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from formulas import minimind, t5
from safetensors.torch import load_file
from test_encode import word_tokenizer
from tiny_models import DECODER
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from autotune.errands import Export, Import, SavedModel
from autotune.errors import ConfigurationError
from trainer.conversion import export_model, import_model
from trainer.pickled import limited

VOCABULARY = 510


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape) / shape[-1] ** 0.5


def minimind_weights(kind: str, width: int = 64, layers: int = 2, heads: int = 8, keys: int = 2) -> dict[str, Tensor]:
    """Make random weights by the names and in the shapes of MiniMind's code at that time; norms are no ones."""
    torch.manual_seed(0)
    head, inner = width // heads, 64 * -(-int(8 * width / 3) // 64)
    embedding = drawn(VOCABULARY, width)
    ones = lambda size: 1 + 0.1 * torch.randn(size)  # noqa: E731
    if kind == "april":
        made = {"tok_embeddings.weight": embedding, "norm.weight": ones(width), "output.weight": embedding}
        at, names = (
            "layers.{}.",
            ("attention.w{}", ("q", "k", "v", "o"), "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
        )
        norms = ("attention_norm", "ffn_norm")
    else:
        made = {"model.embed_tokens.weight": embedding, "model.norm.weight": ones(width), "lm_head.weight": embedding}
        at, names = (
            "model.layers.{}.",
            ("self_attn.{}_proj", ("q", "k", "v", "o"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
        norms = ("input_layernorm", "post_attention_layernorm")
    for i in range(layers):
        of = at.format(i)
        sizes = ((width, width), (keys * head, width), (keys * head, width), (width, width))
        made |= {f"{of}{names[0].format(n)}.weight": 3 * drawn(*size) for n, size in zip(names[1], sizes, strict=True)}
        made |= {f"{of}{n}.weight": drawn(inner, width) for n in names[2:4]} | {
            f"{of}{names[4]}.weight": drawn(width, inner)
        }
        made |= {f"{of}{n}.weight": ones(width) for n in norms}
        if kind == "3":
            made |= {f"{of}self_attn.{n}_norm.weight": ones(head) for n in "qk"}
    return made


def chatlm_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=48, d_ff=96, d_kv=12, num_heads=4, num_layers=3, num_decoder_layers=2
    )
    return {name: tensor + 0.1 * torch.randn_like(tensor) if "norm" in name else tensor
            for name, tensor in T5ForConditionalGeneration(config).state_dict().items()}  # fmt: skip


def imported(weights: Any, folder: Path, name: str = "full_sft_64.pth", **more: Any) -> Any:
    torch.save(weights, folder / name)
    asked = {"source": str(folder / name), "output": str(folder / "new"), "tokenizer": None, "heads": None} | more
    return import_model(Import(**asked), lambda _: None)


NORM = "model.norm.weight"
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])


@pytest.mark.parametrize("kind", ["april", "may", "3"])
@pytest.mark.parametrize("sizes", [(64, 2), (512, 8)], ids=str)
def test_minimind_computes_what_its_own_formula_does(kind: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    weights = minimind_weights(kind, *sizes, keys=4 if kind == "3" else 2)
    told = imported(weights, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float64)
    with torch.no_grad():
        ours = model(input_ids=IDS[None]).logits[0]
    exact = {name: tensor.double() for name, tensor in weights.items()}
    theirs = minimind(exact, IDS, 8, 1e-6 if kind == "3" else 1e-5, kind == "april")
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() < 1e-5
    assert told.parameters == sum(t.numel() for t in {id(t): t for t in weights.values()}.values())
    assert (told.assumed == "") == (kind == "3")


def test_a_rotary_pair_left_beside_is_another_model(tmp_path: Path) -> None:
    """The permutation that nothing but the numbers shows."""
    weights = minimind_weights("april")
    right, wrong = minimind(weights, IDS, 8, 1e-5, True), None
    renamed = minimind_weights("may")
    names = dict(zip(renamed, weights, strict=True))
    wrong = minimind({new: weights[old] for new, old in names.items()}, IDS, 8, 1e-5, False)
    assert (right - wrong).abs().max() > 0.1


def test_chatlm_computes_what_its_own_formula_does(tmp_path: Path) -> None:
    weights = chatlm_weights()
    imported(weights, tmp_path, "chat_small_t5.best.bin")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "new", dtype=torch.float64)
    with torch.no_grad():
        ours = model(input_ids=IDS[None], decoder_input_ids=IDS[None, :7]).logits[0]
    theirs = t5({name: tensor.double() for name, tensor in weights.items()}, IDS, IDS[:7])
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5


def test_what_wraps_weights_is_taken_off(tmp_path: Path) -> None:
    """A file to go on from, of a compiled model under DDP, in half precision, is the same model."""
    weights = {name: tensor.half() for name, tensor in minimind_weights("may").items()}
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}
    wrapped |= {"module._orig_mod.model.freqs_cos": torch.zeros(4)}
    told = imported({"model": wrapped, "optimizer": {"state": {}}, "epoch": 1, "step": 20}, tmp_path)
    assert told.dtype == "float16"
    kept = load_file(tmp_path / "new" / "model.safetensors")
    assert set(kept) == set(weights) - {"lm_head.weight"}
    assert all(torch.equal(kept[name], weights[name]) for name in kept)


def test_an_output_layer_of_its_own_stays_its_own(tmp_path: Path) -> None:
    weights = minimind_weights("may") | {"lm_head.weight": drawn(VOCABULARY, 64)}
    imported(weights, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])


def without(name: str) -> Any:
    return lambda w: {n: t for n, t in w.items() if n != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), "1 weights are missing: model.layers.1.mlp.up_proj.weight"),
        (lambda w: w | {"value_head.weight": torch.ones(1)}, "1 weights are too many: value_head.weight"),
        (lambda w: w | {NORM: torch.ones(3)}, r"another shape: model.norm.weight \(3,\) in place of \(64,\)"),
        (lambda w: w | {NORM: torch.full((64,), torch.inf)}, "not finite: model.norm.weight"),
        (lambda w: w | {NORM: torch.ones(64, dtype=torch.long)}, "of type torch.int64: model.norm.weight"),
        (lambda w: w | {NORM: torch.ones(1).expand(64)}, "more than the file holds"),
        (lambda w: w | {"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(1)}, "a mixture of experts"),
        (lambda w: w | {NORM: torch.ones(64).to(torch.float8_e4m3fn)}, "of type torch.float8_e4m3fn: model.norm"),
        (lambda w: dict.fromkeys((*w, *map(str, range(9))), torch.ones(99999)), "the same numbers again and again"),
        (lambda w: w | {f"model.layers.{i}.x": torch.ones(1) for i in range(1001)}, "name 1,001 layers, 1,000 at most"),
        (lambda w: {"model.layers.0.self_attn.q_proj.lora.A.weight": torch.ones(1)}, "an adapter"),
        (lambda w: {"a": torch.ones(1)}, "neither MiniMind's nor ChatLM-mini-Chinese's"),
        (lambda w: {"epoch": 3}, "holds no weights by name"),
        (lambda w: [torch.ones(1)], "holds no weights by name"),
    ],
)  # fmt: skip
def test_what_is_not_the_whole_of_a_model_is_refused_by_name(change: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=said):
        imported(change(minimind_weights("may")), tmp_path)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are Linux's")
def test_what_is_read_has_limits_that_end_with_it() -> None:
    with pytest.raises(MemoryError), limited(2**28):
        bytearray(2**30)
    assert len(bytearray(2**30)) == 2**30


def test_heads_that_the_weights_cannot_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="are not of 5 heads"):
        imported(minimind_weights("may"), tmp_path, heads=5)
    weights = minimind_weights("may", heads=4)
    imported(weights, tmp_path, heads=4)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "new")(input_ids=IDS[None]).logits[0]
    assert (ours - minimind(weights, IDS, 4, 1e-5, False)).abs().max() < 1e-4


def test_two_layers_that_are_one_tensor_in_the_file_are_two_in_the_model(tmp_path: Path) -> None:
    weights = minimind_weights("may")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"]
    imported(weights, tmp_path)
    kept = load_file(tmp_path / "new" / "model.safetensors")
    assert torch.equal(kept["model.layers.1.mlp.up_proj.weight"], weights["model.layers.0.mlp.up_proj.weight"])
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("told", [{"num_attention_heads": "x"}, {"num_attention_heads": -8}, {"rope_theta": "x"}])
def test_a_configuration_that_cannot_be_is_a_sentence(told: Any, tmp_path: Path) -> None:
    torch.save(minimind_weights("may"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minimind"} | told))
    with pytest.raises(ConfigurationError):
        import_model(
            Import(source=str(tmp_path), output=str(tmp_path / "x"), tokenizer=None, heads=None), lambda _: None
        )


@pytest.mark.parametrize("change", [{"tie_word_embeddings": False}, {"hidden_act": "gelu"}, {"attention_bias": True}])
def test_what_minimind_does_not_compute_does_not_go_out_as_its_own(change: Any, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**DECODER | {"head_dim": 8} | change)).save_pretrained(tmp_path / "new")
    saved = SavedModel(
        place="x", model=str(tmp_path / "new"), vocabulary_size=None, checkpoint=None, tokenizer=None, stage="sft"
    )
    asked = {"saved": saved, "output": str(tmp_path / "x.pth"), "precision": None, "format": "minimind"}
    with pytest.raises(ConfigurationError, match="MiniMind's code does not compute this model: "):
        export_model(Export.model_validate(asked))
    assert not (tmp_path / "x.pth").exists()


def test_another_minds_tokenizer_beside_is_not_taken(tmp_path: Path) -> None:
    """That of April 2025 has as many entries as the later one, and other words."""
    word_tokenizer().save_pretrained(tmp_path)
    assert imported(minimind_weights("3"), tmp_path).tokenizer is None
    assert imported(minimind_weights("april"), tmp_path, output=str(tmp_path / "b")).tokenizer is not None


def test_a_tokenizer_beside_the_weights_comes_with_its_end(tmp_path: Path) -> None:
    """Where MiniMind keeps it; generation then ends where it says, and not at the length's limit."""
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    weights = minimind_weights("april")
    told = imported(weights, tmp_path / "out")
    assert told.tokenizer is not None
    assert Path(told.tokenizer).resolve() == tmp_path / "model"
    new = tmp_path / "out" / "new"
    assert AutoTokenizer.from_pretrained(new).encode("1 2") == tokenizer.encode("1 2")
    assert GenerationConfig.from_pretrained(new).eos_token_id == tokenizer.eos_token_id
    small = {name: tensor[:5] if tensor.shape[0] == VOCABULARY else tensor for name, tensor in weights.items()}
    with pytest.raises(ConfigurationError, match=f"has {len(tokenizer)} tokens, the model 5"):
        imported(small, tmp_path / "out", output=str(tmp_path / "small"))


@pytest.mark.parametrize("kind", ["april", "may", "3"])
def test_what_goes_out_as_minimind_comes_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    weights = minimind_weights(kind)
    imported(weights, tmp_path)
    saved = SavedModel(
        place="x", model=str(tmp_path / "new"), vocabulary_size=None, checkpoint=None, tokenizer=None, stage="sft"
    )
    form = "minimind-2025-04" if kind == "april" else "minimind"
    out = tmp_path / "back.pth"
    told = export_model(
        Export.model_validate({"saved": saved, "output": str(out), "precision": "fp32", "format": form})
    )
    back = torch.load(out, weights_only=True)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in back)
    assert told.needs["dim" if kind == "april" else "hidden_size"] == 64
    assert told.bytes == out.stat().st_size


def test_half_precision_in_one_file(tmp_path: Path) -> None:
    weights = chatlm_weights()
    imported(weights, tmp_path)
    saved = SavedModel(
        place="x", model=str(tmp_path / "new"), vocabulary_size=None, checkpoint=None, tokenizer=None, stage="sft"
    )
    asked = {"saved": saved, "output": str(tmp_path / "half"), "precision": None, "format": "transformers"}
    assert export_model(Export.model_validate(asked)).precision == "bf16"
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert [file.name for file in (tmp_path / "half").glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(model.shared.weight, weights["shared.weight"].bfloat16())
    with pytest.raises(ConfigurationError, match="does not compute this model: t5"):
        export_model(Export.model_validate(asked | {"output": str(tmp_path / "x.pth"), "format": "minimind"}))


def test_weights_that_fp16_does_not_hold_are_refused(tmp_path: Path) -> None:
    weights = minimind_weights("may")
    weights["model.norm.weight"][3] = 1e5
    imported(weights, tmp_path)
    saved = SavedModel(
        place="x", model=str(tmp_path / "new"), vocabulary_size=None, checkpoint=None, tokenizer=None, stage="sft"
    )
    asked = {"saved": saved, "output": str(tmp_path / "half"), "precision": None, "format": "transformers"}
    with pytest.raises(
        ConfigurationError, match=r"1 weights are no numbers that float16 holds, first model\.norm\.weight"
    ):
        export_model(Export.model_validate(asked))
