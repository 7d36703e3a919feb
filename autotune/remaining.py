"""What is left of a run's time: from what its steps, evaluations and checkpoints took in this process. Pure."""

from __future__ import annotations

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
"""Of an evaluation that has not been seen to its end: what a plan says of it leaves out the answers' lengths."""


class Left(NamedTuple):
    """Seconds to the end: of steps, evaluations, checkpoints, and the model's own saving."""

    seconds: float
    low: float
    high: float


@dataclass
class Pace:
    """Takes in the rows of a run as they come; says what is left. One that goes on counts its own steps alone."""

    total_steps: int = 0
    step: int = 0
    evaluates_every: int | None = None
    """Steps; None where it does not, or is not told to."""
    saves_every: int | None = None
    saves_every_seconds: float | None = None
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """Seconds of each but the first of this process, which warms up."""
    evaluations: deque[float] = field(default_factory=lambda: deque(maxlen=BLOCKS))
    saves: deque[float] = field(default_factory=lambda: deque(maxlen=BLOCKS))
    _own: int = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in one row of metrics."""
        kind, event, seconds = row.get("kind"), row.get("event"), row.get("seconds")
        if event == "started":
            self._begin(row)
        elif event == "rescheduled":
            self.total_steps = row["total_steps"]
        if not isinstance(seconds, int | float):
            return
        if kind == "train":
            self.step, self._own = row["step"], self._own + 1
            if self._own > 1:
                self.steps.append(seconds)
        elif kind == "validation" or event == "sampled":
            self.evaluations.append(seconds)
        elif event == "checkpoint":
            self.saves.append(seconds)

    def _begin(self, row: Mapping[str, Any]) -> None:
        self.total_steps, self.step, self._own = row["total_steps"], row["step"], 0
        self.evaluates_every = row.get("evaluates_every")
        self.saves_every, self.saves_every_seconds = row.get("saves_every"), row.get("saves_every_seconds")
        for seen in (self.steps, self.evaluations, self.saves):
            seen.clear()

    def left(self, plan: Plan | None) -> Left | None:
        """Return what is left, by the plan where this process has not met a thing yet; None where nothing is known.

        The range is that of the rate over blocks of the window, two standard deviations either way.
        """
        planned = _planned_step(plan)
        if not self.total_steps or not (self.steps or planned):
            return None
        each = fmean(self.steps) if self.steps else planned
        training = (self.total_steps - self.step) * each
        evaluating = _points(self.step, self.total_steps, self.evaluates_every) * self._evaluation(plan, each, planned)
        saving = self._saves_left(training) * (fmean(self.saves) if self.saves else 0.0)
        error = self._uneven() * training + (0.0 if self.evaluations else UNSEEN_ERROR * evaluating)
        total = training + evaluating + saving
        error = max(error, LEAST_ERROR * total)
        return Left(total, max(0.0, total - error), total + error)

    def _evaluation(self, plan: Plan | None, each: float, planned: float) -> float:
        if self.evaluations:
            return fmean(self.evaluations)
        cast = plan.forecast if plan else None
        slower = each / planned if planned else 1.0
        return cast.validation_seconds * slower if cast else 0.0

    def _saves_left(self, training: float) -> float:
        """Count checkpoints to come, the model at the end as one: each evaluation may be the best so far."""
        by_steps = _points(self.step, self.total_steps, self.saves_every)
        by_time = training / self.saves_every_seconds if self.saves_every_seconds else 0.0
        return max(by_steps, by_time, _points(self.step, self.total_steps, self.evaluates_every), 1) + 1

    def _uneven(self) -> float:
        size = len(self.steps) // BLOCKS
        if size < 2:
            return 0.25 if len(self.steps) < 4 else 0.15
        seconds = list(self.steps)[-size * BLOCKS :]
        blocks = [fmean(seconds[i : i + size]) for i in range(0, len(seconds), size)]
        return 2 * pstdev(blocks) / fmean(blocks)


def _planned_step(plan: Plan | None) -> float:
    cast = plan.forecast if plan else None
    return cast.seconds_per_epoch / cast.steps_per_epoch if cast else 0.0


def _points(step: int, total: int, every: int | None) -> int:
    """Count the multiples of `every` past a step, and the last step, which always is one; none where it is None."""
    return 0 if every is None or step >= total else -(-total // every) - step // every
