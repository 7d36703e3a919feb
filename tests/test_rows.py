"""Rows outlast a kill; a run that goes on loses those past its checkpoint, and one that was cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotune.errors import MachineError
from trainer.rows import RowFile


def steps(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text(encoding="utf-8").splitlines()]


def test_rows_up_to_a_step_stay_whatever_their_kind(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with RowFile(file, 0) as rows:
        for step in (0, 1, 2, 2, 3, 4):
            rows.write({"step": step, "text": "你好"}, sync=step == 2)
    file.write_text(file.read_text(encoding="utf-8") + '{"step": 2, "los', encoding="utf-8")
    with RowFile(file, 2) as rows:
        rows.write({"step": 3})
    assert steps(file) == [0, 1, 2, 2, 3]
    assert "你好" in file.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_begins_begins_its_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\n{"step": 1}\nno json\n')
    with RowFile(file, 0) as rows:
        rows.write({"step": 1})
    assert steps(file) == [1]


def test_rows_that_cannot_be_cut_are_all_there_and_told(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / ".metrics.jsonl.partial").mkdir()
    with pytest.raises(MachineError, match=r"metrics.jsonl: Is a directory: its rows past step 1 could not be cut"):
        RowFile(file, 1)
    assert steps(file) == [1, 2]
