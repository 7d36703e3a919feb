"""Files are known by all they hold, and one that changed is told."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from trainer.fingerprints import END_BYTES, Hashing, keep_stamps, stamps

SIZE = 3 * END_BYTES


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for i, file in enumerate(made):
        file.write_bytes(bytes([i]) * SIZE)
    return made


def hashed(files: list[Path], store: Path, before: list[str]) -> Hashing:
    store.mkdir(exist_ok=True)
    keep_stamps(files, before, store)
    hashing = Hashing([store])
    hashing.start()
    hashing.join()
    return hashing


def test_whole_files_are_hashed_and_kept_beside_the_store(tmp_path: Path, files: list[Path]) -> None:
    assert hashed(files, tmp_path / "store", [*stamps(files)]).changed == []
    kept = json.loads((tmp_path / "store/sha256.json").read_text())
    assert kept == {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    files[0].unlink()
    again = Hashing([tmp_path / "store", tmp_path / "a store without stamps"])
    again.run()
    assert again.changed == [], "once is enough"


@pytest.mark.parametrize("what", ["size", "time", "begin", "end", "gone"])
def test_a_file_that_changed_is_told_and_not_vouched_for(tmp_path: Path, files: list[Path], what: str) -> None:
    before, stat = [*stamps(files)], files[1].stat()
    if what == "gone":
        files[1].unlink()
    else:
        places = {"begin": 0, "end": SIZE - 1, "size": SIZE}
        content = bytearray(files[1].read_bytes())
        if what in places:
            content[places[what] : places[what] + 1] = b"x"
        files[1].write_bytes(content)
        os.utime(files[1], ns=(1, 1 if what == "time" else stat.st_mtime_ns))
    assert hashed(files, tmp_path / "store", before).changed == [str(files[1])]
    assert not (tmp_path / "store/sha256.json").exists()
