"""Presets have exactly the published sizes; checkpoints load from safetensors alone; what is saved loads again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, build, workload
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from autotune.errands import TokenIds
from autotune.errors import ConfigurationError
from trainer.microbatch import SpecialTokens, WorstCase, collate
from trainer.model import PRESETS, build_for, freeze, load_config, save_model, summarise
from trainer.records import Record, Turn
from trainer.step import accumulate, start, train_step
from trainer.tokenizer import train_tokenizer

IDS = TokenIds(pad=0, eos=1, bos=2)


@pytest.mark.parametrize(
    ("preset", "parameters", "task"),
    [
        ("chatlm-t5", 187_692_288, "seq2seq"),
        ("minimind-26m", 25_829_888, "causal"),
        ("minimind-104m", 104_030_976, "causal"),
        ("minimind-3", 63_912_192, "causal"),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, parameters: int, task: str) -> None:
    summary = summarise(preset, None, None)
    assert (summary.parameters, summary.task) == (parameters, task)
    assert summary.trainable_parameters == parameters


@pytest.mark.parametrize("preset", ["tiny", "tiny-t5"])
def test_the_tiny_presets_have_one_to_two_million(preset: str) -> None:
    assert 1e6 <= summarise(preset, None, None).parameters <= 2e6


def test_a_preset_follows_the_tokenizers_vocabulary() -> None:
    per_token = 128
    assert summarise("tiny", 6400, None).parameters - summarise("tiny", 6000, None).parameters == 400 * per_token


def test_freezing_trains_what_fine_tuning_of_chatlm_mini_chinese_trained() -> None:
    """Embedding and encoder frozen: 94,396,032 of 187,692,288, the output layer being tied to the embedding."""
    summary = summarise("chatlm-t5", 29298, None, ("embedding", "encoder"))
    assert (summary.trainable_parameters, summary.parameters) == (94_396_032, 187_692_288)


@pytest.mark.parametrize("family", ["t5", "bart", "llama"])
def test_what_is_frozen_has_no_gradient_and_does_not_change(family: str) -> None:
    parts = ("embedding", "*layers.0.*") if family == "llama" else ("embedding", "encoder")
    torch.manual_seed(0)
    model = build(family)
    freeze(model, parts)
    shared = {model.get_input_embeddings().weight}
    before = {name: p.clone() for name, p in model.named_parameters()}
    work = workload(family)
    state = start(model, work, weight_decay=0.1)
    batch = collate([[i] for i in range(2)], WorstCase(work), work, SpecialTokens(0, 0))
    train_step(state, [batch], 8, work, learning_rate=0.1, clip=0.0)
    for name, parameter in model.named_parameters():
        frozen = parameter in shared or ("layers.0." if family == "llama" else "encoder.") in name
        assert parameter.requires_grad is not frozen, name
        assert (parameter in state.optimizer.state) is not frozen, name
        if frozen:
            assert torch.equal(parameter, before[name]), name
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed


def test_what_is_counted_as_trained_is_what_is_trained() -> None:
    parts = ("embedding", "encoder")
    built = build_for(
        workload("t5", model="tiny-t5", vocabulary_size=300, frozen=parts, gradient_checkpointing="on"),
        IDS, torch.device("cpu"),
    )  # fmt: skip
    trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert trained == summarise("tiny-t5", 300, None, parts).trainable_parameters
    work = workload("t5")
    batch = collate([[i] for i in range(2)], WorstCase(work), work, SpecialTokens(0, 0))
    state = start(built, work, weight_decay=0.1)
    accumulate(state, [batch], 8, work)
    assert {name for name, p in built.named_parameters() if p.grad is not None} == {
        name for name, p in built.named_parameters() if p.requires_grad
    }, "checkpointing makes a gradient for all that is trained, though no input has one"


@pytest.mark.parametrize("part", ["embedding", "lm_head.*", "*.embed_tokens.*", "shared.*"])
def test_a_tied_weight_is_one_by_any_of_its_names(part: str) -> None:
    model = build("t5")
    freeze(model, [part])
    assert not model.get_output_embeddings().weight.requires_grad
    assert not model.get_input_embeddings().weight.requires_grad
    assert sum(not p.requires_grad for p in model.parameters()) == 1


@pytest.mark.parametrize(
    ("family", "parts", "said"),
    [
        ("llama", ["encoder"], "freeze 'encoder' fits no parameter"),
        ("llama", ["*"], "nothing is left to train"),
        ("t5", ["embedding", "encoder", "decoder"], "nothing is left to train"),
    ],
)
def test_what_cannot_be_frozen_is_said(family: str, parts: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        freeze(build(family), parts)


def test_dropout_replaces_the_models_own() -> None:
    assert load_config("tiny-t5", None, None).dropout_rate == 0.1
    assert load_config("tiny-t5", None, 0.25).dropout_rate == 0.25
    assert load_config("tiny", None, 0.25).attention_dropout == 0.25


def test_an_unknown_name_is_answered_with_the_nearest_preset() -> None:
    with pytest.raises(ConfigurationError) as error:
        load_config("tiny-t6", None, None)
    assert "tiny-t5" in error.value.hint


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    build("llama").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ConfigurationError, match="safetensors"):
        load_config(str(tmp_path), None, None)


def test_remote_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config"}})
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigurationError):
        load_config(str(tmp_path), None, None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_a_local_checkpoint_loads_with_its_own_weights(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    loaded = build_for(workload(family, model=str(tmp_path)), IDS, torch.device("cpu"))
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert not summarise(str(tmp_path), None, None).random_weights


def test_a_tokenizer_larger_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="98 tokens"):
        summarise(str(tmp_path), 98, None)


def test_the_same_seed_gives_the_same_weights() -> None:
    built = []
    for _ in range(2):
        torch.manual_seed(7)
        built.append(build_for(workload("llama", model="tiny", vocabulary_size=300), IDS, torch.device("cpu")))
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in built), strict=True))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients: list[Any] = []
    for switch in ("off", "on"):
        torch.manual_seed(7)
        work = workload("llama", model="tiny", vocabulary_size=300, gradient_checkpointing=switch)
        model = build_for(work, IDS, torch.device("cpu")).train()
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == (switch == "on")
        model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None], use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("preset", "auto"), [("tiny", AutoModelForCausalLM), ("tiny-t5", AutoModelForSeq2SeqLM)])
def test_a_saved_model_loads_by_plain_transformers_with_tokenizer_and_end_token(
    preset: str, auto: Any, tmp_path: Path
) -> None:
    tokenizer_dir, folder = tmp_path / "tokenizer", tmp_path / "run" / "model"
    train_tokenizer(
        [Record("", (Turn("user", "你好"), Turn("assistant", "hello"))) for _ in range(9)], 300, tokenizer_dir
    )
    task = "seq2seq" if preset == "tiny-t5" else "causal"
    work = workload("llama", model=preset, task=task, vocabulary_size=300)
    model = build_for(work, IDS, torch.device("cpu"))
    save_model(model, tokenizer_dir, folder)
    save_model(model, tokenizer_dir, folder)  # an older one is replaced
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    loaded, tokenizer = auto.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    assert loaded.generation_config.pad_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<s>user\nhi</s>\n"
    out = loaded.generate(**tokenizer("你好", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4)
    assert out.shape[0] == 1


@pytest.mark.parametrize("damage", ["renamed", "truncated"])
def test_a_checkpoint_whose_weights_do_not_match_is_refused_and_not_trained_from_random(
    damage: str, tmp_path: Path
) -> None:
    build("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if damage == "renamed":
        save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file)
    else:
        file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ConfigurationError, match="weights"):
        build_for(workload("llama", model=str(tmp_path)), IDS, torch.device("cpu"))


def test_a_template_that_ends_answers_with_another_token_stops_generation_at_both(tmp_path: Path) -> None:
    ids = TokenIds(pad=0, eos=(1, 5), bos=2)
    work = workload("llama", model="tiny", vocabulary_size=300)
    build_for(work, ids, torch.device("cpu")).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [1, 5]


@pytest.mark.parametrize("preset", PRESETS)
def test_samples_can_share_rows_in_each_preset(preset: str) -> None:
    assert summarise(preset, None, None).packs


@pytest.mark.parametrize("family", MODELS)
def test_samples_can_share_rows_in_all_that_take_a_mask_of_ours(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    assert summarise(str(tmp_path), None, None).packs


def test_a_model_that_takes_no_mask_of_ours_is_known_before_it_is_trained(tmp_path: Path) -> None:
    """BLOOM makes its biases of a mask of two dimensions."""
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(tmp_path)
    facts = summarise(str(tmp_path), None, None)
    assert not facts.packs
    assert facts.window is None


def test_deterministic_kernels_are_asked_for_where_cublas_and_torch_look() -> None:
    """In a process of its own: there is no way back."""
    program = (
        "import os, torch; from trainer.model import make_deterministic; make_deterministic();"
        "assert torch.are_deterministic_algorithms_enabled();"
        "assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
