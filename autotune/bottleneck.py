"""What kept a run from being faster, and what to do: from what its steps took. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from autotune.plan import Layout, Plan

WINDOW = 32
"""Steps at the beginning and at the end of a run that are held against each other."""
WORTH_SAYING = 0.2
"""Share of the time below which nothing is said: something always takes the rest."""


PADDED: dict[Layout, str] = {
    "fixed": "--layout packed leaves little",
    "sorted": "--layout packed leaves little, where the model keeps samples of a row apart",
    "packed": "a larger --effective-batch-size fills rows better",
}


class Bottleneck(NamedTuple):
    """What took a share of what the device could have done."""

    share: float
    what: str
    """A sentence, but for the share it begins with."""
    advice: str


@dataclass
class Spent:
    """What the steps of a run took, added up as they come."""

    steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    """In which the next step's samples were laid out, and the device waited."""
    tokens: int = 0
    padded_tokens: int = 0
    micro_batches: int = 0
    _first: list[float] = field(default_factory=list)
    _last: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, seconds: float, data_seconds: float, tokens: int, padded_tokens: int, micro_batches: int) -> None:
        """Take in a step."""
        self.steps += 1
        self.seconds += seconds
        self.data_seconds += data_seconds
        self.tokens += tokens
        self.padded_tokens += padded_tokens
        self.micro_batches += micro_batches
        if 1 < self.steps <= 1 + WINDOW:  # the first step warms up
            self._first.append(seconds / padded_tokens)
        self._last.append(seconds / padded_tokens)

    @property
    def slowed(self) -> float:
        """Share of the last steps' time that the first ones did without."""
        if self.steps <= 2 * WINDOW:
            return 0.0
        return max(0.0, 1 - median(self._first) / median(self._last))


def bottleneck(spent: Spent, plan: Plan) -> Bottleneck | None:
    """Return what took most of the time beside computing on real tokens, if that is worth a word."""
    if not spent.seconds:
        return None
    work, speed = plan.workload, plan.speed
    found = [
        Bottleneck(1 - spent.tokens / spent.padded_tokens, "of what was computed was padding", PADDED[work.layout]),
        Bottleneck(
            spent.slowed, "of the last steps' time was not taken by the first", "heat, a power limit, or other programs"
        ),
    ]
    if plan.hardware.device == "cpu":  # a card computes one step while the next is laid out
        found.append(
            Bottleneck(
                spent.data_seconds / spent.seconds,
                "of the time went into waiting for data",
                "a faster disk for the token store (XDG_CACHE_HOME), or fewer programs beside it",
            )
        )
    if speed is not None:
        starting = speed.alpha_seconds * spent.micro_batches / spent.seconds
        updating = speed.update_seconds * spent.steps / spent.seconds
        if starting + updating <= 1:  # else what was measured for the plan is not what this run met
            found += [
                Bottleneck(
                    starting,
                    "of the time went into starting micro-batches",
                    "larger ones need memory: close other programs, or shorten rows"
                    if plan.batching.limited_by == "memory"
                    else "a larger --effective-batch-size makes them larger",
                ),
                Bottleneck(
                    updating, "of the time went into the optimizer", "a larger --effective-batch-size takes fewer steps"
                ),
            ]
    most = max(found)
    return most if most.share >= WORTH_SAYING else None
