"""Samples of data files: uniform, the same for a seed, of one content on one side, and never over what is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.errors import ConfigurationError, DataError
from trainer import parquet, sampling
from trainer.sampling import Wanted, draw, draw_alike, sample

RANDOM = Wanted(rows=40, share=1.0, validation=0.0, smart=False, seed=1)


def pairs(rows: Sequence[tuple[str, str]]) -> pa.Table:
    return pa.table({"prompt": [p for p, _ in rows], "response": [r for _, r in rows], "id": list(range(len(rows)))})


def write(file: Path, table: pa.Table, **how: Any) -> str:
    pq.write_table(table, file, **how)
    return str(file)


def numbered(count: int) -> pa.Table:
    return pairs([(f"question {i}", f"answer {i}") for i in range(count)])


def drawn(paths: Sequence[str], wanted: Wanted, output: Path, validation: Path | None = None) -> sampling.Sampled:
    return sample(paths, wanted, output, validation, lambda *_: None)


def test_every_row_is_drawn_as_often_as_any_other() -> None:
    """1,000 seeds: inclusions of 64 rows of 200, by the chi-square of a draw without replacement, at 0.1 %."""
    total, wanted, seeds = 200, 64, 1000
    counts = np.zeros(total)
    for seed in range(seeds):
        rows = draw(total, wanted, seed)
        assert len(np.unique(rows)) == wanted
        counts[rows] += 1
    share = wanted / total
    spread = counts - seeds * share
    # Inclusions of one draw are correlated by -1 / (total - 1).
    statistic = float((spread**2).sum()) / (seeds * share * (1 - share)) * (total - 1) / total
    assert statistic < 267.5, "the 99.9 % point of chi-square with 199 degrees of freedom"


def test_rows_of_several_chunks_are_drawn_as_often_too() -> None:
    counts = np.zeros(50)
    for seed in range(1000):
        counts[draw(50, 20, seed, chunk=7)] += 1
    statistic = float(((counts - 400) ** 2).sum()) / 240 * 49 / 50
    assert statistic < 85.4, "the 99.9 % point of chi-square with 49 degrees of freedom"


@pytest.mark.parametrize("validation", [0.0, 0.5])
def test_a_file_of_rows_is_sampled_as_evenly(validation: float, tmp_path: Path) -> None:
    """100 seeds, by the command's own function: training rows, and those held out."""
    file = write(tmp_path / "rows.parquet", numbered(60))
    counts = np.zeros(60)
    for seed in range(100):
        wanted = replace(RANDOM, rows=20, validation=validation, seed=seed)
        drawn([file], wanted, tmp_path / "out.parquet", tmp_path / "held.parquet" if validation else None)
        counts[pq.read_table(tmp_path / "out.parquet")["id"].to_numpy()] += 1
    share = 20 / 60
    statistic = float(((counts - 100 * share) ** 2).sum()) / (100 * share * (1 - share)) * 59 / 60
    assert statistic < 98.3, "the 99.9 % point of chi-square with 59 degrees of freedom"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=300), st.data())
def test_of_each_stratum_its_share_is_drawn_to_the_row(strata: list[int], data: st.DataObject) -> None:
    wanted = data.draw(st.integers(0, len(strata)))
    rows = draw_alike(np.array(strata), wanted, 3)
    assert len(rows) == len(set(rows.tolist())) == wanted
    for stratum in set(strata):
        exact = strata.count(stratum) * wanted / len(strata)
        assert abs(sum(strata[row] == stratum for row in rows) - exact) < 1 + 1e-9


def test_a_seed_draws_the_same_rows_however_they_are_divided_among_files(tmp_path: Path) -> None:
    table = numbered(1000)
    whole = write(tmp_path / "whole.parquet", table)
    drawn([whole], RANDOM, tmp_path / "a.parquet")
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "1.parquet", table[:10])
    write(tmp_path / "parts" / "2.parquet", table[10:700], row_group_size=13)
    write(tmp_path / "parts" / "3.parquet", table[700:])
    drawn([str(tmp_path / "parts")], RANDOM, tmp_path / "b.parquet")
    first, second = (pq.read_table(tmp_path / f"{name}.parquet") for name in "ab")
    assert first == second
    assert first.column_names == ["prompt", "response", "id"], "columns that are not trained on stay"
    assert first["id"].to_pylist() == sorted(first["id"].to_pylist())
    drawn([whole], replace(RANDOM, seed=2), tmp_path / "c.parquet")
    assert pq.read_table(tmp_path / "c.parquet") != first


CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": CONVERSATION},
        {"prompt": "p", "response": "r"},
        {"instruction": "i", "input": "", "output": "o"},
        {"text": "t"},
    ],
)
def test_lines_become_rows_of_parquet_that_are_read_alike(row: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(json.dumps(row | {"other": [1]}) for _ in range(50)) + "\n")
    made = drawn([str(file)], RANDOM, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [row] * 40
    assert (made.before["rows"], made.after["rows"]) == (50, 40)
    again = drawn([str(tmp_path / "out.parquet")], RANDOM, tmp_path / "again.parquet")
    assert again.before["characters"] == made.after["characters"]


def test_no_content_is_in_both_training_and_validation_and_the_ratio_is_kept(tmp_path: Path) -> None:
    rows = [(f"question {i // 3}", "yes") for i in range(3000)]
    file = write(tmp_path / "rows.parquet", pairs(rows))
    train, held_out = tmp_path / "train.parquet", tmp_path / "held out.parquet"
    made = drawn([file], replace(RANDOM, rows=1000, validation=0.1), train, held_out)
    sides = [pq.read_table(side)["prompt"].to_pylist() for side in (train, held_out)]
    assert not set(sides[0]) & set(sides[1])
    assert len(sides[0]) + len(sides[1]) == 1100
    assert abs(len(sides[1]) - 100) <= 2
    assert made.validation is not None
    assert made.validation["rows"] == len(sides[1])


def test_more_than_there_are_is_all_and_said(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", numbered(30))
    made = drawn([file], RANDOM, tmp_path / "out.parquet")
    assert (made.asked, made.after["rows"]) == (40, 30)
    made = drawn([file], replace(RANDOM, validation=0.5), tmp_path / "out.parquet", tmp_path / "held.parquet")
    assert made.validation is not None
    assert (made.after["rows"], made.validation["rows"]) == (20, 10)


def test_what_is_written_has_checksums_and_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", numbered(100))
    drawn([file], RANDOM, tmp_path / "out" / "sample.parquet")
    assert pq.ParquetFile(tmp_path / "out" / "sample.parquet", page_checksum_verification=True).read().num_rows == 40
    other = write(tmp_path / "other.parquet", pa.table({"text": ["t"] * 100}))
    with pytest.raises(DataError, match=r"other.parquet: rows of text, those of .* are of prompt \+ response"):
        drawn([file, other], RANDOM, tmp_path / "out" / "second.parquet")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["sample.parquet"]
    before = Path(file).read_bytes()
    with pytest.raises(ConfigurationError, match="is one of the files that are read"):
        drawn([file], RANDOM, Path(file))
    assert Path(file).read_bytes() == before


def test_a_line_that_is_no_row_and_rows_of_several_kinds_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n\n{"prompt": "a", "response": "b"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl: line 3: a row of prompt \+ response among those of text"):
        drawn([str(file)], RANDOM, tmp_path / "out.parquet")
    file.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(DataError, match=r"rows.jsonl: line 2: `text` must be text"):
        drawn([str(file)], RANDOM, tmp_path / "out.parquet")
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        drawn([str(tmp_path / "none.jsonl")], RANDOM, tmp_path / "out.parquet")


@pytest.mark.parametrize(
    ("column", "values", "told"),
    [
        ("text", [[1]], "a column is neither text nor turns"),
        ("conversations", ["a"], "a column is neither text nor turns"),
        ("conversations", [[{"from": "human", "value": "a"}]], "a column is neither text nor turns"),
        ("other", ["a"], "none of the known columns among other"),
    ],
)
def test_columns_that_are_not_what_they_promise_are_named(
    column: str, values: list[Any], told: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "rows.parquet", pa.table({column: values}))
    with pytest.raises(DataError, match=f"rows.parquet: {told}"):
        drawn([file], RANDOM, tmp_path / "out.parquet")


def many(count: int) -> pa.Table:
    return pa.table({"text": pa.array(np.arange(count)).cast(pa.string())})


@pytest.mark.parametrize("count", [1, parquet.GROUP_ROWS, parquet.GROUP_ROWS + 1, 2 * parquet.GROUP_ROWS])
def test_any_number_of_rows_is_written(count: int, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", many(count))
    made = drawn([file], replace(RANDOM, rows=count), tmp_path / "out.parquet", tmp_path / "held.parquet")
    assert pq.read_table(tmp_path / "out.parquet") == many(count)
    assert made.enough
    held = pq.read_table(tmp_path / "held.parquet")
    assert (held.num_rows, held.column_names) == (0, ["text"])


def test_one_content_alone_is_never_divided(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", pa.table({"text": ["a"] * 300}))
    drawn([file], replace(RANDOM, validation=0.1), tmp_path / "out.parquet", tmp_path / "held.parquet")
    sides = [pq.read_metadata(tmp_path / f"{name}.parquet").num_rows for name in ("out", "held")]
    assert sides == [44, 0]


def test_the_same_rows_in_other_columns_have_the_same_content(tmp_path: Path) -> None:
    """In another order, of other types, beside a `text` of their own, from lines, and without an input."""
    rows = [{"instruction": f"do {i}", "output": "yes"} for i in range(500)]
    first = tmp_path / "rows.jsonl"
    first.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pa.Table.from_pylist([{"text": "all", "output": row["output"], "input": None} for row in rows])
    table = table.append_column("instruction", pa.array([row["instruction"] for row in rows], pa.large_string()))
    second = write(tmp_path / "rows.parquet", table)
    wanted = replace(RANDOM, rows=800, validation=0.2)
    made = drawn([str(first), second], wanted, tmp_path / "out.parquet", tmp_path / "held.parquet")
    sides = [pq.read_table(tmp_path / f"{name}.parquet")["instruction"].to_pylist() for name in ("out", "held")]
    assert not set(sides[0]) & set(sides[1])
    assert len(sides[1]) > 100
    assert made.left_out == ("text",)
    smart = drawn([str(first), second], replace(wanted, smart=True, validation=0.0), tmp_path / "smart.parquet")
    assert smart.gone == {"duplicate": 500}
    assert (smart.before["duplicates"], smart.after["duplicates"]) == (0.5, 0.0)


def test_how_many_rows_repeat_others_is_told_before_and_after(tmp_path: Path) -> None:
    rows = [("q", "a")] * 30 + [("r", "b")] * 10 + [(f"question {i}", "c") for i in range(60)]
    made = drawn([write(tmp_path / "rows.parquet", pairs(rows))], RANDOM, tmp_path / "out.parquet")
    written = pq.read_table(tmp_path / "out.parquet")["prompt"].to_pylist()
    assert made.before["duplicates"] == 38 / 100
    assert made.after["duplicates"] == (40 - len(set(written))) / 40 > 0


def test_keys_of_lines_that_are_not_trained_on_are_told_to_be_left_out(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text(
        "\n" + "".join(json.dumps({"prompt": f"{i}", "response": "b", "source": "x"}) + "\n" for i in range(50))
    )
    made = drawn([str(lines)], RANDOM, tmp_path / "out.parquet")
    assert made.left_out == ("source",)
    assert pq.read_table(tmp_path / "out.parquet").column_names == ["prompt", "response"]


def test_columns_that_are_not_trained_on_stay_where_all_files_have_them_alike(tmp_path: Path) -> None:
    base = {"text": ["a", "b"]}
    files = [
        write(tmp_path / "1.parquet", pa.table(base | {"id": [1, 2], "score": pa.nulls(2), "one": [1, 2]})),
        write(tmp_path / "2.parquet", pa.table(base | {"id": [3, 4], "score": [0.5, 0.5]})),
    ]
    for order in (files, files[::-1]):
        made = drawn(order, replace(RANDOM, rows=4), tmp_path / "out.parquet")
        assert pq.read_table(tmp_path / "out.parquet").column_names == ["text", "id"]
        assert sorted(made.left_out) == ["one", "score"]


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_text_of_any_type_of_arrow_is_read(kind: str, tmp_path: Path) -> None:
    types = {
        "large_string": pa.large_string(), "string_view": pa.string_view(),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
    }  # fmt: skip
    file = write(tmp_path / "rows.parquet", pa.table({"text": pa.array(["a", None, "b"]).cast(types[kind])}))
    drawn([file], replace(RANDOM, rows=3), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["text"].to_pylist() == ["a", None, "b"]
    large = pa.large_list(pa.struct([("content", pa.large_string()), ("role", pa.large_string()), ("x", pa.int8())]))
    turns = pa.array([[{"content": "a", "role": "user", "x": 1}, {"content": "b", "role": "assistant", "x": 2}]], large)
    file = write(tmp_path / "turns.parquet", pa.table({"conversations": turns}))
    drawn([file], replace(RANDOM, rows=1), tmp_path / "out.parquet")
    (row,) = pq.read_table(tmp_path / "out.parquet")["conversations"].to_pylist()
    assert row == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_a_file_that_is_given_twice_is_read_once_and_an_empty_one_is_passed_over(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", numbered(5))
    (tmp_path / "empty.jsonl").touch()
    made = drawn([file, str(tmp_path), file], RANDOM, tmp_path / "out" / "out.parquet")
    assert (made.before["rows"], made.after["rows"], made.enough) == (5, 5, False)


def test_lengths_are_told_in_tokens_too_and_the_longest_as_it_is(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", pa.table({"text": ["a b c", "a", "b" * (sampling.PIECE_ROWS * 200)]}))
    words = lambda texts: [len(text.split()) for text in texts]  # noqa: E731
    made = sample([file], replace(RANDOM, rows=3), tmp_path / "out.parquet", None, lambda *_: None, words)
    assert (made.after["tokens_max"], made.after["tokens_p50"]) == (3, 1)
    assert made.after["max"] == sampling.PIECE_ROWS * 200
