"""What a run takes, and what is left of it: steps, evaluations and checkpoints, by what each takes. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from autotune.plan import Plan

WINDOW = 512
"""Steps that the rate is taken from: what was long ago says little of what is to come."""
BLOCKS = 8
"""That the window is divided into, to see how even the rate is."""
LEAST_ERROR = 0.03
UNSEEN_ERROR = 0.5
"""Of an evaluation that has not been seen to its end: how long answers get is not known before they are given."""


MOST_STEPS = 10**12
"""Or of anything that is counted: what says more is no count."""
MOST_SECONDS = 1e9
"""Of anything that a run waits for, some thirty years."""


def sane_count(value: object) -> int | None:
    """Return a whole number that may count something; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_STEPS:
        return None
    return int(value) if value == int(value) else None


def sane_seconds(value: object) -> float | None:
    """Return a number that something may have taken; None for anything else."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and 0 <= value <= MOST_SECONDS else None  # type: ignore[operator,return-value]


class Costs(NamedTuple):
    """The seconds that each part of a run takes, and how often it comes."""

    step: float
    evaluation: float
    checkpoint: float
    evaluates_every: int | None
    """Steps; the last one is evaluated too. None where nothing is."""
    saves_every: int | None
    saves_every_seconds: float | None
    saves_best: bool
    """Whether an evaluation may be followed by a checkpoint, as the best so far."""

    def evaluations(self, first: int, last: int) -> int:
        """Count those after the steps behind `first`, up to `last`, which ends the run."""
        return _points(first, last, self.evaluates_every)

    def checkpoints(self, first: int, last: int) -> int:
        """Count those of the same steps: after so many, at each evaluation that may be the best, and at the end.

        The clock asks for more only where it takes longer from one of them to the next.
        """
        if first >= last:
            return 0
        evaluated = self.evaluates_every if self.saves_best else None
        both = math.lcm(self.saves_every, evaluated) if self.saves_every and evaluated else None
        ends = [every for every in (self.saves_every, evaluated, both) if every is not None] or [last + 1]
        counts = [_points(first, last, every) for every in ends]
        count = sum(counts[:2]) - counts[2] if both else counts[0]
        return count + self._asked_by_clock(last - first, min(ends))

    def _asked_by_clock(self, steps: int, every: int) -> int:
        """Count the checkpoints that the clock asks for between those that come every so many steps anyway."""
        if not self.saves_every_seconds:
            return 0
        enough = max(1, math.ceil(self.saves_every_seconds / self.step)) if self.step else steps
        whole, rest = divmod(steps, every)
        return whole * ((every - 1) // enough) + max(0, rest - 1) // enough

    def seconds(self, first: int, last: int) -> float:
        """Return what the steps behind `first` up to `last` take, and saving the model at the end, and the best."""
        saves = self.checkpoints(first, last) + 1 + self.saves_best
        return (last - first) * self.step + self.evaluations(first, last) * self.evaluation + saves * self.checkpoint

    def last_within(self, first: int, most: int, seconds: float) -> int:
        """Return the last step, at most `most`, by which a run is done in so many seconds; `first` where none is."""
        return first + max(
            0, bisect_right(range(first, most + 1), seconds, key=lambda last: self.seconds(first, last)) - 1
        )


class Left(NamedTuple):
    """Seconds to the end."""

    seconds: float
    low: float
    high: float


@dataclass
class Pace:
    """Takes in the rows of a run as they come; says what is left. One that goes on counts its own steps alone."""

    total_steps: int = 0
    step: int = 0
    evaluates_every: int | None = None
    saves_every: int | None = None
    saves_every_seconds: float | None = None
    saves_best: bool = False
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """Seconds of each but the first of this process, which warms up."""
    evaluations: deque[float] = field(default_factory=lambda: deque(maxlen=BLOCKS))
    checkpoints: deque[float] = field(default_factory=lambda: deque(maxlen=BLOCKS))
    _own: int = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in one row of metrics; what is no number where one belongs counts as not said."""
        kind, event, seconds = row.get("kind"), row.get("event"), sane_seconds(row.get("seconds"))
        if event == "started":
            self._begin(row)
        elif event == "rescheduled":
            self.total_steps = sane_count(row.get("total_steps")) or self.total_steps
        if seconds is None:
            return
        if kind == "train":
            self.step, self._own = sane_count(row.get("step")) or self.step, self._own + 1
            if self._own > 1:
                self.steps.append(seconds)
        elif kind == "validation" or event == "sampled":
            self.evaluations.append(seconds)
        elif event == "checkpoint":
            self.checkpoints.append(seconds)

    def _begin(self, row: Mapping[str, Any]) -> None:
        self.total_steps = sane_count(row.get("total_steps")) or self.total_steps
        self.step, self._own, self.saves_best = sane_count(row.get("step")) or 0, 0, bool(row.get("saves_best"))
        self.evaluates_every = sane_count(row.get("evaluates_every")) or None
        self.saves_every = sane_count(row.get("saves_every")) or None
        self.saves_every_seconds = sane_seconds(row.get("saves_every_seconds")) or None
        for seen in (self.steps, self.evaluations, self.checkpoints):
            seen.clear()

    def costs(self, plan: Plan | None) -> Costs | None:
        """Return what each part takes, by the plan where this process has not met it yet; None where nothing says."""
        cast = plan.forecast if plan else None
        planned = cast.seconds_per_epoch / cast.steps_per_epoch if cast and cast.steps_per_epoch else 0.0
        if not (self.steps or planned):
            return None
        step = fmean(self._recent) if self.steps else planned
        slower = step / planned if planned else 1.0
        evaluation = (cast.validation_seconds + cast.answer_seconds) * slower if cast else 0.0
        return Costs(
            step=step,
            evaluation=fmean(self.evaluations) if self.evaluations else evaluation,
            checkpoint=fmean(self.checkpoints) if self.checkpoints else cast.saving_seconds if cast else 0.0,
            evaluates_every=self.evaluates_every,
            saves_every=self.saves_every,
            saves_every_seconds=self.saves_every_seconds,
            saves_best=self.saves_best,
        )

    def left(self, plan: Plan | None) -> Left | None:
        """Return what is left; None where nothing is known.

        The range is that of the rate over blocks of the window, two standard deviations either way, and of an
        evaluation that this process has not seen.
        """
        costs = self.costs(plan)
        if not self.total_steps or costs is None:
            return None
        if self.step >= self.total_steps:
            return Left(0.0, 0.0, 0.0)
        total = costs.seconds(self.step, self.total_steps)
        unseen = 0.0 if self.evaluations else UNSEEN_ERROR * costs.evaluation
        error = self._uneven() * (self.total_steps - self.step) * costs.step
        error += unseen * costs.evaluations(self.step, self.total_steps)
        error = max(error, LEAST_ERROR * total)
        return Left(total, max(0.0, total - error), total + error)

    @property
    def _recent(self) -> list[float]:
        """The later half of the steps: kernels and caches warm up over many."""
        return list(self.steps)[len(self.steps) // 2 :]

    def _uneven(self) -> float:
        recent = self._recent
        size = len(recent) // BLOCKS
        if size < 2:
            return 0.25 if len(recent) < 4 else 0.15
        seconds = recent[-size * BLOCKS :]
        blocks = [fmean(seconds[i : i + size]) for i in range(0, len(seconds), size)]
        mean = fmean(blocks)
        return 2 * pstdev(blocks) / mean if mean else 0.0


def _points(first: int, last: int, every: int | None) -> int:
    """Count the multiples of `every` past a step, and the last step, which always is one; none where it is None."""
    return 0 if every is None or first >= last else -(-last // every) - first // every
