"""The rows of a run as TensorBoard shows them: each number under its kind and name, by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Board:
    """Writes rows into a folder that TensorBoard reads; leaving the context writes what is left."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an extra

        self._writer = SummaryWriter(str(folder))

    def add(self, row: dict[str, Any]) -> None:
        """Add a row's numbers; events and samples have none that make a curve."""
        if row["kind"] not in ("train", "validation"):
            return
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
