"""The numbers of a run, made of its rows once: curves, totals, what the plan says of them. Writes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from autotune.plan import Forecast
from cli.history import History
from cli.report.charts import Point, smooth, smooth_rate
from cli.report.events import Course, course
from cli.report.measures import as_number

FEW = 0.02
"""Share, of values or of time, that a chart need not show as high as it is."""
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

    def smoothed_speed(self) -> list[Point]:
        """Return tokens a second over steps, smoothed: of many steps together, as `tokens_per_second` is of all."""
        columns = self.history.columns
        return smooth_rate(columns["step"], columns["tokens"], columns["seconds"], self.width)

    @property
    def width(self) -> int:
        """Steps that curves are smoothed over: as many before as after each, and itself."""
        return max(3, len(self.history.columns["step"]) // WINDOWS | 1)

    @property
    def seconds(self) -> float:
        """What the run took, of its own time."""
        happened = (one.seconds for one in self.course.happened)
        return max([0.0, *self.course.seconds[-1:], *happened])

    @property
    def tokens_per_second(self) -> float:
        """Of its steps alone; nan where they do not say."""
        return self._rate("tokens")

    @property
    def samples_per_second(self) -> float:
        """Of its steps alone; nan where they do not say."""
        return self._rate("samples")

    @property
    def usual_speed(self) -> float:
        """Tokens a second that were not passed but in FEW of the time; nan where steps do not say.

        A step that took next to no time says next to nothing, however many there are.
        """
        both = zip(self.history.columns["tokens"], self.history.columns["seconds"], strict=True)
        known = [(tokens / seconds, seconds) for tokens, seconds in both if math.isfinite(tokens) and seconds > 0]
        left = FEW * math.fsum(seconds for _, seconds in known)
        for speed, seconds in sorted(known, reverse=True):
            left -= seconds
            if left < 0:
                return speed
        return math.nan

    def _rate(self, column: str) -> float:
        both = zip(self.history.columns[column], self.history.columns["seconds"], strict=True)
        known = [(amount, seconds) for amount, seconds in both if math.isfinite(amount) and seconds >= 0]
        taken = math.fsum(seconds for _, seconds in known)
        return math.fsum(amount for amount, _ in known) / taken if taken else math.nan

    @property
    def forecast(self) -> Forecast | None:
        """What the plan says that a run takes."""
        return self.history.plan.forecast if self.history.plan else None

    @property
    def planned_tokens_per_second(self) -> float | None:
        """What the plan's forecast says of this run's tokens."""
        cast, tokens = self.forecast, [n for n in self.history.columns["tokens"] if math.isfinite(n)]
        if not cast or not tokens or not cast.seconds_per_epoch:
            return None
        return math.fsum(tokens) / len(tokens) / (cast.seconds_per_epoch / cast.steps_per_epoch)

    @property
    def planned_seconds(self) -> float | None:
        """What the plan says of the steps that were taken, evaluations included."""
        return self.planned_seconds_of(len(self.history.columns["step"]))

    def planned_seconds_of(self, steps: int) -> float | None:
        """Return what so many steps take at the pace of the plan, evaluations included."""
        return self.forecast.total_seconds * steps / self.forecast.total_steps if self.forecast else None

    @property
    def steps_in_all(self) -> int:
        """Steps of the whole run, as far as it says."""
        return max(self.history.total_steps, self.history.steps)

    @property
    def was_extended(self) -> bool:
        """Whether the run has more steps than its plan was asked for: it went on with more epochs, or steps."""
        return self.forecast is not None and self.steps_in_all > self.forecast.asked_steps

    @property
    def peak_bytes(self) -> float:
        """Most bytes that were held, in steps, evaluations and answers; 0 where nothing is known."""
        others = [*self.history.validations, *self.history.events]
        held = [
            *self.history.columns["peak_memory_bytes"],
            *(as_number(row.get("peak_memory_bytes")) for row in others),
        ]
        return max((bytes_ for bytes_ in held if math.isfinite(bytes_)), default=0.0)

    @property
    def losses(self) -> tuple[float, float] | None:
        """The first and the last."""
        column = self.history.columns["loss"]
        return (column[0], column[-1]) if column else None

    @property
    def generation_seconds(self) -> float:
        """What went into answers."""
        return total([as_number(row.get("generation_seconds")) for row in self.history.validations])

    def validation(self, name: str = "loss") -> list[Point]:
        """Return a value of each evaluation over steps; nan where it is no number."""
        return [(float(row["step"]), as_number(row.get(name))) for row in self.history.validations]

    @property
    def best(self) -> Point | None:
        """Step and loss of the best evaluation."""
        return min((p for p in self.validation() if math.isfinite(p[1])), key=lambda p: p[1], default=None)


def total(values: Sequence[float]) -> float:
    """Return the sum, without what is no number."""
    return math.fsum(value for value in values if math.isfinite(value))
