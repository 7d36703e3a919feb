"""Commands that make data files of data files, as a person runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import CommandRunner


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"问题 {i}: {'x' * (i % 7)}?", "response": f"Answer number {i}."} for i in range(300)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*pairs, pairs[0], {"prompt": "", "response": "a"}]))
    return file


def test_a_sample_of_the_best_says_what_went_and_why(rows: Path, tmp_path: Path, chatlm: CommandRunner) -> None:
    asked = ("sample", "--input", rows, "--output", "a/small.parquet", "--num-samples", 100, "--smart")
    done = chatlm(*asked, "--validation-output", "held.parquet", "--report", "report.json")
    assert done.returncode == 0, done.stderr
    assert "2 rows of 302 went (0.7%):" in done.stdout
    assert "1  the words of one before" in done.stdout
    assert "1  a part that says nothing" in done.stdout
    told = json.loads((tmp_path / "report.json").read_text())
    sizes = [pq.read_metadata(tmp_path / name).num_rows for name in ("a/small.parquet", "held.parquet")]
    assert sizes == [told["after"]["rows"], told["validation"]["rows"]] == [100, 10]
    again = chatlm(*asked, "--json")
    assert json.loads(again.stdout)["gone"] == told["gone"]
    assert chatlm("sample", "--input", rows, "--output", "b.parquet", "--fraction", 0.5).returncode == 0
    assert pq.read_metadata(tmp_path / "b.parquet").num_rows == 151


def test_more_rows_than_there_are_is_a_warning(rows: Path, chatlm: CommandRunner) -> None:
    done = chatlm("sample", "--input", rows, "--output", "all.parquet", "--num-samples", 400)
    assert done.returncode == 0
    assert "warning: 400 rows were asked for: there are 302" in done.stderr


def test_prepared_rows_are_told_and_the_rejected_lie_beside(rows: Path, tmp_path: Path, chatlm: CommandRunner) -> None:
    done = chatlm("prepare", "--input", rows, "--output", "clean.parquet", "--validation-output", "held.parquet")
    assert done.returncode == 0, done.stderr
    assert "302 rows read, 1 rejected" in done.stdout
    assert f"turn 1 says nothing; first: {rows}: line 302" in done.stdout
    assert "Rejected rows and why: clean.rejects.jsonl" in done.stdout
    sizes = [pq.read_metadata(tmp_path / name).num_rows for name in ("clean.parquet", "held.parquet")]
    assert sum(sizes) == 301
    assert 10 <= sizes[1] <= 50


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("sample", "--output", "a.parquet"), 2, "give --num-samples N or --fraction SHARE"),
        (("sample", "--output", "a.csv", "--num-samples", 1), 2, "a name that ends in .parquet"),
        (("sample", "--output", "a.parquet", "--validation-output", "./a.parquet", "--num-samples", 1), 2, "twice"),
        (("sample", "--output", "a.parquet", "--fraction", 0), 3, "no row is left of 302"),
        (("sample", "--output", "a.parquet", "--num-samples", 1, "--report", "rows.jsonl"), 2, "files that are read"),
        (("sample", "--output", "a.parquet", "--num-samples", 1, "--report", "a.parquet"), 2, "given twice"),
        (("sample", "--output", "a.parquet", "--num-samples", 1, "--report", "no/a.json"), 2, "no such folder"),
        (("sample", "--output", "a.parquet", "--num-samples", 1, "--tokenizer", "."), 2, "not a tokenizer"),
        (("prepare", "--output", "a.parquet", "--as", "songs"), 2, "--as songs is none of pairs"),
        (("sample", "--output", "rows.jsonl/a.parquet", "--num-samples", 1), 4, "rows.jsonl: File exists"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: tuple[object, ...], code: int, words: str, rows: Path, tmp_path: Path, chatlm: CommandRunner
) -> None:
    done = chatlm(*arguments, "--input", rows)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_tokenizer_is_trained_and_looked_at(rows: Path, tmp_path: Path, chatlm: CommandRunner) -> None:
    asked = ("tokenizer", "train", "--data", rows, "--vocab-size", 350, "--output", "made")
    done = chatlm(*asked, "--report", "report.json")
    assert done.returncode == 0, done.stderr
    assert "350 entries; bos '<s>', eos '</s>', pad '<pad>'" in done.stdout
    assert "Unknown: 0.00% of tokens; the same again when joined: 100.0% of texts" in done.stdout
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["learned_characters"] > 1000
    done = chatlm("tokenizer", "inspect", "made", "--data", rows, "--json")
    assert json.loads(done.stdout)["defects"] == []
    done = chatlm(*asked)
    assert (done.returncode, "made is there already" in done.stderr) == (2, True)
    config = tmp_path / "made" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": None}))
    done = chatlm("tokenizer", "inspect", "made")
    assert (done.returncode, "warning: made: no end token" in done.stderr) == (0, True)


def test_files_are_made_without_torch(rows: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from cli import chatlm\n"
        f"given = ['--input', {str(rows)!r}, '--output']\n"
        "chatlm(['sample', *given, 'a.parquet', '--num-samples', '9', '--smart'], standalone_mode=False)\n"
        "chatlm(['prepare', *given, 'b.parquet'], standalone_mode=False)\n"
        "chatlm(['tokenizer', 'train', '--data', 'b.parquet', '--output', 'c'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
