"""Rows, epochs, speed and a limit of time -> steps, hours, evaluations, checkpoints. Pure."""

from __future__ import annotations

from math import ceil
from statistics import median
from typing import NamedTuple

from autotune.batching import largest_share
from autotune.errands import DataSummary, Recipe, Saving
from autotune.inputs import PlanInputs
from autotune.plan import Answering, Batching, Forecast, Speed, Timed, Workload
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
    samples: int,
    recipe: Recipe,
    saving: Saving,
    shape: StepShape,
    evaluation: Evaluation,
    batching: Batching,
    speed: Speed,
    timed: Timed | None,
    error: float,
    max_seconds: float | None = None,
) -> Forecast:
    """Say what a run takes: steps of the last epoch smaller, not dropped; fewer where they have only so much time.

    `timed` is what samples of this data took at the size and in the layout that run, where that is known.
    """
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
    total_steps = asked if max_seconds is None else max(1, costs.last_within(0, asked, max_seconds))
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
        checkpoints=round(costs.checkpoints(0, total_steps)),
        total_seconds=costs.seconds(0, total_steps),
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
    inputs: PlanInputs,
    workload: Workload,
    batching: Batching,
    speed: Speed,
    timed: Timed | None,
    answering: Answering | None,
    *,
    measured: bool,
) -> Forecast | None:
    """Say what a run on this data takes; None without data."""
    if inputs.data is None:
        return None
    return forecast(
        inputs.data.samples,
        inputs.recipe,
        inputs.saving,
        step_shape(inputs.data, workload, batching),
        Evaluation(
            _validation_tokens(inputs.validation, workload, batching) * speed.evaluation_seconds_per_token,
            _answer_seconds(inputs, workload, speed, answering) if answering else 0.0,
            (4 * workload.parameters + workload.optimizer_state_bytes) / DISK_BYTES_PER_SECOND,
        ),
        batching,
        speed,
        timed,
        uncertainty(timed) if measured else ESTIMATED_ERROR,
        inputs.max_seconds,
    )


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


def _answer_seconds(inputs: PlanInputs, workload: Workload, speed: Speed, answering: Answering) -> float:
    """Return what an evaluation's answers take at their longest: those that are scored, and those to fixed prompts."""
    recipe, held_out = inputs.recipe, inputs.validation
    scored = min(recipe.bleu_rows, held_out.samples) if held_out else 0
    if workload.task == "causal" and workload.stage == "pretrain":
        scored = 0  # documents have no answers
    assert inputs.data is not None
    fixed = len(recipe.prompts) + min(recipe.samples, (held_out or inputs.data).samples)
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
