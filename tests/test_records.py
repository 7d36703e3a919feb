"""Rows of files: the same records whatever the format, and a sentence with file and row for whatever is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autotune.errors import DataError
from trainer.records import Record, Turn, demo_files, demo_records, find_files, parse, read_blocks, read_records

Row = dict[str, Any]

SHAPES: dict[str, tuple[list[Row], list[Record]]] = {
    "pairs": (
        [{"prompt": "问", "response": "答"}, {"prompt": "a\nb", "response": ""}],
        [
            Record("", (Turn("user", "问"), Turn("assistant", "答"))),
            Record("", (Turn("user", "a\nb"), Turn("assistant", ""))),
        ],
    ),
    "conversations": (
        [
            {"conversations": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]},
            {"conversations": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "😀"}]},
        ],
        [
            Record("", (Turn("system", "s"), Turn("user", "q"))),
            Record("", (Turn("user", "你好"), Turn("assistant", "😀"))),
        ],
    ),
    "instructions": (
        [
            {"instruction": "sum", "input": "1 2", "output": "3"},
            {"instruction": "greet", "input": "", "output": "hi"},
            {"instruction": "part", "input": None, "output": "bye"},
        ],
        [
            Record("", (Turn("user", "sum\n1 2"), Turn("assistant", "3"))),
            Record("", (Turn("user", "greet"), Turn("assistant", "hi"))),
            Record("", (Turn("user", "part"), Turn("assistant", "bye"))),
        ],
    ),
    "instructions without input": (
        [{"instruction": "greet", "output": "hi"}],
        [Record("", (Turn("user", "greet"), Turn("assistant", "hi")))],
    ),
    "documents": (
        [{"text": "one\ntwo"}, {"text": ""}],
        [Record("", text="one\ntwo"), Record("", text="")],
    ),
    "columns beside": (
        [{"id": 1, "prompt": "q", "response": "a", "score": 0.5}],
        [Record("", (Turn("user", "q"), Turn("assistant", "a")))],
    ),
}


def write(file: Path, rows: list[Row], **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, **options)
    else:
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def contents(records: list[Record]) -> list[tuple[tuple[Turn, ...], str | None]]:
    return [(record.turns, record.text) for record in records]


def texts(*paths: Path, limit: int | None = None) -> list[str | None]:
    return [record.text for record in read_records(find_files([str(path) for path in paths]), limit)]


def refusal(*paths: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        texts(*paths)
    return caught.value


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_gives_the_same_record_from_parquet_and_jsonl(tmp_path: Path, shape: str, ending: str) -> None:
    rows, expected = SHAPES[shape]
    records = list(read_records([write(tmp_path / f"x{ending}", rows)]))
    assert contents(records) == contents(expected)
    unit = "row" if ending == ".parquet" else "line"
    assert [r.place for r in records] == [f"{tmp_path / 'x'}{ending}: {unit} {i}" for i, _ in enumerate(rows, 1)]


def test_files_are_read_in_the_order_given_and_a_folder_by_its_names(tmp_path: Path) -> None:
    first = write(tmp_path / "z.jsonl", [{"text": "1"}])
    write(tmp_path / "folder/b.parquet", [{"text": "4"}, {"text": "5"}])
    write(tmp_path / "folder/a/y.jsonl", [{"text": "2"}])
    write(tmp_path / "folder/a/z.jsonl", [{"text": "3"}])
    (tmp_path / "folder/README.md").write_text("not data")
    last = write(tmp_path / "a.parquet", [{"text": "6"}])
    assert texts(first, tmp_path / "folder", last, first) == ["1", "2", "3", "4", "5", "6", "1"]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9])
def test_the_limit_counts_rows_over_all_files(tmp_path: Path, limit: int) -> None:
    one = write(tmp_path / "1.parquet", [{"text": "a"}, {"text": "b"}])
    two = write(tmp_path / "2.jsonl", [{"text": "c"}, {"text": "d"}])
    assert texts(one, two, limit=limit) == ["a", "b", "c", "d"][:limit]


def test_rows_after_the_limit_are_not_judged(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "x.jsonl", [{"text": "a"}, {"text": 1}]), limit=1) == ["a"]


def test_rows_of_different_shapes_may_share_a_file(tmp_path: Path) -> None:
    rows = [SHAPES[shape][0][0] for shape in ("pairs", "documents", "conversations")]
    expected = [SHAPES[shape][1][0] for shape in ("pairs", "documents", "conversations")]
    assert contents(list(read_records([write(tmp_path / "x.jsonl", rows)]))) == contents(expected)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    "body",
    [
        b'{"text": "a"}\n{"text": "b"}\n',
        b'{"text": "a"}\n{"text": "b"}',
        b'{"text": "a"}\r\n{"text": "b"}\r\n',
        b'\n  \n{"text": "a"}\n\t\n\r\n{"text": "b"}\n\n',
    ],
)
def test_blank_lines_a_byte_order_mark_and_line_ends_do_not_matter(tmp_path: Path, mark: bytes, body: bytes) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(mark + body)
    assert texts(file) == ["a", "b"]


def test_a_line_break_inside_a_text_is_no_end_of_a_line(tmp_path: Path) -> None:
    text = "a\x0bb\x0c\x1c\x85\u2028\u2029c"
    assert texts(write(tmp_path / "x.jsonl", [{"text": text}])) == [text]


@pytest.mark.parametrize("row_group_size", [100, 1024, 5000])
def test_rows_of_parquet_are_counted_over_its_pieces(tmp_path: Path, row_group_size: int) -> None:
    rows: list[Row] = [{"text": str(i)} for i in range(2500)]
    rows[2100]["text"] = None
    file = write(tmp_path / "x.parquet", rows, row_group_size=row_group_size)
    assert [r.text for r in islice(read_records([file]), 2100)] == [str(i) for i in range(2100)]
    assert refusal(file).message == f"{file}: row 2101: `text` must be text, not null"


BAD_ROWS: dict[str, tuple[Row, str]] = {
    "wrong columns": ({"question": "q", "answer": "a"}, "none of the known columns among question, answer"),
    "half a pair": ({"prompt": "q"}, "none of the known columns among prompt"),
    "number": ({"text": 3}, "`text` must be text, not a number"),
    "truth": ({"text": True}, "`text` must be text, not true or false"),
    "null": ({"prompt": None, "response": "a"}, "`prompt` must be text, not null"),
    "null answer": ({"prompt": "q", "response": None}, "`response` must be text, not null"),
    "object": ({"instruction": {"a": 1}, "output": "a"}, "`instruction` must be text, not an object"),
    "input": ({"instruction": "i", "input": ["x"], "output": "a"}, "`input` must be text, not a list"),
    "conversation of text": ({"conversations": "hi"}, "`conversations` must be a list of turns, not text"),
    "no conversation": ({"conversations": None}, "`conversations` must be a list of turns, not null"),
    "empty conversation": ({"conversations": []}, "`conversations` must be a list of turns, not an empty list"),
    "turn that is no object": (
        {"conversations": ["hi"]},
        "turn 1: an object with `role` and `content` was expected, not text",
    ),
    "turn that is null": (
        {"conversations": [None]},
        "turn 1: an object with `role` and `content` was expected, not null",
    ),
    "turn of other keys": (
        {"conversations": [{"from": "human", "value": "hi"}]},
        "turn 1: an object with `role` and `content` was expected, not one with from, value",
    ),
    "unknown role": (
        {"conversations": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]},
        "turn 2: role 'bot' is not one of system, user, assistant",
    ),
    "null content": (
        {"conversations": [{"role": "user", "content": None}]},
        "turn 1: `content` must be text, not null",
    ),
}


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_row_that_is_not_what_it_promises_is_named(tmp_path: Path, bad: str, ending: str) -> None:
    row, fact = BAD_ROWS[bad]
    error = refusal(write(tmp_path / f"x{ending}", [row]))
    assert error.message.startswith(f"{tmp_path / 'x'}{ending}: ")
    assert error.message.endswith(fact)
    # Wrong columns of a parquet file are wrong in all its rows.
    if not (ending == ".parquet" and bad == "wrong columns"):
        assert re.search(r": (row|line) 1[:,] ", error.message)


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "broken": (b'{"text": "b"', "not JSON: "),
    "two objects": (b'{"text": "b"} {"text": "c"}', "not JSON: "),
    "list": (b'["a", "b"]', "an object was expected, not a list"),
    "text": (b'"a"', "an object was expected, not text"),
    "number": (b"7.5", "an object was expected, not a number"),
    "null": (b"null", "an object was expected, not null"),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), "not UTF-8 at byte 11"),
    "gb18030": ('{"text": "你"}'.encode("gb18030"), "not UTF-8 at byte 11"),
    "utf-16": ('{"text": "b"}'.encode("utf-16-le"), "not JSON: "),
    "huge number": (b'{"text": ' + b"1" * 5000 + b"}", "not JSON: "),
    "deep": (b"[" * 100_000, "not JSON: "),
    "half a character": (rb'{"text": "ab\ud83d"}', "`text` is not text at character 3: surrogates not allowed"),
    "empty object": (b"{}", "none of the known columns among none"),
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, bad: str) -> None:
    line, fact = BAD_LINES[bad]
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    records = read_records([file])
    assert next(records).text == "a"
    with pytest.raises(DataError) as caught:
        next(records)
    assert caught.value.message.startswith(f"{file}: line 3: {fact}")


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def without_its_footer(data: bytes) -> bytes:
    return data[:-100]


def with_damaged_pages(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 200]) + data[middle + 200 :]


@pytest.mark.parametrize(
    "damage", [truncated, without_its_footer, with_damaged_pages, lambda _: b"", lambda _: b'{"text": "a"}\n']
)
def test_a_damaged_parquet_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    rows = [{"text": f"{i} {i * i} " * 50} for i in range(5000)]
    file = write(tmp_path / "x.parquet", rows, row_group_size=1000, use_dictionary=False)
    file.write_bytes(damage(file.read_bytes()))
    assert re.match(re.escape(f"{file}: not a readable parquet file after row ") + r"\d+: .", refusal(file).message)


def test_parquet_text_that_is_not_utf_8_is_an_error_of_the_file(tmp_path: Path) -> None:
    offsets, data = pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 1, [None, offsets, data])}), file)
    assert refusal(file).message.startswith(f"{file}: not a readable parquet file after row 0: 'utf-8' codec")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_jsonl_file_without_rows_is_an_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    assert refusal(file).message == f"{file}: no rows"


def test_a_parquet_file_without_rows_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), file)
    assert refusal(file).message == f"{file}: no rows"


def test_a_file_that_is_not_there_is_named_with_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": "a"}])
    error = refusal(tmp_path / "trian.jsonl")
    assert error.message == f"{tmp_path / 'trian.jsonl'}: no such file"
    assert error.hint == f"{tmp_path} has train.jsonl"
    nowhere = refusal(tmp_path / "no/where.jsonl")
    assert nowhere.hint == f"folder {tmp_path / 'no'} has no data files"


def test_a_folder_without_data_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert refusal(tmp_path).message == f"{tmp_path}: no .parquet or .jsonl file in this folder"


@pytest.mark.parametrize(("name", "kind"), [("x.csv", "'.csv'"), ("x.json", "'.json'"), ("x", "'without an ending'")])
def test_another_kind_of_file_is_an_error(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text("x")
    error = refusal(tmp_path / name)
    assert error.message == f"{tmp_path / name}: files of type {kind} are not read"
    assert "parquet or jsonl" in error.hint


def test_demo_dialogues_go_to_and_fro(tmp_path: Path) -> None:
    pytest.importorskip("chatterbot_corpus")
    records = list(demo_records(demo_files()))
    assert len(records) > 100
    for record in records:
        assert [turn.role for turn in record.turns] == ["user", "assistant"] * (len(record.turns) // 2)
        assert record.turns
        assert all(turn.content for turn in record.turns)
    assert len({record.place for record in records}) == len(records)


def test_a_question_without_an_answer_is_left_out_of_a_dialogue(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    file = tmp_path / "x.yml"
    file.write_text("conversations:\n- [q1, a1, q2]\n- [alone]\n- [1, 2.5]\n", encoding="utf-8")
    assert list(demo_records([file])) == [
        Record("x.yml: dialogue 1", (Turn("user", "q1"), Turn("assistant", "a1"))),
        Record("x.yml: dialogue 3", (Turn("user", "1"), Turn("assistant", "2.5"))),
    ]


def test_every_row_of_the_real_files_is_read(real_data: Path) -> None:
    counts = {
        "chatlm_mini/my_valid_dataset_1k.parquet": 1000,
        "dialogue/chitchat_400.jsonl": 400,
        "dialogue/alpaca_zh_en_2k.jsonl": 1999,
        "dialogue/pretrain_docs.jsonl": 330,
    }
    for name, rows in counts.items():
        assert sum(1 for _ in read_records([real_data / name])) == rows, name


def test_a_file_that_went_away_is_an_error_with_its_name(tmp_path: Path) -> None:
    for name in ("gone.jsonl", "gone.parquet"):
        with pytest.raises(DataError, match=rf"{name}: .*No such file"):
            list(read_records([tmp_path / name]))


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("skip", "limit"), [(0, 3000), (1, 2999), (1023, 1500), (1024, None), (1500, 2050), (3000, None)]
)
def test_rows_from_any_on_are_those_of_the_whole_with_their_places(
    tmp_path: Path, ending: str, skip: int, limit: int | None
) -> None:
    file = write(tmp_path / f"x{ending}", [{"text": str(i)} for i in range(3000)])
    if ending == ".jsonl":  # each row after a blank line
        file.write_bytes(b"\n" + file.read_bytes().replace(b"\n", b"\n\n"))
    rows = [record for block in read_blocks([file], limit, skip) for record in parse(block)]
    step, word = (2, "line") if ending == ".jsonl" else (1, "row")
    numbers = range(3000)[skip:limit]
    assert [(r.text, r.place) for r in rows] == [(str(i), f"{file}: {word} {step * (i + 1)}") for i in numbers]


def test_what_is_held_does_not_grow_with_a_parquet_file(tmp_path: Path) -> None:
    letters = np.random.default_rng(0).integers(97, 123, (20_000, 100), np.uint8)
    text = pa.table({"text": [row.tobytes().decode() for row in letters]})
    held = []
    for groups in (2, 20):
        pq.write_table(pa.concat_tables([text] * groups), tmp_path / "a.parquet", row_group_size=20_000)
        before = pa.total_allocated_bytes()
        held.append(max(pa.total_allocated_bytes() - before for _ in read_blocks([tmp_path / "a.parquet"])))
    assert held[1] < held[0] + text.nbytes
