"""A run's steps and seconds by hand."""

from __future__ import annotations

from math import ceil

import pytest
from facts import batching, clocked, course, plan, recipe, saving, speed, timed, workload
from hypothesis import given
from hypothesis import strategies as st
from test_planner import data_of

from autotune.batching import largest_share
from autotune.forecast import Evaluation, forecast, forecast_anew, forecast_run, uncertainty
from autotune.inputs import Course
from autotune.plan import Answering, Batching, Forecast, Speed, Timed
from autotune.shapes import Histogram, expected_longest, plain_shape
from autotune.speed import measure_speed

histograms = st.dictionaries(st.integers(1, 600), st.integers(1, 50), min_size=1, max_size=5).map(
    lambda counts: sorted(counts.items())
)
SLACK = 1e-9
"""Relative; sums of floats are not exact."""


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
    cost = shapes[1].padded_tokens * speed.evaluation_seconds_per_token
    run = course(data_of(samples), epochs=epochs, max_steps=max_steps, eval_every=eval_every)
    return forecast(run, shapes[0], Evaluation(cost, 0.0, 0.0), plan, speed, timed, 0.15)


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


@given(samples=st.integers(1, 5000), effective=st.integers(1, 300), epochs=st.integers(1, 9))
def test_whole_epochs_add_up(samples: int, effective: int, epochs: int) -> None:
    plan = batching(effective_batch_size=effective, world_size=1, micro_batch_size=effective)
    result = forecast_of(samples, epochs, None, [[(8, 1)]], [], plan, speed(), None)
    assert result.steps_per_epoch == ceil(samples / effective)
    assert result.total_steps == epochs * result.steps_per_epoch
    assert result.total_seconds == pytest.approx(epochs * result.seconds_per_epoch)


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


# What comes between steps, and a limit of time.


def limited(max_seconds: float | None, evaluation: Evaluation, **changes: object) -> Forecast:
    """100 steps of a second each."""
    plan = batching(effective_batch_size=64, world_size=1, micro_batch_size=64)
    shape = plain_shape([[(8, 6400)]], 64, 64)
    each = speed(alpha_seconds=1.0, beta_seconds_per_token=0.0)
    run = Course(recipe(eval_every=10), saving(**changes), data_of(6400), None, max_seconds)
    return forecast(run, shape, evaluation, plan, each, None, 0.15)


def test_answers_and_checkpoints_are_counted_with_each_evaluation_and_the_model_at_the_end() -> None:
    found = limited(None, Evaluation(0.5, 2.0, 0.25))
    assert (found.evaluations, found.checkpoints) == (10, 10), "each may be the best so far, and is saved then"
    assert found.total_seconds == pytest.approx(100 + 10 * 2.5 + 10 * 0.25 + 2 * 0.25), "the best model is saved too"


@given(
    max_seconds=st.floats(3, 400),
    validation=st.floats(0, 5),
    answers=st.floats(0, 5),
    saves=st.floats(0, 3),
    every=st.none() | st.integers(1, 200),
    seconds=st.none() | st.floats(1, 100),
)
def test_as_many_steps_are_taken_as_fit_the_time_with_all_that_comes_between_and_not_one_more(
    max_seconds: float, validation: float, answers: float, saves: float, every: int | None, seconds: float | None
) -> None:
    parts = Evaluation(validation, answers, saves)
    found = limited(max_seconds, parts, every_steps=every, every_seconds=seconds)
    assert found.asked_steps == 100
    assert found.total_seconds <= max_seconds or found.total_steps == 1
    if found.total_steps < 100:
        more = limited(None, parts, every_steps=every, every_seconds=seconds)
        assert more.total_seconds > max_seconds
        enough = max_seconds + 2 + validation + answers + 3 * saves
        longer = limited(enough, parts, every_steps=every, every_seconds=seconds)
        assert longer.total_steps > found.total_steps


def test_repeats_that_lay_apart_make_a_forecast_less_sure() -> None:
    assert uncertainty(None) == uncertainty(clocked(8, 1.0, 1.1, 1.2)) == 0.15
    assert uncertainty(clocked(8, 1.0, 1.0, 2.0)) == pytest.approx(0.5)


def test_a_plan_of_before_is_forecast_for_the_run_that_it_is_to_be() -> None:
    made = plan(speed=speed(), workload=workload(data_fingerprint="data"))
    for epochs in (1.0, 3.0):
        cast = forecast_anew(made, course(data_of(2400), epochs=epochs)).forecast
        assert cast is not None
        assert (cast.total_steps, cast.left_seconds) == (10 * epochs, cast.total_seconds)
    begun = course(data_of(2400), epochs=3.0)._replace(begun_steps=20)
    cast = forecast_anew(made, begun).forecast
    assert cast is not None
    done = 20 * cast.seconds_per_epoch / cast.steps_per_epoch
    assert cast.total_seconds - cast.left_seconds == pytest.approx(done), "two thirds of its steps"
    assert forecast_anew(made, course(None)).forecast is None
    assert forecast_anew(plan(speed=None), begun).forecast is None


def test_what_was_timed_on_other_data_says_nothing_of_this() -> None:
    quick = timed(20, (10_240, 0.2), (10_240, 0.1), peak_bytes=1).model_copy(
        update={"timed": (clocked(20, *[1e-3] * 3),)}
    )
    evidence = plan().evidence.model_copy(update={"trials": (quick,)})
    made = plan(evidence=evidence, workload=workload(data_fingerprint="data"))
    own, other = course(data_of(2400)), course(data_of(2400).model_copy(update={"fingerprint": "other"}))
    seconds = [cast.seconds_per_epoch for run in (own, other) if (cast := forecast_anew(made, run).forecast)]
    assert seconds[0] < 0.5 * seconds[1]


def test_documents_have_no_answers_to_score_but_are_gone_on_with_for_people() -> None:
    told = Answering(
        rows_at_once=64, prompt_tokens=0.0, longest_answer=10, seconds_of_token=0.1, seconds_of_further_row=0.0
    )
    run = course(data_of(2400), data_of(100), bleu_rows=64, samples=1)
    for stage, tokens in (("pretrain", 128), ("sft", 128 + 10)):
        cast = forecast_run(run, workload(stage=stage), batching(), speed(), None, told, measured=True)
        assert cast is not None
        assert cast.answer_seconds == pytest.approx(0.1 * tokens)
