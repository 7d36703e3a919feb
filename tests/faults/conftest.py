"""What every part of the campaign uses: how far it goes, and the line that says how many trials held."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest

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


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Any:
    """Say how many trials held: a line that `pytest -rP` shows."""

    def told(count: int) -> None:
        sys.stdout.write(f"{request.node.name}: {count} of {count}\n")

    return told
