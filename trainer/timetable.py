"""How many steps a run has, and where in its schedule each stands: by their number, or by the time that there is."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from typing import Any

from autotune.errands import TimeLimit
from autotune.errors import ConfigurationError
from autotune.plan import Plan
from autotune.remaining import Pace
from trainer.progress import Progress
from trainer.ranks import Ranks

TOLD = 0.02
"""Change of the number of steps that is told of."""


class Timetable:
    """The steps of a run. Under a limit of time those left are counted anew after each, by what those before it took.

    Then the schedule is not of steps but of what is left of it: each step takes the part that it is of the steps left,
    so that the learning rate never leaps, and is at its end when the time is.
    """

    def __init__(
        self,
        asked_steps: int,
        progress: Progress,
        limit: TimeLimit | None,
        plan: Plan,
        ranks: Ranks,
        pace: Pace,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.asked_steps = self.total_steps = self._told = asked_steps
        self._progress, self._plan, self._ranks, self._pace = progress, plan, ranks, pace
        self._limit, self._clock = limit, clock
        if limit is None:
            progress.position = None
            return
        self._ends_at = limit.ends_at - (progress.seconds if limit.of_run else 0.0)
        if progress.position is None:
            progress.position = progress.step / asked_steps
        if ranks.any(self.left_seconds() <= 0)[0]:
            raise ConfigurationError(
                f"no time is left of what the run was given, of which it has taken {progress.seconds:,.0f} s before",
                "give more with --max-time or --finish-by, or leave it out to train all steps",
            )
        self._count()

    def left_seconds(self) -> float:
        """Return the seconds that are left."""
        return inf if self._limit is None else self._ends_at - self._clock()

    def place(self) -> float:
        """Return the place of the step to come in a schedule of all steps: its number, or its share of what is left."""
        progress = self._progress
        if progress.position is None:
            return progress.step
        left = self.total_steps - progress.step
        progress.position = 1.0 if left == 1 else progress.position + (1 - progress.position) / left
        return progress.position * self.total_steps - 1

    def recount(self) -> dict[str, Any] | None:
        """Count the steps that are left, after one was taken; return an event where it is news."""
        if self._limit is None:
            return None
        self._count()
        ended = self._progress.position == 1.0
        if abs(self.total_steps - self._told) <= (0 if ended else TOLD * self._told):
            return None
        self._told = self.total_steps
        event = {"kind": "event", "event": "rescheduled", "step": self._progress.step}
        return event | {"total_steps": self.total_steps, "left_seconds": self.left_seconds()}

    def _count(self) -> None:
        """Find the step by which evaluation, checkpoint and model are in time too, as the first rank counts.

        A step that ends the schedule is taken in any case, and none after it.
        """
        step, costs = self._progress.step, self._pace.costs(self._plan)
        last = self.asked_steps if costs is None else costs.last_within(step, self.asked_steps, self.left_seconds())
        (agreed,) = self._ranks.most(last if self._ranks.leads else -inf)
        self.total_steps = step if self._progress.position == 1.0 else max(int(agreed), step + 1)
