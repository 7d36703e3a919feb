"""Whole small runs that have only so much time, and those of a rehearsal, of the longest samples."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from small_runs import going_on, of_kind, run, small_errand, stopping_at

from autotune.errands import TimeLimit
from autotune.errors import ConfigurationError
from trainer.data import TokenStore, open_store


def limit_of(seconds: float, *, of_run: bool = True) -> TimeLimit:
    return TimeLimit(began_at=time.time(), ends_at=time.time() + seconds, of_run=of_run)


def test_a_run_of_so_much_time_ends_its_schedule_and_evaluates_and_saves_in_it(tmp_path: Path) -> None:
    limit = limit_of(4.0)
    rows = run(small_errand(tmp_path, "llama", epochs=10_000.0, time_limit=limit))
    steps = of_kind(rows, "train")
    assert 3 < len(steps) < 30_000
    assert steps[-1]["learning_rate"] == pytest.approx(0.1 * 1e-3), "a cosine's end"
    assert of_kind(rows, "validation")[-1]["step"] == steps[-1]["step"]
    assert of_kind(rows, "rescheduled")[-1]["total_steps"] == pytest.approx(len(steps), rel=0.1)
    assert of_kind(rows, "finished")
    assert (tmp_path / "run" / "model").exists()
    assert all(row["seconds"] > 1e-4 for row in steps), "no step's time is counted to what was told of it"


def test_a_run_that_goes_on_has_taken_some_of_its_time(tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama", epochs=10_000.0, time_limit=limit_of(300.0))
    run(errand, stopping_at(5))
    with pytest.raises(ConfigurationError, match="no time is left: the run has taken"):
        run(going_on(errand, time_limit=limit_of(1e-2)))
    # By the clock it is not what the run has taken that counts.
    rows = run(going_on(errand, time_limit=limit_of(2.0, of_run=False)))
    assert of_kind(rows, "finished")
    assert of_kind(rows, "train")[-1]["learning_rate"] == pytest.approx(0.1 * 1e-3)


def test_a_rehearsal_trains_and_evaluates_on_the_longest_samples(tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama", longest=4, epochs=1.0)
    whole, store = TokenStore(Path(errand.store)), open_store(Path(errand.store), 4)
    lengths = sorted(len(whole.tokens(i)) for i in range(len(whole)))
    assert sorted(len(store.tokens(i)) for i in range(len(store))) == lengths[-4:]
    assert all(store.spans(i).max() <= len(store.tokens(i)) for i in range(len(store)))
    rows = run(errand)
    assert sum(row["tokens"] for row in of_kind(rows, "train")) == sum(lengths[-4:])
    assert of_kind(rows, "validation")[0]["samples"] == 4


@pytest.mark.parametrize("count", [22, 23, 24])
def test_no_more_are_taken_than_there_are(count: int, tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama")
    assert len(open_store(Path(errand.store), count)) == min(count, 23)
