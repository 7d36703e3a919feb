"""A tokenizer of files: what it learns from is drawn from all of them, and what one lacks is named."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from autotune.errors import ConfigurationError
from trainer.tokenizer import CHAT_TEMPLATE, load_tokenizer
from trainer.vocabulary import inspect, language_of, some_texts, train

CHINESE = "今天天气很好，我们去公园散步。"
ENGLISH = "The weather is fine today, so we walk in the park."


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.parquet"
    made = [{"prompt": f"{text} {i % 50}", "response": text} for i in range(400) for text in (CHINESE, ENGLISH)]
    pq.write_table(pa.Table.from_pylist(made), file)
    return str(file)


def test_a_tokenizer_that_is_trained_lacks_nothing_and_is_one_that_trains_a_model(rows: str, tmp_path: Path) -> None:
    learned, made = train([rows], 400, tmp_path / "made", 1, lambda *_: None)
    assert made.entries <= 400
    assert made.defects == ()
    assert made.special == {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    assert made.fertility is not None
    assert made.fertility.rows == 43
    assert (made.fertility.unknown_share, made.fertility.whole_share) == (0.0, 1.0)
    assert learned == pytest.approx(sum(map(len, some_texts([rows], 1))) * 757 / 800, rel=0.01)
    assert made.fertility.tokens_per_character.keys() == {"zh", "en"}
    assert all(0 < share < 0.6 for share in made.fertility.tokens_per_character.values())
    loaded = load_tokenizer(str(tmp_path / "made"))
    assert loaded.chat_template == CHAT_TEMPLATE
    assert loaded.decode(loaded.encode(CHINESE)) == CHINESE


def test_it_learns_from_all_of_the_files_and_from_no_more_than_it_may(rows: str, tmp_path: Path) -> None:
    late = tmp_path / "late.jsonl"
    late.write_text(
        "".join(json.dumps({"prompt": "zygomorphic " * 5, "response": "zygomorphic."}) + "\n" for _ in range(800))
    )
    learned, _ = train([rows, str(late)], 600, tmp_path / "made", 1, lambda *_: None, most_characters=20_000)
    assert 15_000 < learned < 25_000
    tokenizer = Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    assert len(tokenizer.encode("zygomorphic").ids) <= 2, "the last file was learned from too"


def test_what_it_is_told_of_is_of_all_the_files_however_many_rows_they_have(tmp_path: Path) -> None:
    many = [{"text": f"{CHINESE} {i % 9}"} for i in range(50_000)] + [{"text": ENGLISH}] * 5_000
    pq.write_table(pa.Table.from_pylist(many), tmp_path / "rows.parquet")
    _, made = train([str(tmp_path / "rows.parquet")], 400, tmp_path / "made", 1, lambda *_: None)
    assert made.fertility is not None
    assert made.fertility.tokens_per_character.keys() == {"zh", "en"}
    assert 1900 < made.fertility.rows <= 2000


def test_what_a_tokenizer_lacks_is_named(tmp_path: Path) -> None:
    bare = Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.enable_truncation(8)
    bare.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"unk_token": "<unk>", "bos_token": {"content": "<b>"}}')
    made = inspect(tmp_path, ["a b", "a"])
    assert made.fertility is not None
    assert made.fertility.unknown_share == pytest.approx(1 / 3)
    words = "\n".join(made.defects)
    for part in ("no end token", "no padding token", "'<b>' is no entry", "no chat template", "cuts or pads by itself",
                 "33.3% of the tokens are unknown", "50.0% of the texts are not themselves"):  # fmt: skip
        assert part in words
    assert len(made.defects) == 7
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a", "pad_token": "a", "chat_template": "x"}')
    assert any("padding and end are one token" in defect for defect in inspect(tmp_path, []).defects)


def test_the_tokenizers_of_the_origins_are_told_what_they_lack(real_data: Path) -> None:
    texts = some_texts([str(real_data / "chatlm_mini")], 1)
    chatlm = inspect(real_data / "chatlm_mini" / "tokenizer", texts)
    assert chatlm.fertility is not None
    assert 0.2 < chatlm.fertility.unknown_share < 0.3
    assert any("of the tokens are unknown" in defect for defect in chatlm.defects)
    minimind = inspect(real_data / "minimind" / "tokenizer", texts)
    assert minimind.fertility is not None
    assert minimind.fertility.unknown_share == 0
    assert minimind.entries == 6400


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "{"), ("", "")])
def test_what_is_no_tokenizer_is_told(name: str, content: str, rows: str, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    train([rows], 300, folder, 1, lambda *_: None)
    if name:
        (folder / name).write_text(content)
    with pytest.raises(ConfigurationError, match="not a tokenizer" if name != "tokenizer_config.json" else "not JSON"):
        inspect(folder if name else tmp_path, [])


@pytest.mark.parametrize(
    ("text", "language"), [(CHINESE, "zh"), (ENGLISH, "en"), ("Привет, как дела?", "other"), ("", "other")]
)
def test_languages_are_told_apart_by_their_letters(text: str, language: str) -> None:
    assert language_of(text) == language
