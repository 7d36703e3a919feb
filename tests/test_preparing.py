"""Rows as people have them become clean parquet; what is none is named, and nothing of it is lost."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.errors import ConfigurationError, DataError
from trainer.preparing import Kind, Prepared, Side, prepare
from trainer.records import held_out, read_records

HI = {"role": "user", "content": "Hi?"}
HELLO = {"role": "assistant", "content": "Hello."}


def prepared(file: Path, out: Path, kind: Kind | None = None, limit: int | None = None) -> Prepared:
    return prepare([str(file)], [Side(out, 1.0)], kind, limit, lambda *_: None)


def lines(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("row", "made"),
    [
        ({"prompt": "Hi?", "response": "Hello.", "id": 7}, {"prompt": "Hi?", "response": "Hello."}),
        ({"question": "Hi?", "answer": "Hello."}, {"prompt": "Hi?", "response": "Hello."}),
        ({"instruction": "Say", "input": "Hi?", "output": "Hello."}, {"prompt": "Say\nHi?", "response": "Hello."}),
        ({"text": "Once."}, {"text": "Once."}),
        ({"messages": [HI, HELLO]}, {"conversations": [HI, HELLO]}),
        (
            {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
            {"conversations": [HI, HELLO]},
        ),
        (
            {"system": "Be kind.", "history": [["Hi?", "Hello."]], "instruction": "Hi?", "output": "Hello."},
            {"conversations": [{"role": "system", "content": "Be kind."}, HI, HELLO, HI, HELLO]},
        ),
        (
            {"conversations": [HELLO, HI, HELLO, HI]},
            {"conversations": [HI, HELLO]},
        ),
        (
            {"system": "Be kind.", "conversations": [HI, HELLO]},
            {"conversations": [{"role": "system", "content": "Be kind."}, HI, HELLO]},
        ),
        (
            {"conversations": [{"role": "system", "content": " "}, HI, HELLO], "system": "Not this."},
            {"conversations": [HI, HELLO]},
        ),
        (
            {"prompt": "Hi?", "response": "Hello.", "history": [["Hi?", "Hello."]]},
            {"conversations": [HI, HELLO, HI, HELLO]},
        ),
        (
            {"instruction": "Hi?", "input": "", "output": "Hello.", "history": "[]", "system": ""},
            {"prompt": "Hi?", "response": "Hello."},
        ),
    ],
)
def test_rows_by_any_of_their_usual_names_become_those_that_are_trained_on(
    row: dict[str, Any], made: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.parquet"
    prepared(lines(tmp_path, row), out)
    assert pq.read_table(out).to_pylist() == [made]
    assert len(list(read_records([out]))) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.parquet", "rows.jsonl"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "array.json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    rows = [{"prompt": f'问题 {i}\nwith, "two" lines?', "response": f"Answer {i}."} for i in range(5000)]
    file = tmp_path / f"rows.{suffix}"
    match suffix:
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        case "csv":
            with file.open("w", newline="", encoding="utf-8-sig") as opened:
                writer = csv.DictWriter(opened, ["prompt", "response"])
                writer.writeheader()
                writer.writerows(rows)
        case "array.json":
            file.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
        case _:
            file.write_text("\n".join(json.dumps(row) for row in rows))
    made = prepared(file, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == rows
    assert (made.rows, made.cleaned, made.rejected, made.rejects) == (5000, {}, {}, None)


def test_what_is_cleaned_is_told_rule_by_rule_with_its_first_place(tmp_path: Path) -> None:
    file = lines(
        tmp_path,
        {"prompt": "Whole?", "response": "Yes."},
        {"prompt": " \ufeffA\r\nB\x07? ", "response": "cafe\u0301[EOS]"},
        {"prompt": "C?\r\n", "response": "D.</s> <|im_end|>\n"},
    )
    made = prepared(file, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").to_pylist()[1:] == [
        {"prompt": "A\nB?", "response": "café"},
        {"prompt": "C?", "response": "D."},
    ]
    told = {rule: (one.rows, one.first.rsplit(" ", 1)[1]) for rule, one in made.cleaned.items()}
    assert told == {
        "line ends made one character": (2, "2"),
        "characters that nobody sees removed": (1, "2"),
        "accents joined with their letters (NFC)": (1, "2"),
        "end marks of a tokenizer removed": (2, "2"),
        "blanks at the ends removed": (2, "2"),
    }


def test_what_is_rejected_is_beside_the_output_with_its_reason_and_place(tmp_path: Path) -> None:
    file = lines(
        tmp_path,
        {"prompt": "A?", "response": "B."},
        "no JSON",
        "[1]",
        {"prompt": "A?", "response": " \n"},
        {"prompt": "A?", "response": 1},
        {"prompt": "A?", "response": "\ud800"},
        {"other": 1},
        {"text": "A document."},
        {"conversations": [HI, HELLO, HI, HELLO]},
        {"conversations": [HI, HI, HELLO]},
        {"conversations": [HI, {"role": "tool", "content": "x"}]},
        {"conversations": [HI]},
    )
    made = prepared(file, tmp_path / "out.parquet")
    assert made.rejects == str(tmp_path / "out.rejects.jsonl")
    rejects = [json.loads(line) for line in Path(made.rejects).read_text().splitlines()]
    assert [(row["place"].rsplit(" ", 1)[1], row["why"]) for row in rejects] == [
        ("2", "not JSON"),
        ("3", "no object"),
        ("4", "turn 2 says nothing"),
        ("5", "turn 2 is no text"),
        ("6", "turn 2 has half a character"),
        ("7", "none of the known columns among other"),
        ("8", "a document among pairs"),
        ("9", "more than one question and its answer: --as conversations takes it"),
        ("10", "questions and answers do not take turns"),
        ("11", "a turn has no role that is known"),
        ("12", "no question with its answer"),
    ]
    assert [row["row"] for row in rejects[:2]] == ["no JSON\n", "[1]\n"]
    assert sum(told.rows for told in made.rejected.values()) == 11 == made.rows - 1
    assert prepared(file, tmp_path / "out.parquet", "conversations").sides[str(tmp_path / "out.parquet")]["rows"] == 2
    prepared(lines(tmp_path, {"text": "a."}), tmp_path / "out.parquet")
    assert not (tmp_path / "out.rejects.jsonl").exists(), "what an earlier time rejected is none of this"


def test_shares_are_by_content_and_a_limit_is_of_rows_that_are_read(tmp_path: Path) -> None:
    file = lines(tmp_path, *({"prompt": f"{i // 2}?", "response": "Yes."} for i in range(6000)))
    sides = [Side(tmp_path / f"{name}.parquet", share) for name, share in (("test", 0.1), ("val", 0.3), ("train", 1))]
    made = prepare([str(file)], sides, None, 4000, lambda *_: None)
    found = [pq.read_table(side.file)["prompt"].to_pylist() for side in sides]
    assert made.rows == 4000 == sum(map(len, found))
    assert not set(found[0]) & set(found[1]) | set(found[1]) & set(found[2]) | set(found[0]) & set(found[2])
    assert [len(side) / 4000 for side in found] == pytest.approx([0.1, 0.2, 0.7], abs=0.03)
    held = [held_out(record, 0.1) for record in read_records([sides[2].file])]
    assert sum(held) / len(held) == pytest.approx(0.1, abs=0.02), "what train holds out is another part"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", b'[{"text": "a"}, {"text": "b", }]', "a.json: not JSON after object 1"),
        ("a.json", b'[{"text": "\xff"}]', "a.json: not UTF-8 after object 0"),
        ("a.json", b'[{"text": "a"},', "a.json: it breaks off after object 1"),
        ("a.csv", b'text\n"a', "a.csv: not CSV after line"),
        ("a.csv", b"text\n\xff\n", "a.csv: not UTF-8 after line"),
        ("a.parquet", b"PAR1", "a.parquet: not a readable parquet file"),
        ("a.jsonl", b"x\n", "no row of 1 is as it should be; .*a.jsonl: line 1: not JSON"),
        ("a.jsonl", b"", "no row of 0 is as it should be"),
        ("a.txt", b"x", "files of type '.txt' are not read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_leaves_nothing(
    name: str, content: bytes, told: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        prepared(tmp_path / name, tmp_path / "out.parquet")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a."]}), file)
    with pytest.raises(ConfigurationError, match="is one of the files that are read"):
        prepared(file, file)
    rejected = lines(tmp_path, {"text": "a."}).rename(tmp_path / "out.rejects.jsonl")
    with pytest.raises(ConfigurationError, match="is one of the files that are read"):
        prepared(rejected, tmp_path / "out.parquet")
    with pytest.raises(ConfigurationError, match="is no file of rejected rows"):
        prepared(file, tmp_path / "out.parquet")
    assert rejected.read_text() == '{"text": "a."}\n'
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(ConfigurationError, match="is a folder"):
        prepared(file, tmp_path / "folder.parquet")


def test_a_column_that_is_left_out_is_told(tmp_path: Path) -> None:
    made = prepared(lines(tmp_path, *[{"text": "a.", "id": 1}] * 3), tmp_path / "out.parquet")
    assert {rule: told.rows for rule, told in made.cleaned.items()} == {"column 'id' left out": 3}


def test_a_run_of_blanks_takes_no_time(tmp_path: Path) -> None:
    prepared(lines(tmp_path, {"text": "a" + " " * 10**6 + "b [EOS]"}), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["text"].to_pylist() == ["a" + " " * 10**6 + "b"]


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "from", "content", "value", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
COLUMNS = [
    "conversations",
    "messages",
    "prompt",
    "response",
    "instruction",
    "input",
    "output",
    "history",
    "text",
    "system",
]


SHAPES: list[dict[str, Any]] = [
    {"prompt": "a", "response": "b", "history": [["a", "b"]]},
    {"instruction": "a", "input": "c", "output": "b", "history": [["a", "b"]], "system": "s"},
    {"conversations": [HI, HELLO], "system": "s"},
    {"text": "a"},
]
spoilt = st.builds(
    lambda row, name, value: row | {name: value}, st.sampled_from(SHAPES), st.sampled_from(COLUMNS), anything
)


@settings(max_examples=300)
@given(st.lists(spoilt | st.dictionaries(st.sampled_from(COLUMNS), anything, max_size=4), max_size=5))
def test_whatever_a_row_is_it_is_read_or_rejected(rows: list[dict[str, Any]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        file = lines(Path(name), {"text": "a."}, *rows)
        made = prepared(file, Path(name) / "out.parquet")
        kept = list(read_records([Path(name) / "out.parquet"]))
        assert made.rows == 1 + len(rows) == len(kept) + sum(told.rows for told in made.rejected.values())
