"""How far the campaign goes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

FULL = os.environ.get("CHATLM_FAULTS") == "full"
"""`make faults-full`: all that the tables of docs/reliability.md count. `make faults`: what five minutes hold."""

T = TypeVar("T")


def trials(short: int, full: int) -> int:
    """How many, in this tier."""
    return full if FULL else short


def some(cases: Sequence[T], short: int) -> list[T]:
    """All of them in the full tier; in the short one so many, spread evenly."""
    if FULL or len(cases) <= short:
        return list(cases)
    return [cases[i * len(cases) // short] for i in range(short)]
