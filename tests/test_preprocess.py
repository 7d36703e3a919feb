"""Data is tokenized once, under what it was made of, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from autotune.errands import Preprocess, Preprocessed
from autotune.errors import ConfigurationError, DataError, MachineError
from trainer.data import TokenStore
from trainer.encode import end_ids
from trainer.preprocess import preprocess
from trainer.records import Record, Turn
from trainer.tokenizer import CHAT_TEMPLATE, fingerprint, load_tokenizer, train_tokenizer

POSITIONS = 64


def pairs(first: int, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"how much is {i}?", "response": f"{i} it is"} for i in range(first, first + count)]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", pairs(0, 20))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    records = (Record("", (Turn("user", row["prompt"]), Turn("assistant", row["response"]))) for row in pairs(500, 20))
    train_tokenizer(records, 300, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its tokenizer, and positions for so many tokens."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer_dir.iterdir():
        shutil.copy2(file, folder)
    return folder


def errand(tmp_path: Path, *data: Path, **changes: Any) -> Preprocess:
    values: dict[str, Any] = {
        "model": "tiny",
        "tokenizer": None,
        "dropout": None,
        "freeze": (),
        "data": tuple(map(str, data)),
        "validation": (),
        "stage": None,
        "max_seq_len": 64,
        "max_target_len": 64,
        "limit": None,
        "validation_split": None,
        "show": 0,
        "cache_dir": str(tmp_path / "cache"),
    }
    return Preprocess(**(values | changes))


def run(asked: Preprocess) -> Preprocessed:
    return preprocess(asked, lambda doing, rows: None)


def facts(answer: Preprocessed) -> Any:
    assert answer.data is not None
    return answer.data


def times(folder: Path) -> dict[str, int]:
    """When each file beneath a folder was last changed, and the folder itself."""
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def left_behind(tmp_path: Path) -> list[str]:
    return [str(path) for path in (tmp_path / "cache").rglob("*") if path.is_file()] + [
        str(path) for path in (tmp_path / "cache").rglob(".*")
    ]


def texts(summary: Any, tokenizer_dir: str | None) -> list[str]:
    """The targets of a store as text."""
    store, tokenizer = TokenStore(Path(summary.store)), load_tokenizer(str(tokenizer_dir))
    spans = [(i, s, e) for i in range(len(store)) for s, e in store.spans(i)]
    return [tokenizer.decode(store.tokens(i)[s:e].tolist()) for i, s, e in spans]


def test_the_facts_are_those_of_the_store_and_the_store_holds_the_answers(tmp_path: Path, data: Path) -> None:
    answer = run(errand(tmp_path, data))
    summary, store = facts(answer), TokenStore(Path(facts(answer).store))
    assert texts(summary, answer.tokenizer_dir) == [row["response"] + "</s>" for row in pairs(0, 20)]
    lengths = [len(store.tokens(i)) for i in range(len(store))]
    assert (summary.rows, summary.samples, summary.tokens) == (20, 20, sum(lengths))
    assert summary.target_tokens == sum(int((store.spans(i)[:, 1] - store.spans(i)[:, 0]).sum()) for i in range(20))
    assert summary.longest(0) == max(lengths)
    assert (summary.stage, summary.cuts, summary.unknown_share) == ("sft", {}, 0.0)
    assert summary.files == (str(data),)
    tokenizer = load_tokenizer(str(answer.tokenizer_dir))
    assert answer.model.vocabulary_size == len(tokenizer), "a preset's vocabulary follows the tokenizer"
    assert answer.tokenizer_fingerprint == fingerprint(tokenizer)
    assert answer.ids is not None
    assert (answer.ids.pad, answer.ids.eos, answer.ids.bos) == (0, end_ids(tokenizer, "causal", "sft"), 2)


def test_the_same_data_is_tokenized_once(tmp_path: Path, data: Path) -> None:
    first = run(errand(tmp_path, data, validation=(str(data),)))
    before = times(tmp_path / "cache")
    assert run(errand(tmp_path, data, validation=(str(data),))) == first
    assert times(tmp_path / "cache") == before


CHANGES: dict[str, dict[str, Any]] = {
    "limit": {"limit": 10},
    "length": {"max_seq_len": 32},
    "stage": {"stage": "pretrain"},
    "model's task": {"model": "tiny-t5"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_rules_make_another_store_and_keep_the_first(
    tmp_path: Path, data: Path, tokenizer_dir: Path, change: str
) -> None:
    asked = errand(tmp_path, data, tokenizer=str(tokenizer_dir))
    first = facts(run(asked))
    before = times(Path(first.store))
    other = facts(run(asked.model_copy(update=CHANGES[change])))
    assert other.store != first.store
    assert other.fingerprint != first.fingerprint
    assert times(Path(first.store)) == before
    assert facts(run(asked)) == first


def test_another_tokenizer_makes_another_store(tmp_path: Path, data: Path, tokenizer_dir: Path) -> None:
    trained = run(errand(tmp_path, data))
    given = run(errand(tmp_path, data, tokenizer=str(tokenizer_dir)))
    assert given.tokenizer_dir != trained.tokenizer_dir
    assert {p.name for p in Path(str(given.tokenizer_dir)).iterdir()} == {p.name for p in tokenizer_dir.iterdir()}
    assert facts(given).store != facts(trained).store


def test_a_changed_file_is_tokenized_again(tmp_path: Path, data: Path, tokenizer_dir: Path) -> None:
    asked = errand(tmp_path, data, tokenizer=str(tokenizer_dir))
    first = facts(run(asked))
    stores = [first.store]
    write(data, pairs(0, 21))
    stores.append(facts(run(asked)).store)
    assert facts(run(asked)).rows == 21
    # Of the same size, so that only its time tells.
    write(data, [*pairs(0, 20), {"prompt": "how much is 99?", "response": "99 it is"}])
    os.utime(data, ns=(1, 1))
    stores.append(facts(run(asked)).store)
    assert len(set(stores)) == 3
    os.utime(data, ns=(2, 2))
    assert facts(run(asked)).store not in stores


def test_a_changed_file_trains_another_tokenizer(tmp_path: Path, data: Path) -> None:
    first = run(errand(tmp_path, data))
    write(data, [{"text": "quite another text"}] * 9)
    second = run(errand(tmp_path, data))
    assert second.tokenizer_dir != first.tokenizer_dir
    assert second.tokenizer_fingerprint != first.tokenizer_fingerprint


def test_a_cache_may_be_moved(tmp_path: Path, data: Path) -> None:
    first = run(errand(tmp_path, data))
    (tmp_path / "cache").rename(tmp_path / "moved")
    before = times(tmp_path / "moved")
    moved = run(errand(tmp_path, data, cache_dir=str(tmp_path / "moved")))
    assert times(tmp_path / "moved") == before
    assert Path(facts(moved).store).parent == tmp_path / "moved/tokens"
    assert texts(facts(moved), moved.tokenizer_dir) == [row["response"] + "</s>" for row in pairs(0, 20)]
    assert facts(moved).fingerprint == facts(first).fingerprint


def test_validation_is_read_by_the_tokenizer_of_the_data(tmp_path: Path, data: Path) -> None:
    validation = write(tmp_path / "validation.jsonl", pairs(500, 7))
    answer = run(errand(tmp_path, data, validation=(str(validation),), limit=5))
    assert answer.validation is not None
    assert (facts(answer).rows, answer.validation.rows) == (5, 7), "the limit is the data's"
    assert texts(answer.validation, answer.tokenizer_dir) == [row["response"] + "</s>" for row in pairs(500, 7)]
    alone = run(errand(tmp_path, data, limit=5))
    assert alone.tokenizer_fingerprint == answer.tokenizer_fingerprint
    assert alone.validation is None


def test_rows_are_held_out_by_content_so_that_no_duplicate_is_on_both_sides(real_data: Path, tmp_path: Path) -> None:
    file = real_data / "chatlm_mini/my_train_dataset_3k.parquet"
    rows = pq.read_table(file).to_pylist()
    twice = write(tmp_path / "twice.jsonl", rows[::-1])
    tokenizer = str(real_data / "minimind/tokenizer")
    alone = errand(tmp_path, file, tokenizer=tokenizer, validation_split=0.1)
    answers = [run(alone), run(errand(tmp_path, twice, file, tokenizer=tokenizer, validation_split=0.1))]
    once, both = ([parts(answer.data), parts(answer.validation)] for answer in answers)
    for training, validation in (once, both):
        assert not training.keys() & validation.keys()
    assert 0.07 < once[1].total() / 3000 < 0.13
    assert once[0].total() + once[1].total() == 3000
    assert {sample: 2 * count for sample, count in once[1].items()} == both[1], "wherever the rows stand"
    few = run(alone.model_copy(update={"limit": 1000}))
    assert 0 < len(parts(few.validation)) < len(once[1])
    assert parts(few.validation) <= once[1], "whatever the limit"


def parts(summary: Any) -> Counter[bytes]:
    """The samples of a store, however often."""
    store = TokenStore(Path(summary.store))
    assert summary.rows == summary.samples == len(store)
    return Counter(store.tokens(i).tobytes() for i in range(len(store)))


@pytest.mark.parametrize(("share", "side"), [(1e-9, "is held out"), (1 - 1e-9, "is left to train on")])
def test_a_share_that_leaves_a_side_empty_is_an_error(tmp_path: Path, data: Path, share: float, side: str) -> None:
    with pytest.raises(ConfigurationError, match=f"none of the 20 rows {side}"):
        run(errand(tmp_path, data, validation_split=share))


def test_what_a_rule_cuts_is_counted(tmp_path: Path, tokenizer_dir: Path) -> None:
    long = write(tmp_path / "long.jsonl", [*pairs(0, 3), {"prompt": "q", "response": "long " * 99}])
    summary = facts(run(errand(tmp_path, long, tokenizer=str(tokenizer_dir))))
    assert summary.cuts == {"prompt_cut": 1, "answer_cut": 1}
    assert summary.longest(0) == 64


def test_documents_are_pretrained_on_and_split(tmp_path: Path, tokenizer_dir: Path) -> None:
    documents = write(tmp_path / "documents.jsonl", [{"text": "one and two and three " * 30}, {"text": "four"}])
    summary = facts(run(errand(tmp_path, documents, tokenizer=str(tokenizer_dir))))
    assert (summary.stage, summary.rows, summary.cuts) == ("pretrain", 2, {"split": 1})
    assert summary.samples > 2
    assert summary.longest(0) == 64


def test_a_seq2seq_store_has_the_lengths_of_both_sides(tmp_path: Path, data: Path) -> None:
    answer = run(errand(tmp_path, data, model="tiny-t5", max_seq_len=8))
    assert answer.model.task == "seq2seq"
    sources, targets = facts(answer).lengths
    assert sum(count for _, count in sources) == sum(count for _, count in targets) == 20
    assert facts(answer).longest(0) <= 8
    assert texts(facts(answer), answer.tokenizer_dir) == [row["response"] + "</s>" for row in pairs(0, 20)]


@pytest.mark.parametrize("stage", [None, "sft", "pretrain"])
def test_seq2seq_cannot_learn_from_documents(tmp_path: Path, tokenizer_dir: Path, stage: str | None) -> None:
    documents = write(tmp_path / "documents.jsonl", [{"text": "one"}])
    asked = errand(tmp_path, documents, model="tiny-t5", tokenizer=str(tokenizer_dir), stage=stage)
    with pytest.raises(DataError) as caught:
        run(asked)
    assert caught.value.message.startswith(f"{documents}: line 1: a document of plain text has no answers")
    assert "--stage pretrain and a causal model" in caught.value.hint
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("given", [False, True])
def test_a_bad_row_leaves_nothing_half_written(tmp_path: Path, tokenizer_dir: Path, given: bool) -> None:
    bad = write(tmp_path / "bad.jsonl", [*pairs(0, 600), {"prompt": "q", "response": None}])
    asked = errand(tmp_path, bad, tokenizer=str(tokenizer_dir) if given else None)
    with pytest.raises(DataError, match="line 601"):
        run(asked)
    assert left_behind(tmp_path) == []
    write(bad, pairs(0, 600))
    assert facts(run(asked)).rows == 600


KILLED = """
import sys, time
from autotune.errands import ERRAND
from trainer import preprocess, shards

