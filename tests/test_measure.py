"""Dry steps in real processes become trials: what fitted, what did not, and what died."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import psutil
import pytest
from test_planner import PROCESSOR
from tiny_models import workload

from autotune.errands import DRY_LENGTHS, EXPLORING_LENGTHS, Dry, Excerpt
from autotune.measure import Workers, _wait_for_memory, try_size
from autotune.plan import Trial, Workload
from trainer.data import write_store
from trainer.encode import Sample

GIB = 2**30
WORK = workload("llama", model="tiny", vocabulary_size=6400, max_seq_len=128, cpu_allocator="tight")


def tried(
    rows: int, limit_bytes: int = 8 * GIB, work: Workload = WORK, excerpt: Excerpt | None = None, **how: Any
) -> Trial:
    return try_size(errand(rows, limit_bytes, work, excerpt, how.pop("verify", True)), PROCESSOR, **how)


def errand(
    rows: int,
    limit_bytes: int = 8 * GIB,
    work: Workload = WORK,
    excerpt: Excerpt | None = None,
    verify: bool = True,
    budget_bytes: int = 8 * GIB,
    ranks: int = 1,
) -> Dry:
    return Dry(
        workload=work,
        device="cpu",
        micro_batch_size=rows,
        ranks=ranks,
        backend=None,
        verify=verify,
        budget_bytes=budget_bytes,
        limit_bytes=limit_bytes,
        excerpt=excerpt,
    )


@pytest.fixture(scope="module")
def plain() -> Trial:
    """Eight rows that fit, without real samples."""
    return tried(8, predicted_peak_bytes=5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows of up to 40 of 128 tokens, a tenth of them targets."""
    folder = tmp_path_factory.mktemp("store")
    samples = [Sample(list(range(2, 2 + length)), [(length - 4, length)]) for length in range(8, 41)]
    write_store(samples, folder, "causal", WORK.vocabulary_size)
    return str(folder)


@pytest.fixture(scope="module")
def on_samples(store: str) -> Trial:
    """The same eight rows, and real samples after."""
    return tried(8, excerpt=Excerpt(store=store, seed=42, share=16, sizes=(8, 2), layouts=(), answered=(store, 8)))


def test_a_size_that_fits_tells_peaks_and_times(plain: Trial) -> None:
    trial = plain
    assert trial.completed
    assert trial.peak_bytes == max(trial.phases.values())
    assert {"forward_backward", "optimizer", "evaluation"} <= trial.phases.keys()
    assert trial.resident_bytes is not None
    assert trial.resident_bytes < trial.peak_bytes < GIB
    assert [t.padded_tokens for t in trial.timings] == [round(8 * 128 * share) for share in DRY_LENGTHS]
    assert trial.seconds > 2 * sum(t.seconds for t in trial.timings)
    assert trial.predicted_peak_bytes == 5


def test_local_ranks_take_the_steps_together_and_the_weakest_is_told(plain: Trial, store: str) -> None:
    excerpt = Excerpt(store=store, seed=42, share=16, sizes=(8, 2), layouts=(), answered=(store, 8))
    trial = try_size(errand(8, excerpt=excerpt, ranks=2), PROCESSOR)
    assert trial.completed
    assert trial.verified
    assert plain.peak_bytes is not None
    assert trial.peak_bytes == pytest.approx(plain.peak_bytes, rel=0.1), "that of one rank"
    assert trial.peak_bytes == max(trial.phases.values())
    assert [t.padded_tokens for t in trial.timings] == [round(8 * 128 * share) for share in DRY_LENGTHS]
    assert [one.rows for one in trial.timed] == [8, 2]
    assert _workers() == []


def test_where_one_of_the_ranks_dies_the_size_does_not_fit() -> None:
    trials: list[Trial] = []
    thread = threading.Thread(target=lambda: trials.append(try_size(errand(8, ranks=2), PROCESSOR)))
    thread.start()
    while len(ranks := _workers(recursive=True)) < 2:
        time.sleep(0.01)
    os.kill(ranks[1], signal.SIGKILL)
    thread.join()
    assert trials[0].outcome == "killed"
    held = try_size(errand(8, limit_bytes=2**20, ranks=2), PROCESSOR)
    assert (held.outcome, "when it was stopped" in held.message) == ("out_of_memory", True)
    assert _workers(recursive=True) == []


def test_real_samples_are_timed_at_each_size_in_turn(on_samples: Trial, plain: Trial) -> None:
    timed = on_samples.timed
    assert [(one.rows, one.samples, len(one.seconds)) for one in timed] == [(8, 16, 3), (2, 16, 3)]
    assert all(seconds > 0 for one in timed for seconds in one.seconds)
    assert plain.timed == ()


@pytest.fixture(scope="module")
def many_rows(store: str) -> Trial:
    return tried(16, excerpt=Excerpt(store=store, seed=42, share=16, sizes=(16,), layouts=(), answered=(store, 8)))


