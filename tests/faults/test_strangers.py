"""Data and models from strangers: refused with file and place, or taken; nothing is run, nothing is written outside."""

from __future__ import annotations

import base64
import codecs
import json
import os
import random
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import facts
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from micro import Command, make_home, refused
from safetensors.torch import load_file, save_file
from strangers import (
    ACCEPTED,
    BOMBS,
    GOOD,
    LINES,
    configurations,
    damaged,
    file_names,
    generated_lines,
    pickled_weights,
    pickles,
    templates,
)
from tiers import some, trials
from tiny_models import workload
from transformers import AutoConfig
from witness import Witnessed, watched

from autotune.errands import Import, Preprocess
from autotune.errors import ConfigurationError, DataError, UserError
from cli.options import as_arguments
from cli.render.console import err, show_command
from cli.render.plan import print_plan
from trainer.conversion import import_model
from trainer.model import build_for, summarise
from trainer.preprocess import preprocess
from trainer.records import DECODING_BYTES, LONGEST_LINE, LONGEST_ROW, find_files, parse, read_blocks
from trainer.template import CHILD_BYTES
from trainer.tokenizer import load_tokenizer

MIB = 2**20


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer and data, as they should be."""
    place = tmp_path_factory.mktemp("home")
    make_home(place)
    return place


def read(file: Path) -> str:
    """Read all rows; return what is said of one that is none."""
    try:
        for block in read_blocks([file]):
            for record in parse(block):
                assert record.turns or record.text is not None
    except DataError as error:
        return error.message
    return ACCEPTED


def test_lines_that_are_no_rows_are_named_and_odd_ones_are_rows(tmp_path: Path, tell: Any) -> None:
    for name, (line, expected) in LINES.items():
        for before in (0, 3):
            file = tmp_path / "rows.jsonl"
            file.write_bytes((GOOD + b"\n") * before + line + b"\n" + GOOD + b"\n")
            said = watched(lambda file=file: read(file), tmp_path).said  # type: ignore[misc]
            if expected == ACCEPTED and not (before and name == "a byte order mark"):
                assert said == ACCEPTED, (name, said)
            else:
                assert said.startswith(f"{file}: line {before + 1}"), (name, said)
                assert expected in said, (name, said)
                assert len(said) < 1100, name
                assert all(unicodedata.category(c)[0] != "C" for c in said), name
    tell(len(LINES))


def test_a_line_of_a_gigabyte_is_refused_without_being_held(tmp_path: Path, tell: Any) -> None:
    file = tmp_path / "rows.jsonl"
    for size in (LONGEST_LINE + 100, 2**30):
        file.write_bytes(GOOD + b'\n{"text": "')
        with file.open("r+b") as opened:
            opened.truncate(size)
        idle = watched(lambda: ACCEPTED, tmp_path).most_bytes
        seen = watched(lambda: read(file), tmp_path)
        assert seen.said == f"{file}: line 2: longer than 16 MiB"
        assert seen.most_bytes - idle < 64 * MIB
    tell(2)


def test_the_longest_lines_that_are_read_take_little(tmp_path: Path, tell: Any) -> None:
    """Of text a few times its bytes; of empty lists what Python's own take."""
    file = tmp_path / "rows.jsonl"
    start, end, room = b'{"text": "x', b'"}\n', LONGEST_LINE - 100
    beside = b'", "beside": ['
    lines = {
        "text": (start + b"x" * room + end, 96 * MIB),
        "lists": (start + beside + b"[]," * (room // 3) + b"[]]}\n", 640 * MIB),
        "escapes": (start + rb"\u4f60" * (room // 6) + end, 96 * MIB),
        "objects": (start + beside + b"{}," * (room // 3) + b"{}]}\n", 640 * MIB),
    }
    cases = [*lines.items()][: trials(2, 4)]
    for name, (line, most) in cases:
        file.write_bytes(line * trials(1, 3))
        idle = watched(lambda: ACCEPTED, tmp_path).most_bytes
        seen = watched(lambda: read(file), tmp_path)
        assert seen.said == ACCEPTED, name
        assert seen.most_bytes - idle < most, name
    tell(len(cases))


def test_generated_lines_are_rows_or_named(tmp_path: Path, tell: Any) -> None:
    def judge(lines: list[bytes]) -> int:
        refused = 0
        for line in lines:
            file = tmp_path / "rows.jsonl"
            file.write_bytes(GOOD + b"\n" + line + b"\n")
            said = read(file)
            assert said == ACCEPTED or said.startswith(f"{file}: line 2"), (line, said)
            refused += said != ACCEPTED
        return refused

    count, refused = trials(1000, 20_000), 0
    lines = [*generated_lines(count, seed=7)]
    for start in range(0, count, 1000):
        seen = watched(lambda start=start: judge(lines[start : start + 1000]), tmp_path)  # type: ignore[misc]
        assert (seen.code, seen.seen) == (0, [])
        refused += seen.said
    assert count // 4 < refused < count
    tell(count)


def tables() -> Iterator[tuple[str, pa.Table, dict[str, Any]]]:
    rows = [{"prompt": f"问题 {i} " * (i % 9), "response": f"answer {i}"} for i in range(600)]
    talks = [
        {"conversations": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
        for r in rows
    ]
    yield "plain", pa.Table.from_pylist(rows), {"compression": "none", "use_dictionary": False}
    yield "snappy", pa.Table.from_pylist(rows), {"compression": "snappy", "row_group_size": 100}
    yield "zstd", pa.Table.from_pylist(rows), {"compression": "zstd", "data_page_size": 1000}
    yield "checksums", pa.Table.from_pylist(rows), {"write_page_checksum": True}
    yield "nested", pa.Table.from_pylist(talks), {"compression": "gzip", "row_group_size": 200}


def test_parquet_that_is_damaged_is_named_and_crashes_nothing(tmp_path: Path, tell: Any) -> None:
    """What was damaged where no reader can see it, in a text, is read as it stands there."""

    def judge(content: bytes, seed: int, count: int) -> list[str]:
        random.seed(seed)
        file, said = tmp_path / "rows.parquet", []
        for _ in range(count):
            file.write_bytes(damaged(content))
            said.append(read(file))
            assert said[-1] == ACCEPTED or str(file) in said[-1], said[-1]
        return said

    group, refused, count = 20, 0, 0
    for _, table, options in tables():
        whole = tmp_path / "whole.parquet"
        pq.write_table(table, whole, **options)
        assert read(whole) == ACCEPTED
        content = whole.read_bytes()
        for seed in range(trials(2, 20)):
            work = partial(judge, content, seed, group)
            seen = watched(work, tmp_path)
            assert seen.code == 0, f"{options}, seed {seed}: ended with {seen.code}"
            assert seen.seen == []
            refused += sum(said != ACCEPTED for said in seen.said)
            count += group
    assert refused > count // 3
    tell(count)


def bombs() -> Iterator[tuple[str, Callable[[], pa.Table], dict[str, Any]]]:
    """Yield tables of gigabytes that are files of some KB, and what writes them so."""
    text = "x" * (LONGEST_ROW - 99)
    places = pa.array([0] * 256, pa.int32())
    yield "a text many times over", lambda: pa.table({"text": pa.DictionaryArray.from_arrays(places, [text])}), {}
    yield "one text", lambda: pa.table({"text": [text * 32]}), {"use_dictionary": False}
    yield "texts", lambda: pa.table({"text": [text] * 64}), {"use_dictionary": False}

    def turns() -> pa.Table:
        none = pa.nulls(10**8, pa.struct([("role", pa.string()), ("content", pa.string())]))
        return pa.table({"conversations": pa.ListArray.from_arrays(pa.array([0, 10**8], pa.int32()), none)})

    yield "turns that are none", turns, {}


def test_parquet_that_unfolds_to_gigabytes_is_refused_without_being_held(tmp_path: Path, tell: Any) -> None:
    """The kernel's limit holds, whatever the file says of itself, and a gigabyte that Arrow's allocator sets aside."""
    file = tmp_path / "rows.parquet"
    cases = [*bombs()][: trials(1, 4)]
    for name, made, options in cases:
        given = {"compression": "zstd", "store_schema": False} | options
        write = partial(lambda made, given: pq.write_table(made(), file, **given), made, given)
        watched(write, tmp_path)  # in a child: what it takes is not what is measured
        assert file.stat().st_size < MIB
        idle = watched(lambda: ACCEPTED, tmp_path).most_bytes
        seen = watched(lambda: read(file), tmp_path)
        assert seen.said == f"{file}: the rows after row 0 take more than 512 MiB to read", name
        assert seen.most_bytes - idle < DECODING_BYTES + 1024 * MIB, name
    tell(len(cases))


def test_rows_of_parquet_are_at_most_as_long_as_lines(tmp_path: Path, tell: Any) -> None:
    file = tmp_path / "rows.parquet"
    most, more = "x" * (LONGEST_ROW - 99), "x" * (LONGEST_ROW + 1)
    texts = pa.array([str(i) * 4000 for i in range(2000)])
    places = pa.DictionaryArray.from_arrays(pa.array(range(2000), pa.int32()), texts)
    turns = [{"role": "user", "content": most}] * 2
    for table, said in (
        (pa.table({"text": [most] * 3}), ACCEPTED),
        (pa.table({"text": places}), ACCEPTED),
        (pa.table({"text": ["a", more, "b"]}), "row 2: longer than 16 MiB"),
        (pa.Table.from_pylist([{"conversations": turns}]), "row 1: longer than 16 MiB"),
    ):
        watched(lambda table=table: pq.write_table(table, file, compression="zstd"), tmp_path)  # type: ignore[misc]
        idle = watched(lambda: ACCEPTED, tmp_path).most_bytes
        seen = watched(lambda: read(file), tmp_path)
        assert seen.said.removeprefix(f"{file}: ") == said
        assert seen.most_bytes - idle < 384 * MIB, said
    tell(4)


def talk(beside: pa.Array, name: str) -> pa.Table:
    """A conversation of one turn that has another field."""
    turns = pa.StructArray.from_arrays([pa.array(["user"]), pa.array(["q"]), beside], ["role", "content", name])
    return pa.table({"conversations": pa.ListArray.from_arrays([0, 1], turns)})


def test_tables_that_are_none_of_ours_are_named(tmp_path: Path, tell: Any) -> None:
    file = tmp_path / "rows.parquet"
    texts = pa.array(["a", "b"])
    ends, letters = pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0])), pa.py_buffer(b"\xff")
    no_text = pa.Array.from_buffers(pa.string(), 1, [None, ends, letters])
    wrong: dict[str, tuple[pa.Table, str]] = {
        "no row": (pa.table({"text": pa.array([], pa.string())}), "no rows"),
        "no column": (pa.table({}), "no rows"),
        "other columns": (pa.table({"question": texts}), "none of the known columns among question"),
        "numbers": (pa.table({"text": [1, 2]}), "row 1: `text` must be text, not a number"),
        "bytes": (pa.table({"text": [b"\xff", b"a"]}), "row 1: `text` must be text, not bytes"),
        "null": (pa.table({"text": pa.array(["a", None])}), "row 2: `text` must be text, not null"),
        "turns as texts": (pa.table({"conversations": texts}), "row 1: `conversations` must be a list of turns"),
        "texts that are no UTF-8": (pa.table({"text": no_text}), "row"),
        "dates": (pa.table({"text": pa.array([0], pa.timestamp("ns"))}), "row 1: `text` must be text"),
        "nanoseconds": (pa.table({"text": pa.array([1], pa.timestamp("ns"))}), "not a readable parquet file"),
        "spans of them": (pa.table({"text": pa.array([1], pa.duration("ns"))}), "not a readable parquet file"),
        "dates far away": (pa.table({"text": pa.array([2**62], pa.timestamp("us"))}), "not a readable parquet file"),
        "days far away": (pa.table({"text": pa.array([2**30], pa.date32())}), "not a readable parquet file"),
        "turns with nanoseconds": (talk(pa.array([1], pa.timestamp("ns")), "at"), "not a readable parquet file"),
        "turns with a field twice": (talk(pa.array(["q"]), "content"), "not a readable parquet file"),
    }  # fmt: skip
    for name, (table, expected) in wrong.items():
        pq.write_table(table, file)
        said = watched(lambda: read(file), tmp_path).said
        assert str(file) in said, (name, said)
        assert expected in said, (name, said)
    for name, content in {"empty": b"", "text": GOOD, "magic alone": b"PAR1PAR1", "another's": b"ORC" * 99}.items():
        file.write_bytes(content)
        assert watched(lambda: read(file), tmp_path).said.startswith(f"{file}: not a readable parquet file"), name
    for hidden in (False, True):
        encrypted(file, pa.table({"text": texts}), footer=hidden)
        assert file.read_bytes()[:4] == (b"PARE" if hidden else b"PAR1")
        said = watched(lambda: read(file), tmp_path).said
        assert said.startswith(f"{file}: not a readable parquet file"), said
        assert "crypt" in said
    tell(len(wrong) + 6)


def encrypted(file: Path, table: pa.Table, *, footer: bool) -> None:
    """Write a table of which the columns are encrypted, and the footer too."""
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Keys(encryption.KmsClient):  # type: ignore[misc, name-defined]
        def wrap_key(self, key: bytes, _master: str) -> bytes:
            return base64.b64encode(key)

    made = encryption.CryptoFactory(lambda _: Keys()).file_encryption_properties(
        encryption.KmsConnectionConfig(),
        encryption.EncryptionConfiguration(
            footer_key="footer", column_keys={"column": table.column_names}, plaintext_footer=not footer
        ),
    )
    with pq.ParquetWriter(file, table.schema, encryption_properties=made) as writer:
        writer.write_table(table)


def whole_errand(home: Path, folder: Path, **changes: Any) -> Preprocess:
    given = {
        "model": str(home / "model"), "tokenizer": None, "dropout": None, "freeze": (),
        "data": (str(home / "data.jsonl"),), "validation": (), "validation_split": None, "stage": None,
        "max_seq_len": 64, "max_target_len": 64, "limit": None, "show": 0, "cache_dir": str(folder / "cache"),
    }  # fmt: skip
    return Preprocess(**(given | changes))


def open_model(model: Path, home: Path, folder: Path) -> str:
    """Do with a model all that a plan and a training do to open it; return what is said where it is refused."""
    import torch

    from autotune.plan import Workload

    try:
        summary = summarise(str(model), None, None)
        load_tokenizer(str(model))
        preprocess(whole_errand(home, folder, model=str(model)), lambda *_: None)
        work: Workload = workload(
            "llama", model=str(model), vocabulary_size=summary.vocabulary_size, attention=summary.attention
        )
        build_for(work, None, torch.device("cpu"))
    except UserError as error:
        return f"{error.message}; hint: {error.hint}"
    return ACCEPTED


def stranger_of(home: Path, tmp_path: Path) -> Path:
    """A model as it should be, with programs beside it."""
    model = tmp_path / "stranger"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(home / "model", model)
    code = f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n"
    for name in ("evil.py", "__init__.py", "modeling_llama.py", "tokenization_evil.py", "../evil.py"):
        (model / name).write_text(code)
    return model


def held(seen: Witnessed, tmp_path: Path, name: str) -> None:
    """It did not crash, ran nothing, wrote nothing outside, and held little."""
    assert seen.code == 0, (name, seen)
    assert seen.seen == [], (name, seen.seen)
    assert not (tmp_path / "canary").exists(), name
    assert isinstance(seen.said, str), name
    assert "Traceback" not in seen.said


def test_the_witness_sees_what_it_is_there_for(tmp_path: Path, tell: Any) -> None:
    """Each kind of payload, opened by what would run it, is seen, in a child's child too; else nothing is proven."""
    import pickle

    (_, content), *_ = pickles(tmp_path / "canary")
    assert any(
        "os.system" in seen or "pickle" in seen for seen in watched(lambda: pickle.loads(content), tmp_path).seen
    )
    assert (tmp_path / "canary").exists()
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        save_file({}, folder / "a.safetensors")
    (inside / "link").symlink_to(outside)
    changes: dict[str, Callable[[Path], Any]] = {
        "wrote": lambda folder: (folder / "new").write_text("x"),
        "os.mkdir": lambda folder: (folder / "folder").mkdir(),
        "os.rename": lambda folder: (folder / "new").rename(folder / "old"),
        "os.symlink": lambda folder: (folder / "name").symlink_to("/"),
        "os.remove": lambda folder: (folder / "old").unlink(),
        "os.chmod": lambda folder: (folder / "folder").chmod(0o700),
        "os.rmdir": lambda folder: (folder / "folder").rmdir(),
    }
    for event, change in changes.items():
        assert watched(lambda change=change: change(inside), inside).seen == []  # type: ignore[misc]
        seen = watched(lambda change=change: in_a_child(lambda: change(outside)), inside).seen  # type: ignore[misc]
        assert seen, event
        assert all(line.startswith(f"{event} {outside}/") for line in seen), seen
    assert watched(lambda: (inside / "link" / "x").write_text("x"), inside).seen == [f"wrote {outside / 'x'}"]
    assert watched(lambda: len(load_file(outside / "a.safetensors")), inside, None, outside).seen == [
        "opened a.safetensors"
    ]
    assert watched(lambda: (outside / "a.safetensors").resolve().stat().st_size, inside, None, outside).seen == []
    (tmp_path / "evil.py").write_text("x = 1")
    run = lambda: exec(compile("x = 1", str(tmp_path / "evil.py"), "exec"))  # noqa: E731
    assert watched(run, tmp_path, tmp_path).seen != []
    idle = watched(lambda: ACCEPTED, tmp_path).most_bytes
    assert watched(lambda: in_a_child(lambda: b"x" * 300 * MIB), tmp_path).most_bytes - idle > 250 * MIB
    tell(5 + len(changes))


def in_a_child(work: Callable[[], Any]) -> None:
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    os.waitpid(child, 0)


def test_a_model_as_it_should_be_is_opened(home: Path, tmp_path: Path, tell: Any) -> None:
    model = stranger_of(home, tmp_path)
    seen = watched(lambda: open_model(model, home, tmp_path), tmp_path / "cache", model)
    held(seen, tmp_path, "")
    assert seen.said == ACCEPTED
    tell(1)


def test_pickles_offered_as_weights_are_refused_with_the_way_to_convert(home: Path, tmp_path: Path, tell: Any) -> None:
    cases = some([*pickles(tmp_path / "canary")], 8)
    for name, content in cases:
        model = stranger_of(home, tmp_path)
        (model / "model.safetensors").unlink()
        (model / name).write_bytes(content)
        for offered in (model, model / name):
            seen = watched(lambda offered=offered: open_model(offered, home, tmp_path), tmp_path / "cache", model)  # type: ignore[misc]
            held(seen, tmp_path, name)
            assert str(model) in seen.said, seen.said
            if name != "model.safetensors" or offered != model:
                assert "chatlm import" in seen.said, (name, seen.said)
    tell(len(cases))


def test_a_configuration_that_asks_for_code_or_cannot_be_is_refused_or_not_heeded(
    home: Path, tmp_path: Path, tell: Any
) -> None:
    cases = some([*configurations()], 24)
    for name, asked in cases:
        model = stranger_of(home, tmp_path)
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | asked))
        seen = watched(lambda model=model: open_model(model, home, tmp_path), tmp_path / "cache", model)  # type: ignore[misc]
        held(seen, tmp_path, name)
        assert seen.said == ACCEPTED or str(model) in seen.said, (name, seen.said)
    tell(len(cases))


def test_a_part_of_a_configuration_is_looked_into_and_its_kernels_are_not_heeded(
    home: Path, tmp_path: Path, tell: Any
) -> None:
    """Of a model that sees too: its parts have configurations of their own."""
    asked = {"_attn_implementation_internal": "stranger/kernel", "_attn_implementation": "stranger/kernel"}
    cases = (
        ("git", "vision_config", asked, "weights are missing"),
        ("git", "vision_config", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000"),
        ("gemma3", "text_config", asked, "a model of type gemma3 is not one of text alone"),
    )
    for kind, part, given, expected in cases:
        model = stranger_of(home, tmp_path)
        file = model / "config.json"
        whole = json.loads(file.read_text()) if kind == "git" else {}
        file.write_text(json.dumps(whole | {"model_type": kind, part: given}))
        seen = watched(lambda model=model: open_model(model, home, tmp_path), tmp_path / "cache", model)  # type: ignore[misc]
        held(seen, tmp_path, kind)
        assert expected in seen.said, (kind, seen.said)
        assert getattr(AutoConfig.from_pretrained(model), part)._attn_implementation is None
    tell(len(cases))


def test_a_tokenizer_s_configuration_that_asks_for_code_is_refused_or_not_heeded(
    home: Path, tmp_path: Path, tell: Any
) -> None:
    cases = [
        {"auto_map": {"AutoTokenizer": [module, module]}, "tokenizer_class": kind}
        for module in ("evil.Evil", "tokenization_evil.Evil", "../evil.Evil", "stranger/repository--evil.Evil")
        for kind in ("Evil", "LlamaTokenizer", "PreTrainedTokenizerFast")
    ]
    cases += [case | {"trust_remote_code": True} for case in cases] + [{"auto_map": "evil.Evil"}, {"auto_map": []}]
    chosen = some(cases, 6)
    for asked in chosen:
        model = stranger_of(home, tmp_path)
        file = model / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | asked))
        seen = watched(lambda model=model: open_model(model, home, tmp_path), tmp_path / "cache", model)  # type: ignore[misc]
        held(seen, tmp_path, str(asked))
        assert seen.said == ACCEPTED or str(model) in seen.said, (asked, seen.said)
    tell(len(chosen))


def test_chat_templates_do_not_leave_their_sandbox(home: Path, tmp_path: Path, tell: Any) -> None:
    cases = some([*templates(tmp_path / "canary")], 12)
    for name, text in cases:
        model = stranger_of(home, tmp_path)
        (model / "chat_template.jinja").write_text(text)
        seen = watched(lambda model=model: open_model(model, home, tmp_path), tmp_path / "cache", model)  # type: ignore[misc]
        held(seen, tmp_path, name)
        assert seen.said != ACCEPTED, name
    tell(len(cases))


def test_chat_templates_that_would_take_all_time_or_memory_are_ended(home: Path, tmp_path: Path, tell: Any) -> None:
    cases = some(BOMBS, 4)
    for text in cases:
        model = stranger_of(home, tmp_path)
        (model / "chat_template.jinja").write_text(text)
        idle = watched(lambda: ACCEPTED, tmp_path).most_bytes
        seen = watched(lambda model=model: open_model(model, home, tmp_path), tmp_path / "cache", model)  # type: ignore[misc]
        held(seen, tmp_path, text)
        assert seen.said != ACCEPTED, text
        assert seen.most_bytes - idle < CHILD_BYTES + 128 * MIB, text
        assert seen.seconds < 60, text
    tell(len(cases))


def in_pieces(model: Path, shards: dict[str, Path]) -> None:
    """Have an index name these shards, which lie where their paths say, for the whole of a model's weights."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {shard: names[i :: len(shards)] for i, shard in enumerate(shards)}
    for shard, place in shards.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: weights[name] for name in parts[shard]}, place, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in parts.items() for name in part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def test_names_and_links_that_leave_a_folder_reach_nothing(home: Path, tmp_path: Path, tell: Any) -> None:
    """With weights beside that are whole and safe: what is refused is the way, and nothing there is opened."""
    elsewhere = tmp_path / "elsewhere"
    away = elsewhere / "a.safetensors"
    count = 0
    for shard in ("../elsewhere/a.safetensors", str(away), "sub/../../elsewhere/a.safetensors", "link/a.safetensors"):
        model = stranger_of(home, tmp_path)
        shutil.copy(model / "model.safetensors", model / "decoy.safetensors")
        (model / "sub").mkdir()
        (model / "link").symlink_to(elsewhere)
        in_pieces(model, {"b.safetensors": model / "b.safetensors", shard: away})
        for index in ("model.safetensors.index.json", "other.safetensors.index.json"):
            (model / "model.safetensors.index.json").rename(model / index)
            config = json.loads((home / "model" / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(config | {"transformers_weights": index}))
            refused_unopened(model, home, tmp_path, elsewhere)
            count += 1
            (model / index).rename(model / "model.safetensors.index.json")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        model = stranger_of(home, tmp_path)
        elsewhere.mkdir(exist_ok=True)
        (model / name).touch()
        shutil.move(model / name, elsewhere / name)
        (model / name).symlink_to(elsewhere / name)
        refused_unopened(model, home, tmp_path, elsewhere)
        count += 1
    tell(count)


def refused_unopened(model: Path, home: Path, tmp_path: Path, elsewhere: Path) -> None:
    seen = watched(lambda: open_model(model, home, tmp_path), tmp_path / "cache", model, elsewhere)
    held(seen, tmp_path, str(model))
    assert f"leads out of this folder, to {elsewhere}" in seen.said, seen.said
    assert seen.said.startswith(f"{model}: ")


def bring(file: Path, folder: Path) -> str:
    """Import weights; return what is said where they are refused."""
    try:
        import_model(Import(source=str(file), output=str(folder), tokenizer=None, heads=None), lambda _: None)
    except UserError as error:
        return f"{error.message}; hint: {error.hint}"
    return ACCEPTED


def test_weights_that_are_programs_are_refused_and_run_nothing(tmp_path: Path, tell: Any) -> None:
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
    cases = [*pickles(tmp_path / "canary"), *pickled_weights(tmp_path / "canary")]
    chosen = some(cases, 20)
    for name, content in chosen:
        file = tmp_path / "in" / name
        file.write_bytes(content)
        seen = watched(lambda file=file: bring(file, tmp_path / "out" / "new"), tmp_path / "out", file.parent)  # type: ignore[misc]
        held(seen, tmp_path, name)
        assert str(file) in seen.said, (name, seen.said)
        assert "weights_only" not in seen.said, "torch's advice to run it"
        assert not (tmp_path / "out" / "new").exists()
        file.unlink()
    tell(len(chosen))


def test_an_index_that_is_none_or_names_pickles_is_refused(home: Path, tmp_path: Path, tell: Any) -> None:
    (_, content), *_ = pickles(tmp_path / "canary")
    maps: tuple[tuple[object, str], ...] = (
        ({"a": "b.bin"}, "names 'b.bin', and only safetensors are read"),
        ({"a": "b\0.safetensors"}, "only safetensors are read"),
        ({"a": 5}, "not an index of weights"),
        (["b"], "not an index of weights"),
        (None, "not an index of weights"),
        ({}, "its weights do not load"),
    )
    for weights, expected in maps:
        model = stranger_of(home, tmp_path)
        (model / "model.safetensors").rename(model / "decoy.safetensors")
        (model / "b.bin").write_bytes(content)
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
        seen = watched(lambda model=model: open_model(model, home, tmp_path), tmp_path / "cache", model)  # type: ignore[misc]
        held(seen, tmp_path, str(weights))
        assert seen.said.startswith(str(model)), seen.said
        assert expected in seen.said, seen.said
    tell(len(maps))


def test_links_to_the_blobs_of_a_hub_s_cache_are_the_files_themselves(home: Path, tmp_path: Path, tell: Any) -> None:
    whole = stranger_of(home, tmp_path)
    in_pieces(whole, {name: whole / name for name in ("a.safetensors", "b.safetensors")})
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(file for file in whole.iterdir() if file.suffix != ".py"):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    (tmp_path / "linked").symlink_to(snapshot)
    for model in (whole, snapshot, tmp_path / "linked"):
        seen = watched(lambda model=model: open_model(model, home, tmp_path), tmp_path / "cache", whole)  # type: ignore[misc]
        held(seen, tmp_path, str(model))
        assert seen.said == ACCEPTED, seen.said
    tell(3)


def test_hostile_rows_are_tokenized_or_named(home: Path, tmp_path: Path, tell: Any) -> None:
    """All that is read, tokenized too; what is not is refused by the same words."""

    def judge() -> dict[str, str]:
        said = {}
        for name, (line, _) in chosen:
            file.write_bytes(GOOD + b"\n" + line.removeprefix(codecs.BOM_UTF8) + b"\n")
            try:
                preprocess(whole_errand(home, tmp_path, data=(str(file),)), lambda *_: None)
                said[name] = ACCEPTED
            except UserError as error:
                said[name] = error.message
        return said

    file, chosen = tmp_path / "rows.jsonl", some([*LINES.items()], 20)
    seen = watched(judge, tmp_path)
    assert (seen.code, seen.seen) == (0, [])
    for name, said in seen.said.items():
        expected = NOTHING_TO_TRAIN.get(name, LINES[name][1])
        assert said == ACCEPTED if expected == ACCEPTED else f"{file}: line 2" in said and expected in said, (
            name,
            said,
        )
    tell(len(seen.said))


NOTHING_TO_TRAIN = {"a system turn alone": "no assistant turn"}
"""What is a row, and still no sample."""


def test_the_command_shows_what_a_hostile_row_is_called_and_no_more(home: Path, tmp_path: Path, tell: Any) -> None:
    names = ["a column that rings and clears", "columns of 15 megabytes", "a column that is half a character"]
    chosen = names[: trials(1, 3)]
    for name in chosen:
        file = tmp_path / "rows.jsonl"
        file.write_bytes(GOOD + b"\n" + LINES[name][0] + b"\n")
        done = Command(tmp_path, home)("plan", "--data", file)
        refused(done, 3, f"{file}: line 2: none of the known columns")
        assert "\x1b" not in done.stderr
        assert "\x07" not in done.stderr
        assert len(done.stderr) < 3000
    tell(len(chosen))


def test_commands_that_are_printed_run_as_they_were_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tell: Any
) -> None:
    """What is on the screen, given to a shell, is the same words, whatever files are called; nothing else is run."""
    shown = (":fire:", "a:fire:b", "[bold]a[/]", "[/]", "a\x08b", "a\x0b\x0cb", "a\tb'\\", "a\udcffb", "\u3000")
    names = [*shown, *file_names(trials(60, 200) - len(shown))]
    for name in names:
        given = {"data": [name, "b.jsonl"], "output_dir": name, "tokenizer": name}
        words = ["chatlm", "train", "--auto", *as_arguments(given)]
        print_plan(facts.plan(), facts.preprocessed(), None, words)
        show_command(err, "go on with:", words)
        printed = capsys.readouterr()
        for line in (printed.out.partition("Train it:")[2], printed.err.partition("go on with:")[2]):
            assert line.count("\n") == 1
            program = f"words() {{ printf '%s\\0' \"$@\"; }}; words {line}"
            done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True)
            assert os.fsdecode(done.stdout).split("\0")[:-1] == words, name
    assert list(tmp_path.iterdir()) == []
    tell(len(names))


def test_folders_of_data_are_what_lies_in_them(tmp_path: Path, tell: Any) -> None:
    """A link to itself ends; a link to a file is that file; a name that is a folder is no file."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(GOOD)
    (folder / "loop").symlink_to(folder)
    (folder / "b.jsonl").mkdir()
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    assert find_files([str(folder)]) == [folder / "a.jsonl"]
    with pytest.raises(DataError, match="no such file"):
        find_files([str(folder / "gone.jsonl")])
    tell(4)


def test_records_with_nothing_to_train_on_or_beyond_the_vocabulary_are_told(
    home: Path, tmp_path: Path, tell: Any
) -> None:
    def prepared(rows: list[dict[str, Any]], **changes: Any) -> str:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        try:
            made = preprocess(whole_errand(home, tmp_path, data=(str(file),), **changes), lambda *_: None)
        except (ConfigurationError, DataError) as error:
            return error.message
        assert made.data is not None
        return json.dumps(made.data.cuts)

    turns = [{"role": "user", "content": "q"}]
    assert "no assistant turn" in prepared([{"conversations": turns}])
    assert "no rows" in prepared([])
    assert "no answers to train on" in prepared([{"prompt": "q", "response": "a"}, {"text": "document"}])
    long = prepared([{"prompt": "q", "response": "long " * 200_000}])
    assert json.loads(long)["answer_cut"] == 1
    small = tmp_path / "small"
    shutil.copytree(home / "model", small)
    file = small / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 100}))
    assert "tokens, the model in" in prepared([{"prompt": "q", "response": "a"}], model=str(small))
    tell(5)
