"""Blocks become the same shards whatever the number of processes, in their order, errors too."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import DataError
from trainer.data import StoreWriter
from trainer.encode import Encoder
from trainer.records import read_blocks
from trainer.shards import Part, append, make_shards, useful_processes
from trainer.tokenizer import load_tokenizer

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one process"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # Python 3.12 and later, of all that have threads
]
FILES = ("dialogue/chitchat_400.jsonl", "dialogue/alpaca_zh_en_2k.jsonl", "chatlm_mini/my_train_dataset_3k.parquet")


@cache
def tokenizer(real_data: Path) -> Any:
    return load_tokenizer(str(real_data / "minimind/tokenizer"))


def store(real_data: Path, folder: Path, processes: int, skip: int = 0, part: Part | None = None) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    encoder = Encoder(tokenizer(real_data), "causal", "sft", 200, 0)
    blocks = read_blocks([real_data / name for name in FILES], 5000, skip)
    with StoreWriter(folder, "causal") as writer:
        for shard in make_shards(encoder, part, blocks, processes):
            append(writer, shard)
    return {"facts": writer.facts} | {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By one process."""
    return store(real_data, tmp_path_factory.mktemp("whole"), 1)


def test_a_store_is_the_same_for_any_number_of_processes(
    whole: dict[str, Any], real_data: Path, tmp_path: Path
) -> None:
    assert store(real_data, tmp_path, 3) == whole
    facts = whole["facts"]
    assert (facts.rows_read, facts.rows, facts.samples) == (5000, 5000, 5000)
    assert facts.cuts["dropped_turns"] > 100
    tokens, place = facts.longest
    assert tokens > 5000
    file, line = place.split(": line ")
    conversation = json.loads(Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1])["conversations"]
    text = tokenizer(real_data).apply_chat_template(conversation[: len(conversation) // 2 * 2], tokenize=False)
    assert tokens >= len(tokenizer(real_data)(text, add_special_tokens=False)["input_ids"])


def test_two_parts_are_the_whole(whole: dict[str, Any], real_data: Path, tmp_path: Path) -> None:
    held, rest = (store(real_data, tmp_path / str(h), 2, 0, Part(0.2, h))["facts"] for h in (True, False))
    facts = whole["facts"]
    assert held.rows + rest.rows == facts.rows
    assert held.tokens + rest.tokens == facts.tokens
    assert held.cuts + rest.cuts == facts.cuts


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_bad_row_is_named(tmp_path: Path, real_data: Path, processes: int) -> None:
    rows = [{"prompt": "q", "response": "a"}] * 9000
    rows[5000:5001] = rows[8000:8001] = [{"prompt": "q", "response": None}]
    file = tmp_path / "bad.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = Encoder(tokenizer(real_data), "causal", "sft", 64, 0)
    with pytest.raises(DataError, match="line 5001: `response` must be text, not null"):
        list(make_shards(encoder, None, read_blocks([file]), processes))


def test_processes_are_those_of_the_cores_and_one_for_little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert (useful_processes(10**9), useful_processes(10**5)) == (7, 1)
