"""What data files are, by all they hold: hashed beside a run, since it takes long, and kept beside the token store."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

STAMPS, HASHES = "stamps.json", "sha256.json"
"""Beside a store: what its files were when they were tokenized."""
END_BYTES = 64 * 1024
LOWEST_PRIORITY = 19


def stamps(files: Sequence[Path]) -> Iterator[str]:
    """Yield what tells one state of a file from another: path, size, time of change, and what its ends hold.

    The end of a parquet file is its footer, with the statistics of every column.
    """
    for file in files:
        stat = file.stat()
        yield f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {_ends(file, stat.st_size)}"


def _ends(file: Path, size: int) -> str:
    with file.open("rb") as opened:
        ends = hashlib.sha256(opened.read(END_BYTES))
        opened.seek(max(0, size - END_BYTES))
        ends.update(opened.read())
    return ends.hexdigest()


class Hashing(threading.Thread):
    """Hashes the files of stores while others work; `changed` holds those that are no longer what was tokenized."""

    def __init__(self, stores: Sequence[Path]) -> None:
        super().__init__(daemon=True)
        self._stores = stores
        self.changed: list[str] = []

    def run(self) -> None:
        """Write `sha256.json` beside each store that has none, unless a file changed."""
        if sys.platform == "linux":  # where a priority is a thread's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        for store in self._stores:
            with suppress(FileNotFoundError):  # a store that was written by hand has no stamps
                if not (store / HASHES).exists():
                    self._hash(store)

    def _hash(self, store: Path) -> None:
        tokenized: dict[str, str] = json.loads((store / STAMPS).read_text(encoding="utf-8"))
        hashes = {}
        for name, stamp in tokenized.items():
            digest = _whole_hash(Path(name))
            if digest is None or [*stamps([Path(name)])] != [stamp]:
                self.changed.append(name)
            else:
                hashes[name] = digest
        if len(hashes) == len(tokenized):
            partial = store / f".{HASHES}.{os.getpid()}"
            partial.write_text(json.dumps(hashes, indent=2, ensure_ascii=False), encoding="utf-8")
            partial.replace(store / HASHES)


def keep_stamps(files: Sequence[Path], before: Sequence[str], store: Path) -> None:
    """Write beside a store what its files were before they were read."""
    kept = dict(zip((str(file.resolve()) for file in files), before, strict=True))
    (store / STAMPS).write_text(json.dumps(kept, indent=2, ensure_ascii=False), encoding="utf-8")


def _whole_hash(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None
