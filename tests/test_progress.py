"""Where a run is: the place of each step, its random numbers, its best, and what leaps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.progress import PATIENCE, Best, Watch, place_of, seed_of, told_differences


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 3))
def test_the_steps_of_an_epoch_take_each_place_of_its_order_once(samples: int, effective: int, epoch: int) -> None:
    steps = -(-samples // effective)
    places = [place_of(step, samples, effective) for step in range(epoch * steps, (epoch + 1) * steps)]
    assert {at for at, _ in places} == {epoch}
    order = list(range(samples))
    assert [i for _, place in places for i in order[place]] == order


def test_random_numbers_are_of_run_step_and_rank() -> None:
    seeds = {seed_of(run, step, rank) for run in (1, 2) for step in range(50) for rank in range(3)}
    assert len(seeds) == 300
    assert seed_of(1, 7, 2) == seed_of(1, 7, 2)


def test_the_best_is_the_least_loss_and_no_number_is_never_the_best() -> None:
    best = Best()
    assert not best.take(1, float("nan"))
    assert best.told() == {}
    assert best.take(2, 3.0)
    assert not best.take(3, 3.0)
    assert not best.take(4, float("inf"))
    assert (best.told(), best.without) == ({"best_step": 2, "best_loss": 3.0}, 2)
    assert best.take(5, 2.5)
    assert (best.step, best.without) == (5, 0)


def test_a_leap_is_seen_by_what_came_before_and_no_number_poisons_the_watch() -> None:
    watch = Watch()
    for i in range(200):
        assert watch.look(2.0 + 0.01 * (i % 7), 1.0) == {}
    assert watch.look(float("nan"), float("inf")) == {}
    assert watch.not_finite == 1 < PATIENCE
    leapt = watch.look(9.0, 1.0)
    assert (leapt["loss"], leapt["mean_loss"]) == (9.0, pytest.approx(2.03, abs=0.01))
    assert "gradient_norm" not in leapt
    assert (watch.not_finite, len(watch.losses)) == (0, 128)


def test_differences_are_told_by_name() -> None:
    assert told_differences({"epochs": 1, "seed": 4}, {"epochs": 2, "seed": 4, "clip": 1.0}) == [
        "epochs 1 -> 2",
        "clip None -> 1.0",
    ]
