"""Steps by the time that there is: the schedule is at its end when the time is, however fast the steps turn out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import facts
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.errands import Recipe, TimeLimit
from autotune.errors import ConfigurationError
from autotune.plan import Forecast
from autotune.remaining import Pace
from trainer.progress import Progress
from trainer.ranks import ALONE
from trainer.timetable import Timetable

RECIPE = facts.recipe()
FLOOR = 0.1 * RECIPE.learning_rate


@dataclass
class Clock:
    """A clock that goes as far as steps take."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def forecast_of(seconds: float) -> Forecast:
    """A plan's, of so many seconds a step and nothing between."""
    cast = facts.plan().forecast
    assert cast is not None
    return cast.model_copy(update={"seconds_per_epoch": seconds * cast.steps_per_epoch})


def trained(
    asked: int,
    limit: float | None,
    seconds_of_step: list[float],
    evaluation: float = 0.0,
    stop_at: int | None = None,
    progress: Progress | None = None,
    recipe: Recipe = RECIPE,
    told: Forecast | None = None,
) -> tuple[list[float], float, Progress]:
    """Rates of the steps that are taken, the seconds that all took, and how far it is."""
    clock, pace, progress = Clock(), Pace(), progress or Progress()
    before = progress.seconds
    timed = None if limit is None else TimeLimit(began_at=0.0, ends_at=limit, of_run=True)
    plan = facts.plan(forecast=told)
    table = Timetable(asked, progress, timed, recipe, plan, ALONE, pace, clock=clock)
    pace.add(
        {"kind": "event", "event": "started", "step": progress.step, "total_steps": table.total_steps,
         "evaluates_every": 50}
    )  # fmt: skip
    rates: list[float] = []
    while progress.step < table.total_steps and len(rates) != stop_at:
        rates.append(table.next_rate())
        taken = seconds_of_step[progress.step % len(seconds_of_step)]
        clock.now += taken
        progress.step += 1
        pace.add({"kind": "train", "step": progress.step, "seconds": taken})
        table.recount()
        if progress.step % 50 == 0 or progress.step == table.total_steps:
            clock.now += evaluation
            pace.add({"kind": "validation", "step": progress.step, "seconds": evaluation})
        progress.seconds = before + clock.now
    return rates, clock.now, progress


@settings(deadline=None)
@given(
    limit=st.floats(60, 400),
    steps=st.lists(st.floats(0.2, 1.8), min_size=1, max_size=40),
    evaluation=st.floats(0, 5),
)
def test_a_run_ends_with_its_time_and_its_rate_is_at_its_end_then(
    limit: float, steps: list[float], evaluation: float
) -> None:
    rates, seconds, _ = trained(100_000, limit, steps, evaluation)
    assert seconds == pytest.approx(limit, abs=0.05 * limit + 3 * max(steps) + evaluation)
    assert rates[-1] == pytest.approx(FLOOR)


@settings(deadline=None)
@given(
    limit=st.floats(60, 300),
    fast=st.floats(0.1, 1),
    slow=st.floats(1, 4),
    turn=st.integers(3, 60),
    schedule=st.sampled_from(["cosine", "linear", "one-cycle", "constant"]),
    warmup=st.sampled_from([0.0, 0.03, 0.3, 1, 10]),
)
def test_a_rate_never_leaps_whatever_becomes_of_the_speed(
    limit: float, fast: float, slow: float, turn: int, schedule: Any, warmup: float
) -> None:
    recipe = facts.recipe(schedule=schedule, warmup=warmup)
    rates, *_ = trained(100_000, limit, [fast] * turn + [slow] * 100_000, recipe=recipe)
    top = rates.index(max(rates))
    assert all(after >= before for before, after in pairwise(rates[: top + 1])), "it rises"
    assert all(after <= before for before, after in pairwise(rates[top:])), "and falls"
    # As the last step ends the schedule whatever is left of it, it may be another than the one before.
    steepest = max(abs(after - before) for before, after in pairwise([*rates[:-1], rates[-2]]))
    shortest = min(1.0, 3 * max(1 / limit, slow / limit) + (1 / max(1.0, warmup) if warmup else 1.0))
    assert steepest <= recipe.learning_rate * max(0.5, shortest)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "one-cycle"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 7])
def test_every_schedule_is_at_its_end_with_its_time(schedule: Any, warmup: float) -> None:
    recipe = facts.recipe(schedule=schedule, warmup=warmup)
    rates, *_ = trained(100_000, 120.0, [1.0, 0.5, 1.5], recipe=recipe)
    counted, *_ = trained(len(rates), None, [1.0], recipe=recipe)
    assert rates[-1] == pytest.approx(counted[-1], abs=0.01 * recipe.learning_rate)
    assert max(rates) == pytest.approx(recipe.learning_rate, rel=0.05)


@given(asked=st.integers(1, 200))
def test_where_all_steps_fit_the_time_each_has_the_rate_that_it_has_without_a_limit(asked: int) -> None:
    limited, *_ = trained(asked, 1e6, [1.0])
    plain, *_ = trained(asked, None, [1.0])
    warming = 1 + round(RECIPE.warmup * asked)
    assert limited[warming:] == pytest.approx(plain[warming:], abs=3 * RECIPE.learning_rate / asked)
    assert limited[-1] == pytest.approx(FLOOR)


def test_a_run_that_goes_on_has_what_is_left_of_its_time_and_of_its_schedule() -> None:
    first, seconds, progress = trained(100_000, 200.0, [1.0], stop_at=80)
    second, more, _ = trained(100_000, 200.0, [1.0], progress=progress)
    assert seconds + more == pytest.approx(200.0, abs=5.0)
    assert second[0] == pytest.approx(first[-1], rel=0.05)
    assert second[-1] == pytest.approx(FLOOR)


def test_a_run_whose_time_is_spent_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no time is left"):
        trained(100, 60.0, [1.0], progress=Progress(step=50, seconds=61.0))


def test_a_run_that_counted_steps_and_goes_on_by_time_begins_where_it_was_in_the_schedule() -> None:
    rates, *_ = trained(100, 30.0, [1.0], progress=Progress(step=50), told=forecast_of(1.0))
    whole, *_ = trained(80, None, [1.0])
    assert rates[0] == pytest.approx(whole[50], rel=0.1), "by the steps that have time: 30 of 80 are left"
    assert rates[-1] == pytest.approx(FLOOR)


def test_one_that_goes_on_without_a_limit_takes_what_is_left_of_its_schedule_and_leaps_nowhere() -> None:
    first, _, progress = trained(100_000, 200.0, [1.0], stop_at=80)
    second, *_ = trained(300, None, [1.0], progress=progress)
    assert len(second) == 220
    assert second[0] == pytest.approx(first[-1], rel=0.02)
    assert second[-1] == pytest.approx(FLOOR)


def test_one_that_ended_with_its_time_and_is_given_more_goes_on_as_one_of_more_epochs_does() -> None:
    _, _, progress = trained(100, 50.0, [1.0])
    assert progress.position == 1.0
    done = progress.step
    rates, *_ = trained(100_000, 150.0, [1.0], progress=progress, told=forecast_of(1.0))
    whole, *_ = trained(150, None, [1.0])
    assert rates[0] == pytest.approx(whole[done], rel=0.1)
    assert rates[-1] == pytest.approx(FLOOR)


def test_where_not_one_step_fits_the_schedule_is_ended_as_soon_as_that_is_known() -> None:
    rates, *_ = trained(100, 0.5, [3.0])
    assert len(rates) == 3, "the first warms up, the second tells, the third ends it"
    assert rates[-1] == pytest.approx(FLOOR)