preprocess.SAVE_SECONDS = 0.0
shards.SMALL_BYTES = 0
make = shards.make_shard

def slow(*arguments):
    time.sleep(0.05)
    return make(*arguments)

shards.make_shard = slow
preprocess.preprocess(ERRAND.validate_json(sys.argv[1]), lambda doing, rows: print(rows, flush=True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one process")
@pytest.mark.parametrize("processes", [1, 2])
def test_what_was_tokenized_before_a_kill_is_not_tokenized_again(
    tmp_path: Path, tokenizer_dir: Path, processes: int
) -> None:
    rows = write(tmp_path / "data.jsonl", pairs(0, 12_000))
    asked = errand(tmp_path, rows, tokenizer=str(tokenizer_dir))
    environment = {**os.environ, "OMP_NUM_THREADS": str(processes)}
    command = [sys.executable, "-c", KILLED, asked.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 3000:
                break
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children())]
        assert len(family) == (1 if processes == 1 else 1 + processes)
        process.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not any(map(psutil.pid_exists, family)):
            break
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, family)), "no process outlives the one that was killed"
    told: list[tuple[str, int]] = []
    summary = facts(preprocess(asked, lambda doing, rows: told.append((doing, rows))))
    assert told[0][0] == "tokenizing, from where it was left"
    assert 3000 <= told[0][1] < 12_000
    whole = facts(run(errand(tmp_path, rows, tokenizer=str(tokenizer_dir), cache_dir=str(tmp_path / "other"))))
    assert summary.model_copy(update={"store": whole.store}) == whole
    for name in ("tokens", "offsets", "spans", "span_offsets"):
        assert Path(summary.store, name).read_bytes() == Path(whole.store, name).read_bytes()
    assert not [path for path in left_behind(tmp_path) if Path(path).name.startswith(".")]


