"""Rows, epochs, speed and a limit of time -> steps, hours, evaluations, checkpoints. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from statistics import median
from typing import NamedTuple

from autotune.batching import largest_share
from autotune.errands import DataSummary
from autotune.inputs import Course
from autotune.plan import Answering, Batching, Forecast, Plan, Speed, Timed, Workload
from autotune.remaining import Costs
from autotune.shapes import StepShape, expected_shape, step_shape

MEASURED_ERROR, ESTIMATED_ERROR = 0.15, 0.5
"""Shares by which hours were wrong, either way, in two of three real runs (docs/accuracy.md); of a card that is not
here that is not known yet."""
DISK_BYTES_PER_SECOND = 200e6
"""At which a checkpoint is hashed, written and synced: a slow disk's."""
FIXED_ANSWER_TOKENS = 128
"""Of the answer to a fixed prompt at most (trainer.evaluate)."""


class Evaluation(NamedTuple):
    """What comes between steps, in seconds each time."""

    validation_seconds: float
    """One pass over the validation data; 0 without any."""
    answer_seconds: float
    saving_seconds: float


def forecast(
    course: Course,
    shape: StepShape,
    evaluation: Evaluation,
    batching: Batching,
    speed: Speed,
    timed: Timed | None,
    error: float,
) -> Forecast:
    """Say what a run takes: steps of the last epoch smaller, not dropped; fewer where they have only so much time.

    `timed` is what samples of this data took at the size and in the layout that run, where that is known.
    """
    assert course.data is not None
    recipe, saving, samples = course.recipe, course.saving, course.data.samples
    steps = ceil(samples / batching.effective_batch_size)
    asked = max(1, ceil(steps * recipe.epochs))
    if recipe.max_steps is not None:
        asked = min(asked, recipe.max_steps)
    of_a_step = min(samples, batching.effective_batch_size)
    micro_batches = _seconds_of_micro_batches(shape, speed, timed)
    seconds_per_epoch = micro_batches * samples / of_a_step + steps * speed.update_seconds
    costs = Costs(
        step=seconds_per_epoch / steps,
        evaluation=evaluation.validation_seconds + evaluation.answer_seconds,
        checkpoint=evaluation.saving_seconds,
        evaluates_every=recipe.eval_every or (steps if evaluation.validation_seconds else asked),
        saves_every=saving.every_steps or (steps if saving.each_epoch else None),
        saves_every_seconds=saving.every_seconds,
        saves_best=bool(evaluation.validation_seconds),
    )
    total_steps, begun = asked, course.begun_steps
    if course.left_seconds is not None:
        total_steps = max(1, costs.last_within(begun, max(begun, asked), course.left_seconds))
    return Forecast(
        rows=samples,
        epochs=recipe.epochs,
        steps_per_epoch=steps,
        total_steps=total_steps,
        asked_steps=asked,
        seconds_per_epoch=seconds_per_epoch,
        validation_seconds=evaluation.validation_seconds,
        answer_seconds=evaluation.answer_seconds,
        saving_seconds=evaluation.saving_seconds,
        evaluations=costs.evaluations(0, total_steps),
        checkpoints=costs.checkpoints(0, total_steps),
        total_seconds=costs.seconds(0, total_steps),
        left_seconds=costs.seconds(begun, total_steps) if total_steps > begun else 0.0,
        error=error,
        padded_tokens_per_sample=shape.padded_tokens / largest_share(of_a_step, batching.world_size),
    )


def _seconds_of_micro_batches(shape: StepShape, speed: Speed, timed: Timed | None) -> float:
    """Return what those of a step take, as samples of the data did, or else by the plan's line."""
    if timed is not None:
        each = (s / tokens for s, tokens in zip(timed.seconds, timed.padded_tokens, strict=True))
        return shape.padded_tokens * median(each)
    tokens = shape.padded_tokens / shape.micro_batches
    at_full = speed.alpha_seconds + speed.beta_seconds_per_token * tokens
    return shape.micro_batches * max(speed.least_seconds, at_full)


