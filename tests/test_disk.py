"""A file is what it was until all of it is what it shall be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from autotune.disk import put_in_place, write_whole


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


def test_a_folder_that_cannot_be_put_in_place_leaves_the_older_one_also_one_a_kill_has_left(tmp_path: Path) -> None:
    folder, old, partial = (tmp_path / name for name in ("model", ".model.old", ".model.partial"))
    for older in (folder, old):
        older.mkdir()
        (older / "file").write_text("older")
        with pytest.raises(FileNotFoundError):
            put_in_place(partial, folder)
        assert (folder / "file").read_text() == "older"
        assert os.listdir(tmp_path) == ["model"]  # noqa: PTH208
        if older == folder:
            shutil.rmtree(folder)
    partial.mkdir()
    put_in_place(partial, folder)
    assert os.listdir(tmp_path) == ["model"]  # noqa: PTH208
    assert list(folder.iterdir()) == []
