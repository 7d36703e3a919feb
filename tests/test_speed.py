"""Speed from exact timings, and the speeds by which sizes are compared."""

from __future__ import annotations

import pytest
from facts import batching, clocked, completed, out_of_memory, speed, timed, workload
from hypothesis import example, given
from hypothesis import strategies as st

from autotune.errands import DRY_LENGTHS
from autotune.plan import Timed
from autotune.speed import beats, compile_seconds, fastest, measure_speed, rows_per_second, seconds_per_sample

seconds_of_a_step = st.floats(1e-6, 100)
SLACK = 1e-9
"""Relative; sums of floats are not exact."""


@given(
    alpha=st.floats(0, 1),
    beta=st.floats(1e-7, 1e-3),
    rows=st.integers(1, 64),
    first=st.floats(0, 1000),
)
def test_alpha_and_beta_are_recovered_from_exact_timings_whatever_the_first_step_took(
    alpha: float, beta: float, rows: int, first: float
) -> None:
    lengths = [rows * int(512 * share) for share in DRY_LENGTHS]
    timings = [(tokens, alpha + beta * tokens) for tokens in lengths]
    found = measure_speed(timed(rows, (lengths[0], first), *timings[1:]), workload(), batching(micro_batch_size=rows))
    assert found is not None
    assert found.beta_seconds_per_token == pytest.approx(beta, rel=1e-6)
    assert found.alpha_seconds == pytest.approx(alpha, rel=1e-6, abs=1e-6)


def test_a_step_takes_what_its_micro_batches_take_and_rates_count_all_ranks() -> None:
    alpha, beta = 0.01, 2e-6
    timings = [(tokens, alpha + beta * tokens) for tokens in (10_240, 10_240, 5_120)]
    found = measure_speed(timed(20, *timings), workload(max_seq_len=512), batching())
    assert found is not None
    step = 6 * (alpha + beta * 20 * 512)
    assert found.seconds_per_step == pytest.approx(step)
    assert found.samples_per_second == pytest.approx(240 / step)
    assert found.tokens_per_second == pytest.approx(240 * 512 / step)


def test_a_seq2seq_row_costs_its_source_and_its_target() -> None:
    work = workload(task="seq2seq", max_seq_len=96, max_target_len=32)
    found = measure_speed(timed(20, (1, 9.0), (2_560, 0.256), (1_280, 0.128)), work, batching())
    assert found is not None
    assert found.seconds_per_step == pytest.approx(6 * 0.256)
    assert found.tokens_per_second == pytest.approx(240 * 128 / (6 * 0.256))


@given(timings=st.lists(st.tuples(st.integers(1, 100_000), seconds_of_a_step), min_size=1, max_size=4))
@example([(69_954, 5.313367254651572), (96_422, 9.806276928384404), (92_398, 4.626498890763361)])
def test_neither_term_is_ever_negative(timings: list[tuple[int, float]]) -> None:
    found = measure_speed(timed(8, (1, 1.0), *timings), workload(), batching())
    assert found is not None
    assert found.alpha_seconds >= 0
    assert found.beta_seconds_per_token >= 0


@given(timings=st.lists(st.tuples(st.integers(1, 100_000), seconds_of_a_step), min_size=1, max_size=4))
def test_the_line_goes_through_the_mean_of_the_timings(timings: list[tuple[int, float]]) -> None:
    found = measure_speed(timed(8, (1, 1.0), *timings), workload(), batching())
    assert found is not None
    tokens, seconds = (sum(values) / len(timings) for values in zip(*timings, strict=True))
    assert found.alpha_seconds + found.beta_seconds_per_token * tokens == pytest.approx(seconds)
    assert found.alpha_seconds >= -SLACK * seconds
    assert found.beta_seconds_per_token >= 0


def test_longer_rows_that_were_faster_are_noise_and_each_micro_batch_costs_the_same() -> None:
    found = measure_speed(timed(8, (1, 9.0), (1000, 0.2), (2000, 0.1)), workload(), batching())
    assert found is not None
    assert found.alpha_seconds == pytest.approx(0.15)
    assert found.beta_seconds_per_token == 0


