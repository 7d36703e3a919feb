"""Padding against brute force, speed from exact timings, and a run's steps and seconds by hand."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import product
from math import ceil, prod

import pytest
from facts import batching, completed, out_of_memory, speed, timed, workload
from hypothesis import example, given
from hypothesis import strategies as st

from autotune.batching import largest_share
from autotune.errands import DRY_LENGTHS
from autotune.forecast import (
    Histogram,
    beats,
    compile_seconds,
    expected_longest,
    fastest,
    forecast,
    measure_speed,
    plain_shape,
    rounded,
    rows_per_second,
    seconds_per_sample,
)
from autotune.plan import Batching, Forecast, Speed, Timed

histograms = st.dictionaries(st.integers(1, 600), st.integers(1, 50), min_size=1, max_size=5).map(
    lambda counts: sorted(counts.items())
)
seconds_of_a_step = st.floats(1e-6, 100)
SLACK = 1e-9
"""Relative; sums of floats are not exact."""


def enumerated_longest(histogram: Histogram, draws: int) -> Fraction:
    """The mean of the longest, over all ways to draw with their chances."""
    total = sum(count for _, count in histogram)
    return sum(
        (
            max(length for length, _ in drawn) * prod((Fraction(count, total) for _, count in drawn), start=Fraction(1))
            for drawn in product(histogram, repeat=draws)
        ),
        start=Fraction(0),
    )


# The longest of some rows.


@given(histogram=histograms, draws=st.integers(1, 4))
def test_the_expected_longest_is_that_of_all_ways_to_draw(histogram: Histogram, draws: int) -> None:
    assert expected_longest(histogram, draws) == pytest.approx(float(enumerated_longest(histogram, draws)))


@given(histogram=histograms)
def test_the_expected_longest_of_one_draw_is_the_mean(histogram: Histogram) -> None:
    samples = sum(count for _, count in histogram)
    assert expected_longest(histogram, 1) == pytest.approx(sum(length * n for length, n in histogram) / samples)


@given(histogram=histograms, draws=st.integers(1, 300), more=st.integers(0, 300))
def test_more_draws_are_never_expected_to_be_shorter_nor_longer_than_the_longest_there_is(
    histogram: Histogram, draws: int, more: int
) -> None:
    fewer, many = expected_longest(histogram, draws), expected_longest(histogram, draws + more)
    assert fewer <= many * (1 + SLACK)
    assert many <= histogram[-1][0] * (1 + SLACK)


def test_many_draws_find_the_longest() -> None:
    assert expected_longest([(10, 99), (500, 1)], 10_000) == pytest.approx(500)


# Rounding up.


@given(histogram=histograms, multiple=st.integers(1, 64), spare=st.integers(0, 100))
def test_lengths_are_rounded_up_to_the_next_multiple_or_to_the_limit_and_no_sample_is_lost(
    histogram: Histogram, multiple: int, spare: int
) -> None:
    limit = histogram[-1][0] + spare
    result = rounded(histogram, multiple, limit)
    for (before, _), (after, _) in zip(histogram, result, strict=True):
        assert before <= after < before + multiple
        assert after % multiple == 0 or after == limit
    assert [count for _, count in result] == [count for _, count in histogram]
    assert result == sorted(result, key=lambda pair: pair[0])


@given(histogram=histograms, multiple=st.integers(1, 64), draws=st.integers(1, 100))
def test_lengths_that_became_equal_count_as_one(histogram: Histogram, multiple: int, draws: int) -> None:
    result = rounded(histogram, multiple, 600)
    merged: Counter[int] = Counter()
    for length, count in result:
        merged[length] += count
    assert expected_longest(result, draws) == pytest.approx(expected_longest(sorted(merged.items()), draws))


def test_lengths_are_rounded_to_8_but_not_over_the_limit() -> None:
    assert rounded([(1, 5), (8, 4), (9, 3), (99, 2), (100, 1)], 8, 100) == [(8, 5), (8, 4), (16, 3), (100, 2), (100, 1)]


# Speed.


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


# A run.


def forecast_of(
    samples: int,
    epochs: float,
    max_steps: int | None,
    lengths: list[Histogram],
    validation: list[Histogram],
    plan: Batching,
    speed: Speed,
    timed: Timed | None,
    eval_every: int | None = None,
) -> Forecast:
    """Of plain rows, of these lengths as they are."""
    share = largest_share(min(samples, plan.effective_batch_size), plan.world_size)
    rows, evaluated = plan.micro_batch_size, sum(count for _, count in validation[0]) if validation else 0
    shapes = plain_shape(lengths, rows, share), plain_shape(validation, rows, evaluated)
    return forecast(samples, epochs, max_steps, eval_every, shapes[0], shapes[1].padded_tokens, plan, speed, timed)


def test_3000_samples_at_64_take_47_steps_an_epoch() -> None:
    plan = batching(effective_batch_size=64, world_size=1, micro_batch_size=64, gradient_accumulation_steps=1)
    result = forecast_of(
        3000, 3.0, None, [[(512, 3000)]], [], plan, speed(alpha_seconds=0.0, beta_seconds_per_token=1e-6), None
    )
    assert (result.rows, result.epochs) == (3000, 3.0)
    assert (result.steps_per_epoch, result.total_steps) == (47, 141)
    assert result.seconds_per_epoch == pytest.approx(3000 * 512 * 1e-6), "the last step is smaller, and takes less"
    assert result.total_seconds == pytest.approx(3 * result.seconds_per_epoch)
    assert result.padded_tokens_per_sample == pytest.approx(512)


def test_each_rank_takes_its_share_of_the_seconds_and_each_micro_batch_its_alpha() -> None:
    result = forecast_of(
        24_000, 1.0, None, [[(100, 1)]], [], batching(), speed(alpha_seconds=0.5, beta_seconds_per_token=1.0), None
    )
    assert result.seconds_per_epoch == pytest.approx(100 * 6 * 0.5 + 24_000 / 2 * 100)


def test_the_optimizer_takes_its_time_once_a_step_however_small_that_is() -> None:
    plan = batching(effective_batch_size=64, world_size=1)
    result = forecast_of(
        65,
        1.0,
        None,
        [[(8, 65)]],
        [],
        plan,
        speed(alpha_seconds=0.0, beta_seconds_per_token=0.0, update_seconds=3.0),
        None,
    )
    assert result.total_seconds == pytest.approx(2 * 3.0)
    found = measure_speed(timed(64, (1, 9.0), (64, 0.1), (64, 0.1), update_seconds=3.0), workload(), plan)
    assert found is not None
    assert found.update_seconds == 3.0
    assert found.seconds_per_step == pytest.approx(
        4 * found.alpha_seconds + 64 * 512 * found.beta_seconds_per_token + 3.0
    )


def clocked(rows: int, *seconds: float) -> Timed:
    return Timed(layout="fixed", rows=rows, samples=16, padded_tokens=(1024,) * len(seconds), seconds=seconds)


def test_a_smaller_size_is_faster_only_if_it_was_each_time() -> None:
    own = clocked(16, 1.6, 1.7, 1.6)
    assert fastest([], 1.05) is None
    assert fastest([own], 1.05) is None
    assert fastest([own, clocked(8, 1.0, 1.0, 1.0), clocked(4, 0.8, 0.8, 0.8)], 1.05) == clocked(4, 0.8, 0.8, 0.8)
    assert fastest([own, clocked(8, 1.0, 1.0, 1.59), clocked(4, 1.6, 1.6, 1.6)], 1.05) is None
    assert fastest([own, clocked(8, 1.54, 1.54, 1.54)], 1.05) is None, "by four per cent"


def test_a_run_takes_what_its_samples_took() -> None:
    plan = batching(effective_batch_size=64, world_size=1, micro_batch_size=16)
    slow = speed(alpha_seconds=100.0, update_seconds=0.5)
    result = forecast_of(640, 1.0, None, [[(64, 640)]], [], plan, slow, clocked(16, 9.0, 2.0, 1.0))
    assert result.total_seconds == pytest.approx(10 * (4 * 2.0 + 0.5))


def test_validation_comes_after_each_epoch_begun_and_costs_what_evaluating_its_tokens_does() -> None:
    plan = batching(effective_batch_size=64, world_size=1, micro_batch_size=8)
    quick = speed(evaluation_seconds_per_token=0.01)
    result = forecast_of(640, 1.5, None, [[(8, 640)]], [[(16, 30)]], plan, quick, None)
    assert result.validation_seconds == pytest.approx(30 * 16 * 0.01)
    assert result.total_seconds == pytest.approx(1.5 * result.seconds_per_epoch + 2 * result.validation_seconds)
    often = forecast_of(640, 1.5, None, [[(8, 640)]], [[(16, 30)]], plan, quick, None, eval_every=4)
    assert often.total_seconds - result.total_seconds == pytest.approx(2 * result.validation_seconds), "4, 8, 12, 15"


def test_source_and_target_are_padded_each_to_its_own_longest() -> None:
    source, target = [(10, 1), (20, 1)], [(2, 1), (4, 1)]
    pairs = batching(effective_batch_size=2, world_size=1, micro_batch_size=2, gradient_accumulation_steps=1)
    result = forecast_of(2, 1.0, None, [source, target], [], pairs, speed(), None)
    assert result.padded_tokens_per_sample == pytest.approx(17.5 + 3.5), "three pairs of four hold a long one"


@pytest.mark.parametrize(("epochs", "steps"), [(0.001, 1), (0.5, 24), (1.0, 47), (1.5, 71)])
def test_a_part_of_an_epoch_takes_the_steps_it_begins_and_never_none(epochs: float, steps: int) -> None:
    plan = batching(effective_batch_size=64, world_size=1)
    result = forecast_of(3000, epochs, None, [[(512, 1)]], [], plan, speed(), None)
    assert result.total_steps == steps
    assert result.total_seconds == pytest.approx(result.seconds_per_epoch * steps / 47)


@pytest.mark.parametrize(("max_steps", "steps"), [(10, 10), (94, 94), (500, 94)])
def test_max_steps_cut_a_run_and_never_lengthen_it(max_steps: int, steps: int) -> None:
    plan = batching(effective_batch_size=64, world_size=1)
    result = forecast_of(3000, 2.0, max_steps, [[(512, 1)]], [], plan, speed(), None)
    assert result.total_steps == steps
    assert result.total_seconds == pytest.approx(result.seconds_per_epoch * steps / 47)


def test_fewer_samples_than_a_step_takes_are_one_step_of_them_all() -> None:
    plan = batching(effective_batch_size=64, world_size=2, micro_batch_size=8, gradient_accumulation_steps=4)
    result = forecast_of(
        5, 1.0, None, [[(10, 5)]], [], plan, speed(alpha_seconds=1.0, beta_seconds_per_token=1.0), None
    )
    assert (result.steps_per_epoch, result.total_steps) == (1, 1)
    assert result.seconds_per_epoch == pytest.approx(1 + 3 * 10), "the first rank takes three in one micro-batch"
    assert result.padded_tokens_per_sample == pytest.approx(10)


@given(
    samples=st.integers(1, 5000),
    effective=st.integers(1, 300),
    world_size=st.integers(1, 8),
    rows=st.integers(1, 40),
    histogram=histograms,
)
def test_padding_lies_between_the_mean_and_the_longest_and_grows_with_the_micro_batch(
    samples: int, effective: int, world_size: int, rows: int, histogram: Histogram
) -> None:
    plans = [
        batching(effective_batch_size=effective, world_size=world_size, micro_batch_size=size) for size in (1, rows)
    ]
    single, several = (
        forecast_of(samples, 1.0, None, [histogram], [], plan, speed(), None).padded_tokens_per_sample for plan in plans
    )
    assert single == pytest.approx(expected_longest(histogram, 1))
    assert single * (1 - SLACK) <= several <= histogram[-1][0] * (1 + SLACK)


@given(samples=st.integers(1, 5000), effective=st.integers(1, 300), epochs=st.integers(1, 9))
def test_whole_epochs_add_up(samples: int, effective: int, epochs: int) -> None:
    plan = batching(effective_batch_size=effective, world_size=1, micro_batch_size=effective)
    result = forecast_of(samples, epochs, None, [[(8, 1)]], [], plan, speed(), None)
    assert result.steps_per_epoch == ceil(samples / effective)
    assert result.total_steps == epochs * result.steps_per_epoch
    assert result.total_seconds == pytest.approx(epochs * result.seconds_per_epoch)


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
