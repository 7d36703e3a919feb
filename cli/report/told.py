"""The numbers of a run, made of its rows once: curves, totals, what the plan says of them. Writes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from autotune.plan import Forecast
from cli.history import History
from cli.report.charts import Point, smooth
from cli.report.events import Course, course

WINDOWS = 40
"""Of a run, each as wide as what its curves are smoothed over."""


@dataclass
class Told:
    """A run and what is made of its rows, once."""

    history: History
    name: str

    @cached_property
    def course(self) -> Course:
        """Steps and events in one order of time."""
        return course(self.history)

    def curve(self, column: str) -> list[Point]:
        """Return a column over steps."""
        return list(zip(self.history.columns["step"], self.history.columns[column], strict=True))

    def smoothed(self, column: str) -> list[Point]:
        """Return a column over steps, smoothed."""
        return smooth(self.curve(column), self.width)

    @property
    def width(self) -> int:
        """Steps that curves are smoothed over."""
        return max(3, len(self.history.columns["step"]) // WINDOWS)

    @property
    def seconds(self) -> float:
        """What the run took, of its own time."""
        happened = (one.seconds for one in self.course.happened)
        return max([0.0, *self.course.seconds[-1:], *happened])

    @property
    def step_seconds(self) -> float:
        """What its steps alone took."""
        return math.fsum(s for s in self.history.columns["seconds"] if s >= 0)

    @property
    def tokens_per_second(self) -> float:
        """Of its steps alone; nan where there are none."""
        return total(self.history.columns["tokens"]) / self.step_seconds if self.step_seconds else math.nan

    @property
    def samples_per_second(self) -> float:
        """Of its steps alone; nan where there are none."""
        return total(self.history.columns["samples"]) / self.step_seconds if self.step_seconds else math.nan

    @property
    def forecast(self) -> Forecast | None:
        """What the plan says that a run takes."""
        return self.history.plan.forecast if self.history.plan else None

    @property
    def planned_tokens_per_second(self) -> float | None:
        """What the plan's forecast says of this run's tokens."""
        cast, steps = self.forecast, len(self.history.columns["step"])
        if not cast or not steps or not cast.seconds_per_epoch:
            return None
        return total(self.history.columns["tokens"]) / steps / (cast.seconds_per_epoch / cast.steps_per_epoch)

    @property
    def planned_seconds(self) -> float | None:
        """What the plan says of the steps that were taken, evaluations included."""
        cast = self.forecast
        return cast.total_seconds * len(self.history.columns["step"]) / cast.total_steps if cast else None

    @property
    def peak_bytes(self) -> float:
        """Most bytes that were held, in steps, evaluations and answers; 0 where nothing is known."""
        others = [*self.history.validations, *self.history.events]
        held = [*self.history.columns["peak_memory_bytes"], *(row.get("peak_memory_bytes") or 0 for row in others)]
        return max((bytes_ for bytes_ in held if math.isfinite(bytes_)), default=0.0)

    @property
    def losses(self) -> tuple[float, float] | None:
        """The first and the last."""
        column = self.history.columns["loss"]
        return (column[0], column[-1]) if column else None

    @property
    def generation_seconds(self) -> float:
        """What went into answers."""
        return math.fsum(row.get("generation_seconds") or 0.0 for row in self.history.validations)

    def validation(self, name: str = "loss") -> list[Point]:
        """Return a value of each evaluation over steps; nan where it is no number."""
        return [(float(row["step"]), _number(row.get(name))) for row in self.history.validations]

    @property
    def best(self) -> Point | None:
        """Step and loss of the best evaluation."""
        return min((p for p in self.validation() if math.isfinite(p[1])), key=lambda p: p[1], default=None)


def total(values: Sequence[float]) -> float:
    """Return the sum, without what is no number."""
    return math.fsum(value for value in values if math.isfinite(value))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
