"""Tokenizers: what we train gives every text back, and what we load is what its folder says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from autotune.errors import ConfigurationError
from trainer.records import Record, Turn
from trainer.tokenizer import CHAT_TEMPLATE, fingerprint, load_tokenizer, train_tokenizer

VOCABULARY = 400


def some_records() -> Iterator[Record]:
    for i in range(40):
        yield Record(
            "", (Turn("system", "be kind"), Turn("user", f"你好，{i} 是什么？"), Turn("assistant", "a number 😀"))
        )
        yield Record("", text=f"It's {i} o'clock.\n\n  Indented text, and more text.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(some_records(), VOCABULARY, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder))


def copy_of(folder: Path, to: Path, **config: object) -> Path:
    """Copy a tokenizer, with other entries in its configuration; None takes one out."""
    to.mkdir()
    (to / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    old = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    new = {name: value for name, value in (old | config).items() if value is not None}
    (to / "tokenizer_config.json").write_text(json.dumps(new))
    return to


@settings(deadline=None)
@given(st.text())
@example("")
@example(" two  blanks \r\n\t and a line ")
@example("中文，和標點。Ünïcödé e\u0301 ﷺ \x00\u200d")
@example("👩‍👩‍👧‍👦🇨🇳")
@example("don 't , . ! n't 's")
def test_any_text_comes_back_as_it_was(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_first_ids_are_pad_end_and_begin(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<s>"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.unk_token_id is None, "bytes leave nothing unknown"


def test_all_turns_and_documents_are_learnt_from(tokenizer: Any) -> None:
    for phrase in ("be kind", "是什么？", " number", " text"):
        ids = tokenizer(phrase, add_special_tokens=False).input_ids
        assert len(ids) < len(phrase.encode()), phrase


@pytest.mark.parametrize("size", [300, VOCABULARY, 100_000])
def test_a_vocabulary_is_no_larger_than_was_asked_for(tmp_path: Path, size: int) -> None:
    train_tokenizer(some_records(), size, tmp_path)
    tokens = load_tokenizer(str(tmp_path)).get_vocab()
    assert 259 <= len(tokens) <= size
    assert set(tokens.values()) == set(range(len(tokens)))


def test_the_same_data_gives_the_same_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    train_tokenizer(some_records(), VOCABULARY, tmp_path)
    assert fingerprint(load_tokenizer(str(tmp_path))) == fingerprint(tokenizer)


def test_plain_transformers_reloads_what_was_trained(folder: Path, tokenizer: Any) -> None:
    reloaded = AutoTokenizer.from_pretrained(folder)
    assert fingerprint(reloaded) == fingerprint(tokenizer)
    assert reloaded.chat_template == CHAT_TEMPLATE
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hi"}]
    rendered = reloaded.apply_chat_template(messages, tokenize=False)
    assert rendered == "<s>user\n你好</s>\n<s>assistant\nhi</s>\n"
    prompt = reloaded.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>user\n你好</s>\n<s>assistant\n"


def test_the_fingerprint_changes_with_all_that_decides_tokens(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    other_text = tmp_path / "other"
    train_tokenizer([Record("", text="quite another text, another text " * 9)], VOCABULARY, other_text)
    changed = [
        other_text,
        copy_of(folder, tmp_path / "template", chat_template=CHAT_TEMPLATE + " "),
        copy_of(folder, tmp_path / "end", eos_token="<s>", chat_template=CHAT_TEMPLATE),
    ]
    same = copy_of(folder, tmp_path / "same", chat_template=CHAT_TEMPLATE)
    assert fingerprint(load_tokenizer(str(same))) == fingerprint(tokenizer)
    prints = {fingerprint(load_tokenizer(str(path))) for path in [*changed, folder]}
    assert len(prints) == len(changed) + 1


def test_a_tokenizer_without_a_template_is_given_ours(folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(str(copy_of(folder, tmp_path / "x"))).chat_template == CHAT_TEMPLATE


def test_a_template_of_its_own_is_kept(folder: Path, tmp_path: Path) -> None:
    own = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert load_tokenizer(str(copy_of(folder, tmp_path / "x", chat_template=own))).chat_template == own


def test_without_a_pad_token_the_end_token_pads(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(copy_of(folder, tmp_path / "x", pad_token=None)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


def test_truncation_and_padding_saved_with_a_tokenizer_are_not_ours(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "x")
    backend = Tokenizer.from_file(str(copy / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(copy / "tokenizer.json"))
    long, short = load_tokenizer(str(copy)).backend_tokenizer.encode_batch(["one two three four five six", "1"])
    assert len(long.ids) > 4
    assert len(short.ids) == 1


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigurationError) as caught:
            load_tokenizer(str(missing))
        assert caught.value.message == f"{missing}: no tokenizer.json in this folder"


@pytest.mark.parametrize("kept", [0, 1, 1000])
def test_a_damaged_tokenizer_is_named(folder: Path, tmp_path: Path, kept: int) -> None:
    copy = copy_of(folder, tmp_path / "x")
    (copy / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:kept])
    with pytest.raises(ConfigurationError) as caught:
        load_tokenizer(str(copy))
    assert caught.value.message.startswith(f"{copy}: not a tokenizer: ")


def test_real_tokenizers_load_with_their_own_template_or_ours(real_data: Path) -> None:
    minimind = load_tokenizer(str(real_data / "minimind/tokenizer"))
    assert "MiniMind" in minimind.chat_template
    chatlm_mini = load_tokenizer(str(real_data / "chatlm_mini/tokenizer"))
    assert chatlm_mini.chat_template == CHAT_TEMPLATE
    assert (chatlm_mini.pad_token, chatlm_mini.eos_token, chatlm_mini.bos_token) == ("[PAD]", "[EOS]", None)
    rendered = chatlm_mini.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
    assert rendered == "user\n你好[EOS]\n", "without a begin token there is none"
