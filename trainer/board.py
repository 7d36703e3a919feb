"""The rows of a run as TensorBoard shows them: each number under its kind and name, by step."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any


class Board:
    """Writes rows into a folder that TensorBoard reads; leaving the context writes what is left.

    Its writer does not get over a disk that refuses: curves end there, and the run goes on.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an extra

        self._folder, self._ended = folder, False
        self._writer: Any = None
        self._open = SummaryWriter

    def add(self, row: dict[str, Any]) -> str:
        """Add a row's numbers; events and samples have none. Returns why curves end, once, else ""."""
        if self._ended or row["kind"] not in ("train", "validation"):
            return ""
        try:
            if self._writer is None:
                self._writer = self._open(str(self._folder))
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                    self._writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])
        except OSError as error:
            self._ended = True
            return f"{self._folder}: {error.strerror or error}"
        return ""

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
