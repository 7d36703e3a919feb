"""Steps of a run, and their learning rates."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from facts import recipe
from hypothesis import given
from hypothesis import strategies as st

from trainer.schedule import learning_rate_at, steps_in


@given(
    total=st.integers(1, 500),
    warmup=st.one_of(st.floats(0, 0.99), st.integers(1, 50).map(float)),
    schedule=st.sampled_from(["cosine", "linear", "constant", "one-cycle"]),
)
def test_the_rate_peaks_at_exactly_what_was_asked_and_is_never_above_or_zero(
    total: int, warmup: float, schedule: str
) -> None:
    rates = [learning_rate_at(step, total, recipe(warmup=warmup, schedule=schedule)) for step in range(total)]
    assert max(rates) == pytest.approx(1e-3, rel=1e-12)
    assert min(rates) > 0
    peak = rates.index(max(rates))
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b for a, b in pairwise(rates[peak:]))


def test_where_each_schedule_ends() -> None:
    ends = {"cosine": 1e-4, "constant": 1e-3, "linear": 1e-3 / 97, "one-cycle": 1e-3 / 25 / 1e4}
    for schedule, rate in ends.items():
        assert learning_rate_at(99, 100, recipe(schedule=schedule)) == pytest.approx(rate), schedule


@pytest.mark.parametrize("div_factor", [10.0, 50.0])
def test_one_cycle_is_that_of_torch(div_factor: float) -> None:
    """Whose peak is at `pct_start` x steps - 1."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-3, total_steps=101, pct_start=31 / 101, div_factor=div_factor, cycle_momentum=False
    )
    ours = recipe(schedule="one-cycle", warmup=30, div_factor=div_factor)
    for step in range(101):
        assert learning_rate_at(step, 101, ours) == pytest.approx(torchs.get_last_lr()[0], rel=1e-6), step
        optimizer.step()
        if step < 100:
            torchs.step()


@pytest.mark.parametrize(
    ("samples", "effective", "changes", "steps"),
    [
        (3000, 64, {}, 47),
        (3000, 64, {"epochs": 2}, 94),
        (3000, 64, {"max_steps": 5}, 5),
        (10, 64, {}, 1),
        (128, 64, {"epochs": 0.5}, 1),
    ],
)
def test_no_sample_is_dropped_and_none_counted_twice(
    samples: int, effective: int, changes: dict[str, Any], steps: int
) -> None:
    assert steps_in(samples, effective, recipe(**changes)) == steps
