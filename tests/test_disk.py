"""A file is what it was until all of it is what it shall be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from autotune.disk import write_whole


def test_a_file_is_what_it_was_until_the_new_one_is_written(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    write_whole(file, "你好")
    (tmp_path / ".plan.json.partial").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_whole(file, "other")
    assert file.read_text(encoding="utf-8") == "你好"
    (tmp_path / ".plan.json.partial").rmdir()
    write_whole(file, "other")
    assert file.read_text(encoding="utf-8") == "other"
    assert os.listdir(tmp_path) == ["plan.json"]  # noqa: PTH208 # hidden ones too


def test_a_file_that_is_so_already_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    write_whole(file, "same")
    before = file.stat()
    (tmp_path / ".plan.json.partial").mkdir()
    write_whole(file, "same")
    assert file.stat() == before