def test_two_that_tokenize_the_same_do_it_once(tmp_path: Path, tokenizer_dir: Path) -> None:
    asked = errand(tmp_path, write(tmp_path / "data.jsonl", pairs(0, 9000)), tokenizer=str(tokenizer_dir))
    command = [sys.executable, "-c", KILLED, asked.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        first.stdout.readline()
        told: list[str] = []
        summary = facts(preprocess(asked, lambda doing, rows: told.append(doing)))
        first.stdout.read()
    assert told == ["waiting for another process that tokenizes the same"]
    assert (first.returncode, summary.rows) == (0, 9000)


def test_a_folder_without_its_summary_is_made_anew(tmp_path: Path, data: Path) -> None:
    summary = facts(run(errand(tmp_path, data)))
    Path(summary.store, "summary.json").unlink()
    Path(summary.store, "tokens").write_bytes(b"rubbish")
    again = run(errand(tmp_path, data))
    assert facts(again) == summary
    assert texts(summary, again.tokenizer_dir) == [row["response"] + "</s>" for row in pairs(0, 20)]


@pytest.mark.parametrize("limit", [None, 30])
def test_an_empty_tuple_is_the_demo_data(tmp_path: Path, limit: int | None) -> None:
    pytest.importorskip("chatterbot_corpus")
    summary = facts(run(errand(tmp_path, limit=limit)))
    assert summary.stage == "sft"
    assert summary.rows == limit if limit else summary.rows > 100
    assert all(file.endswith(".yml") for file in summary.files)


def test_without_data_only_the_model_is_described(tmp_path: Path, tokenizer_dir: Path) -> None:
    bare = run(errand(tmp_path, data=None))
    assert (bare.data, bare.validation, bare.tokenizer_dir, bare.ids) == (None, None, None, None)
    assert bare.model.vocabulary_size == 6400
    sized = run(errand(tmp_path, data=None, tokenizer=str(tokenizer_dir)))
    assert sized.model.vocabulary_size == len(load_tokenizer(str(tokenizer_dir)))
    assert not (tmp_path / "cache").exists()


def test_a_checkpoint_brings_its_own_tokenizer(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    answer = run(errand(tmp_path, data, model=str(checkpoint)))
    own = load_tokenizer(str(checkpoint))
    assert answer.tokenizer_fingerprint == fingerprint(own) == fingerprint(load_tokenizer(str(answer.tokenizer_dir)))
    assert not answer.model.random_weights


def test_a_checkpoint_without_a_tokenizer_is_an_error(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ConfigurationError) as caught:
        run(errand(tmp_path, data, model=str(bare)))
    assert caught.value.message == f"{bare}: a model without a tokenizer.json"


def test_a_model_that_is_none_is_said_before_its_tokenizer(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ConfigurationError, match="'tinny' is neither a preset nor a folder"):
        run(errand(tmp_path, data, model="tinny"))


def test_a_model_with_too_few_positions_is_an_error(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    run(errand(tmp_path, data, model=str(checkpoint), max_seq_len=POSITIONS, max_target_len=POSITIONS + 1))
    with pytest.raises(ConfigurationError) as caught:
        run(errand(tmp_path, data, model=str(checkpoint), max_seq_len=POSITIONS + 1))
    assert f"{POSITIONS + 1} tokens" in caught.value.message
    assert f"positions for {POSITIONS}" in caught.value.message
    assert caught.value.hint == f"give --max-seq-len {POSITIONS}"


def test_relative_positions_have_no_end(tmp_path: Path, data: Path) -> None:
    assert run(errand(tmp_path, data, model="tiny-t5", max_seq_len=10**5, max_target_len=10**5)).data


def test_the_share_of_unknown_tokens_is_told(real_data: Path, tmp_path: Path) -> None:
    rows = real_data / "chatlm_mini/my_valid_dataset_1k.parquet"
    shares = {}
    for name in ("chatlm_mini", "minimind"):
        asked = errand(tmp_path, rows, tokenizer=str(real_data / name / "tokenizer"), model="tiny-t5")
        summary = facts(run(asked))
        assert summary.rows == summary.samples == 1000
        shares[name] = summary.unknown_share
    assert 0.15 < shares["chatlm_mini"] < 0.35
    assert shares["minimind"] == 0.0


def test_what_is_saved_is_the_tokenizer_as_it_was_used_and_nothing_that_lay_beside_it(
    tmp_path: Path, data: Path, tokenizer_dir: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tokenizer_dir, bare)
    (bare / "chat_template.jinja").unlink()
    (bare / "model.safetensors").write_bytes(b"weights that must not be copied over trained ones")
    saved = Path(str(run(errand(tmp_path, data, tokenizer=str(bare))).tokenizer_dir))
    assert (saved / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    assert not (saved / "model.safetensors").exists()


def test_a_model_with_too_few_positions_is_an_error_without_data_too(
    tmp_path: Path, data: Path, checkpoint: Path
) -> None:
    asked = errand(tmp_path, data, model=str(checkpoint), max_seq_len=POSITIONS + 1)
    with pytest.raises(ConfigurationError, match=f"positions for {POSITIONS}"):
        run(asked.model_copy(update={"data": None}))


def test_a_cache_that_cannot_be_written_is_an_error_of_the_machine(tmp_path: Path, data: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="the cache cannot be written: Not a directory") as caught:
        run(errand(tmp_path, data).model_copy(update={"cache_dir": str(tmp_path / "file" / "cache")}))
    assert "XDG_CACHE_HOME" in caught.value.hint


def test_a_full_disk_is_said_and_what_was_tokenized_is_kept(tmp_path: Path) -> None:
    """By the largest file that this process may write: the kernel refuses as it does where a disk is full."""
    resource = pytest.importorskip("resource")
    rows = [{"text": f"the {i}th document has some words of its own, and ends here"} for i in range(3000)]
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = run(errand(tmp_path, file, limit=100)).tokenizer_dir
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, before[1]))
    try:
        with pytest.raises(MachineError, match="File too large") as error:
            run(errand(tmp_path, file, tokenizer=tokenizer))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "XDG_CACHE_HOME" in str(error.value.hint)
    assert facts(run(errand(tmp_path, file, tokenizer=tokenizer))).rows == 3000