def test_a_line_that_would_start_below_zero_starts_at_zero() -> None:
    found = measure_speed(timed(8, (1, 9.0), (1000, 0.1), (3000, 0.7)), workload(), batching())
    assert found is not None
    assert found.alpha_seconds == pytest.approx(0)
    assert found.beta_seconds_per_token == pytest.approx(0.4 / 2000)


def test_without_timings_there_is_no_speed() -> None:
    assert measure_speed(timed(8), workload(), batching()) is None
    assert measure_speed(timed(8, (4096, 1.0)), workload(), batching()) is None, "the first one warms up"


# The speed by which sizes are compared.


def test_what_compiling_costs_is_what_the_first_step_took_beyond_the_others() -> None:
    trial = timed(8, (4096, 20.5), (2048, 0.25), (4096, 0.5), (4096, 0.6))
    assert compile_seconds(trial) == pytest.approx(2 * (20.5 - 0.25))


def test_rows_per_second_are_those_of_the_best_full_length_step_after_the_first() -> None:
    trial = timed(8, (4096, 0.01), (2048, 0.02), (4096, 0.4), (4096, 0.5))
    assert rows_per_second(trial) == pytest.approx(8 / 0.4)


def test_a_trial_that_was_not_timed_or_did_not_complete_has_no_rows_per_second() -> None:
    assert rows_per_second(completed(8, {"forward_backward": 1})) == 0
    assert rows_per_second(timed(8, (4096, 0.1))) == 0
    assert rows_per_second(out_of_memory(8)) == 0
    assert rows_per_second(timed(8, (4096, 0.1), (4096, 0.1), outcome="killed")) == 0


def test_a_smaller_size_is_faster_only_if_it_was_each_time() -> None:
    own = clocked(16, 1.6, 1.7, 1.6)
    assert fastest([], 1.05) is None
    assert fastest([own], 1.05) is None
    assert fastest([own, clocked(8, 1.0, 1.0, 1.0), clocked(4, 0.8, 0.8, 0.8)], 1.05) == clocked(4, 0.8, 0.8, 0.8)
    assert fastest([own, clocked(8, 1.0, 1.0, 1.59), clocked(4, 1.6, 1.6, 1.6)], 1.05) is None
    assert fastest([own, clocked(8, 1.54, 1.54, 1.54)], 1.05) is None, "by four per cent"


def test_the_time_of_a_sample_is_what_was_timed_and_between_sizes_a_line_in_1_over_rows() -> None:
    """A micro-batch takes 0.4 s to begin and 0.1 s a row."""
    known = [
        Timed(layout="fixed", rows=rows, samples=8, padded_tokens=(512,), seconds=(8 / rows * 0.4 + 0.8,))
        for rows in (8, 2)
    ]
    assert seconds_per_sample(2, known, None, 512) == (pytest.approx(0.3), True)
    assert seconds_per_sample(4, known, None, 512) == (pytest.approx(0.2), False)
    assert seconds_per_sample(1, known, None, 512) == (pytest.approx(0.5), False)
    assert seconds_per_sample(16, known, None, 512) == (pytest.approx(0.125), False)
    assert seconds_per_sample(3, known[:1], None, 512) is None


def test_without_real_samples_the_time_of_a_sample_is_by_alpha_and_beta() -> None:
    made = speed(alpha_seconds=0.4, beta_seconds_per_token=0.001)
    assert seconds_per_sample(4, (), made, 100) == (pytest.approx(0.2), False)
    assert seconds_per_sample(4, (), None, 100) is None


def test_a_trial_beats_another_only_if_it_did_so_in_each_step() -> None:
    slow = timed(2, (1024, 9.0), (1024, 0.5), (512, 0.1), (1024, 0.4))  # 0.25 and 0.20 s a row
    quick = timed(8, (4096, 9.0), (4096, 1.2), (2048, 9.0), (4096, 1.4))  # 0.15 and 0.175
    assert beats(quick, slow, 1.05)
    assert not beats(quick, slow, 1.2)
    assert not beats(slow, quick, 1.0)
    assert not beats(timed(8), slow, 1.0)
    assert not beats(quick, timed(2), 1.0)
