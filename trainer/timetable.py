"""How many steps a run has, and where in its schedule each stands: by their number, or by the time that there is."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from typing import Any

from autotune.errands import Recipe, TimeLimit
from autotune.errors import ConfigurationError
from autotune.plan import Plan
from autotune.remaining import Pace
from trainer.progress import Progress
from trainer.ranks import Ranks
from trainer.schedule import is_warming_up, learning_rate_at, learning_rate_of

TOLD = 0.02
"""Change of the number of steps that is told of."""


class Timetable:
    """The steps of a run. Under a limit of time those left are counted anew after each, by what those before it took.

    Then the schedule is not of steps but of what is left of it: each step takes the part that it is of the steps left,
    so that the learning rate never leaps, and is at its end when the time is. One that goes on without a limit takes
    what is left of it in the steps that are left.
    """

    def __init__(
        self,
        asked_steps: int,
        progress: Progress,
        limit: TimeLimit | None,
        recipe: Recipe,
        plan: Plan,
        ranks: Ranks,
        pace: Pace,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.asked_steps = self.total_steps = self._told = asked_steps
        self._progress, self._recipe, self._plan, self._ranks = progress, recipe, plan, ranks
        self._limit, self._pace, self._clock = limit, pace, clock
        more = progress.step < asked_steps
        ended = progress.position == 1.0 and more
        if limit is None:
            if ended:  # with its time, and is to go on: as one whose epochs grew does
                progress.position = progress.step / asked_steps
            return
        self._ends_at = limit.ends_at - (progress.seconds if limit.of_run else 0.0)
        if more and ranks.any(self.left_seconds() <= 0)[0]:
            raise ConfigurationError(
                f"no time is left: the run has taken {progress.seconds:,.0f} s before, and this command what there was "
                "until its first step",
                "give more with --max-time or --finish-by, or leave it out to train all steps",
            )
        begins = progress.position is None or ended
        progress.position = 0.0 if begins else progress.position
        self._count()
        if begins:
            progress.position = progress.step / self.total_steps

    def left_seconds(self) -> float:
        """Return the seconds that are left."""
        return inf if self._limit is None else self._ends_at - self._clock()

    def next_rate(self) -> float:
        """Return the learning rate of the step to come, and count it as done in the schedule."""
        progress, step = self._progress, self._progress.step
        if progress.position is None:
            return learning_rate_at(step, self.total_steps, self._recipe)
        left = self.total_steps - step
        if left == 1:
            progress.position = 1.0
        elif not is_warming_up(step, self._recipe):
            progress.position += (1 - progress.position) / left
        return learning_rate_of(progress.position, step, self._recipe)

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
