"""The rows of a run in a file, one JSON object a line; a run that goes on first loses those past its checkpoint."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from autotune.errors import MachineError


class RowFile:
    """Appends rows to a file that holds those up to a step; each is there for others to read at once.

    Where the disk refuses, rows wait until it takes them: a run of days does not end for a moment without room.
    """

    def __init__(self, path: Path, step: int) -> None:
        _cut(path, step)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._refused = False

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        refused = self._write()
        with suppress(OSError):
            self._file.close()
        if refused and error is None:
            left = self._waiting.count(b"\n")
            raise MachineError(
                f"{self._path}: {refused}: its last {left} rows could not be written",
                "free some of the disk; the model and the checkpoints are there",
            )

    def write(self, row: dict[str, Any], *, sync: bool = False) -> str:
        """Add a row; `sync` makes all there are outlast a loss of power. Returns why rows begin to wait, else ""."""
        self._waiting += (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        waited, why = self._refused, self._write(sync=sync)
        self._refused = bool(why)
        return "" if waited or not why else f"{self._path}: {why}"

    def _write(self, *, sync: bool = False) -> str:
        """Write what waits, of which a disk may take a part; return why it took no more."""
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            return error.strerror or str(error)
        return ""


def _cut(path: Path, step: int) -> None:
    """Leave the rows up to this step, and none of step 0: a run that begins begins its file."""
    if not path.exists():
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        with path.open(encoding="utf-8", errors="replace") as before, partial.open("w", encoding="utf-8") as after:
            after.writelines(line for line in before if step and _step_of(line) <= step)
            after.flush()
            os.fsync(after.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise MachineError(
            f"{path}: {error.strerror or error}: its rows past step {step} could not be cut",
            "free some of the disk; the checkpoints and all rows are there",
        ) from None


def _step_of(line: str) -> float:
    """Return the step of a row; one that a kill has cut off comes after all."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