def forecast_run(
    course: Course,
    workload: Workload,
    batching: Batching,
    speed: Speed,
    timed: Timed | None,
    answering: Answering | None,
    *,
    measured: bool,
) -> Forecast | None:
    """Say what a run on this data takes; None without data."""
    if course.data is None:
        return None
    return forecast(
        course,
        step_shape(course.data, workload, batching),
        Evaluation(
            _validation_tokens(course.validation, workload, batching) * speed.evaluation_seconds_per_token,
            _answer_seconds(course, workload, speed, answering) if answering else 0.0,
            (4 * workload.parameters + workload.optimizer_state_bytes) / DISK_BYTES_PER_SECOND,
        ),
        batching,
        speed,
        timed,
        uncertainty(timed) if measured else ESTIMATED_ERROR,
    )


def forecast_anew(plan: Plan, course: Course) -> Plan:
    """Return a plan that was made before, or a while ago, with the forecast of this run."""
    if plan.speed is None or course.data is None:
        return plan.model_copy(update={"forecast": None})
    batching, work, trials = plan.batching, plan.workload, plan.evidence.trials
    same_data = work.data_fingerprint == course.data.fingerprint
    own = [t for trial in trials for t in trial.timed if (t.rows, t.layout) == (batching.micro_batch_size, work.layout)]
    cast = forecast_run(
        course,
        work,
        batching,
        plan.speed,
        longest(own) if same_data else None,
        next((t.answering for t in reversed(trials) if t.answering), None),
        measured=plan.evidence.kind != "estimated",
    )
    return plan.model_copy(update={"forecast": cast})


def longest(timed: Sequence[Timed]) -> Timed | None:
    """Return what was timed on most samples; None of nothing."""
    return max(timed, key=lambda t: t.samples * len(t.seconds), default=None)


def _validation_tokens(validation: DataSummary | None, workload: Workload, batching: Batching) -> float:
    """Return those of one pass, padding included."""
    if validation is None:
        return 0.0
    of_a_step = min(validation.samples, batching.effective_batch_size)
    shape = expected_shape(
        validation.lengths, workload.layout, workload.limits, batching.micro_batch_size, of_a_step,
        workload.starting_tokens,
    )  # fmt: skip
    return shape.padded_tokens * validation.samples / of_a_step


def _answer_seconds(course: Course, workload: Workload, speed: Speed, answering: Answering) -> float:
    """Return what an evaluation's answers take at their longest: those that are scored, and those to fixed prompts."""
    recipe, held_out = course.recipe, course.validation
    scored = min(recipe.bleu_rows, held_out.samples) if held_out else 0
    if workload.task == "causal" and workload.stage == "pretrain":
        scored = 0  # documents have no answers
    assert course.data is not None
    fixed = len(recipe.prompts) + min(recipe.samples, (held_out or course.data).samples)
    reading = answering.prompt_tokens * speed.evaluation_seconds_per_token
    return sum(
        rows * reading + _token_seconds(rows, answering) * tokens
        for rows, tokens in (
            (scored, answering.longest_answer),
            (fixed, min(FIXED_ANSWER_TOKENS, *workload.limits)),
        )
    )


def _token_seconds(rows: int, answering: Answering) -> float:
    """Return what one token of each row takes, in as many batches as they need."""
    batches = ceil(rows / answering.rows_at_once)
    return batches * answering.seconds_of_token + max(0, rows - batches) * answering.seconds_of_further_row


def uncertainty(timed: Timed | None) -> float:
    """Return half of what repeats lay apart, where that is more than what runs were wrong by."""
    if timed is None:
        return MEASURED_ERROR
    each = [s / tokens for s, tokens in zip(timed.seconds, timed.padded_tokens, strict=True)]
    return max(MEASURED_ERROR, (max(each) - min(each)) / 2 / median(each))