def test_the_heaviest_real_micro_batches_hold_less_than_the_worst_case(many_rows: Trial, plain: Trial) -> None:
    trial = many_rows
    assert trial.expected_peak_bytes is not None
    assert trial.resident_bytes is not None
    assert trial.peak_bytes is not None
    assert trial.resident_bytes < trial.expected_peak_bytes < 0.8 * trial.peak_bytes
    assert plain.expected_peak_bytes is None


def test_a_size_over_the_budget_is_left_after_the_steps_that_tell_so(on_samples: Trial, store: str) -> None:
    excerpt = Excerpt(store=store, seed=42, share=16, sizes=(8, 2), layouts=(), answered=(store, 8))
    within, over = on_samples, try_size(errand(8, excerpt=excerpt, budget_bytes=0), PROCESSOR)
    assert (len(within.timings), len(over.timings)) == (len(DRY_LENGTHS), len(EXPLORING_LENGTHS))
    assert (within.verified, over.verified) == (True, False)
    assert (len(within.timed), len(over.timed)) == (2, 0)
    assert over.completed
    assert over.peak_bytes == pytest.approx(within.peak_bytes, rel=0.1)
    assert over.phases.keys() == within.phases.keys()


def test_a_worker_that_stands_by_takes_the_next_dry_steps_and_none_is_left() -> None:
    """Under the allocator's setting it was started for; what was started for the other one is ended."""
    with Workers() as workers:
        for allocator in ("fast", "tight", "tight"):
            workers.stand_by(PROCESSOR, allocator)
        while len(started := _workers()) < 3:  # a process that was just forked has not its own name yet
            time.sleep(0.01)
        trial = workers.try_size(errand(2, verify=False), PROCESSOR, None, None)
        assert trial.completed
        assert [t.padded_tokens for t in trial.timings] == [round(2 * 128 * share) for share in EXPLORING_LENGTHS]
        assert not trial.verified, "it only tells where to look"
        assert _workers() == started[2:], "the first of the right setting took it, and those before it are gone"
    assert _workers() == []


def _workers(*, recursive: bool = False) -> list[int]:
    found = []
    for child in psutil.Process().children(recursive=recursive):
        with suppress(psutil.NoSuchProcess):
            found += [child.pid] if "trainer.worker" in child.cmdline() else []
    return found


def test_more_rows_hold_more(many_rows: Trial, on_samples: Trial) -> None:
    few, many = on_samples.peak_bytes, many_rows.peak_bytes
    assert few is not None
    assert many is not None
    # Logits alone: 8 rows of 127 targets, 6400 fp32 numbers each, twice (with their gradient).
    assert many - few > 8 * 127 * 6400 * 4 * 2


def test_the_same_size_measures_the_same_twice(plain: Trial, on_samples: Trial) -> None:
    assert plain.peak_bytes == pytest.approx(on_samples.peak_bytes, rel=0.03)


def test_a_worker_that_exceeds_the_limit_is_stopped_and_does_not_fit() -> None:
    trial = tried(256, limit_bytes=GIB // 2)
    assert trial.outcome == "out_of_memory"
    assert trial.peak_bytes is None
    assert "GiB" in trial.message


def test_a_trial_that_takes_too_long_is_ended() -> None:
    trial = tried(256, limit_bytes=20 * GIB, time_limit_seconds=1.0)
    assert trial.outcome == "timed_out"
    assert trial.seconds < 10


def test_a_killed_worker_is_the_fact_that_it_does_not_fit() -> None:
    killer = threading.Thread(target=_kill_first_child)
    killer.start()
    trial = tried(64, limit_bytes=20 * GIB)
    killer.join()
    assert trial.outcome == "killed"
    assert "signal 9" in trial.message


def _kill_first_child() -> None:
    while True:
        for child in psutil.Process().children():
            if "trainer.worker" in child.cmdline():
                os.kill(child.pid, signal.SIGKILL)
                return
        time.sleep(0.01)


def test_an_allocation_that_fails_is_out_of_memory_and_no_bug() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (3 * GIB, before[1]))
    try:
        trial = tried(2048, limit_bytes=100 * GIB)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert trial.outcome == "out_of_memory"
    assert "memory" in trial.message


def test_what_is_no_memory_error_is_shown_and_not_taken_for_one() -> None:
    from autotune.errors import ConfigurationError

    broken: Workload = WORK.model_copy(update={"model": "no such model"})
    with pytest.raises(ConfigurationError):
        tried(1, GIB, broken)


def test_after_a_death_it_waits_until_the_card_has_its_memory_back() -> None:
    readings = iter([4 * GIB, 6 * GIB, 8 * GIB, 0])
    assert _wait_for_memory(8 * GIB, lambda: next(readings)) == ""
    assert next(readings) == 0, "and no longer"
    assert _wait_for_memory(8 * GIB, lambda: None) == "", "where nothing tells, it does not wait"


def test_memory_that_does_not_come_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.measure.GIVEN_BACK_SECONDS", 0.2)
    assert "3.00 GiB of the card were not given back" in _wait_for_memory(8 * GIB, lambda: 5 * GIB)
