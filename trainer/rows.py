"""The rows of a run in a file, one JSON object a line; a run that goes on first loses those past its checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class RowFile:
    """Appends rows to a file that holds those up to a step; each is there for others to read at once."""

    def __init__(self, path: Path, step: int) -> None:
        _cut(path, step)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, row: dict[str, Any], *, sync: bool = False) -> None:
        """Add a row; `sync` makes all there are outlast a loss of power."""
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())


def _cut(path: Path, step: int) -> None:
    """Leave the rows up to this step, and none of step 0: a run that begins begins its file."""
    if not path.exists():
        return
    partial = path.with_name(f".{path.name}.partial")
    with path.open(encoding="utf-8", errors="replace") as before, partial.open("w", encoding="utf-8") as after:
        after.writelines(line for line in before if step and _step_of(line) <= step)
        after.flush()
        os.fsync(after.fileno())
    partial.replace(path)


def _step_of(line: str) -> float:
    """Return the step of a row; one that a kill has cut off comes after all."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
