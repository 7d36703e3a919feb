"""Rows, lengths, epochs and speed -> steps, hours, padding. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from statistics import median

from autotune.batching import balanced_cuts, largest_share
from autotune.plan import Batching, Forecast, Speed, Timed, Trial, Workload

Histogram = Sequence[tuple[int, int]]
"""Length in tokens and how many samples have it, rising by length."""


def expected_longest(histogram: Histogram, draws: int) -> float:
    """Return the mean length of the longest of so many samples drawn at random.

    E[max] = sum over lengths l of l (F(l)^n - F(l-)^n), with F the share of samples no longer than l.
    """
    total = sum(count for _, count in histogram)
    shares, seen = [0.0], 0
    for _, count in histogram:
        seen += count
        shares.append(seen / total)
    return sum(
        length * (above**draws - below**draws)
        for (length, _), (below, above) in zip(histogram, pairwise(shares), strict=True)
    )


def rounded(histogram: Histogram, multiple: int, limit: int) -> Histogram:
    """Round lengths up to what a micro-batch is padded to."""
    return [(min(ceil(length / multiple) * multiple, limit), count) for length, count in histogram]


def faster_size(timed: Sequence[Timed], factor: float) -> int | None:
    """Return the size that took the least time, if in each repeat it beat the first by this factor."""
    if not timed:
        return None
    own, *others = timed
    beat = [t for t in others if all(factor * a < b for a, b in zip(t.seconds, own.seconds, strict=True))]
    return min(beat, key=lambda t: median(t.seconds)).rows if beat else None


def measure_speed(trial: Trial, workload: Workload, batching: Batching) -> Speed | None:
    """Turn a trial's timings into seconds = alpha + beta x padded tokens of a micro-batch; None without timings.

    Rows of several lengths were timed at the trial's number of rows, as a run will have them. The line is that of least
    squares, neither of its terms below zero.
    """
    timings = trial.timings[1:]
    if not timings:
        return None
    alpha, beta = _line([(t.padded_tokens, t.seconds) for t in timings])
    update = median(t.update_seconds for t in timings)
    share = largest_share(batching.effective_batch_size, batching.world_size)
    cuts = balanced_cuts(share, batching.micro_batch_size)
    seconds = len(cuts) * alpha + beta * workload.tokens_per_row * share + update
    return Speed(
        tokens_per_second=batching.effective_batch_size * workload.tokens_per_row / seconds,
        samples_per_second=batching.effective_batch_size / seconds,
        seconds_per_step=seconds,
        alpha_seconds=alpha,
        beta_seconds_per_token=beta,
        update_seconds=update,
        evaluation_seconds_per_token=(trial.evaluation_seconds or 0.0)
        / (trial.micro_batch_size * workload.tokens_per_row),
    )


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return intercept and slope of least squares, neither negative."""
    count = len(points)
    x_mean, y_mean = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread if spread else 0.0
    slope = min(max(slope, 0.0), y_mean / x_mean)
    return max(0.0, y_mean - slope * x_mean), slope


def rows_per_second(trial: Trial) -> float:
    """Return how fast a trial went at its full length, its first step left out; 0 if it did not run to the end."""
    if not trial.completed or len(trial.timings) < 2:
        return 0.0
    longest = max(t.padded_tokens for t in trial.timings)
    return trial.micro_batch_size / min(t.seconds for t in trial.timings[1:] if t.padded_tokens == longest)


def forecast(
    samples: int,
    epochs: float,
    max_steps: int | None,
    lengths: Sequence[Histogram],
    validation: Sequence[Histogram],
    batching: Batching,
    speed: Speed,
    timed: Timed | None,
) -> Forecast:
    """Say what a run takes: steps of the last epoch smaller, not dropped, and rows padded to the longest beside them.

    `lengths` are one histogram for a causal model, source and target for seq2seq, rounded as micro-batches are;
    `validation` the same of the validation data, empty where there is none. `timed` is what samples
    of this data took at the size that runs, where that is known.
    """
    steps = ceil(samples / batching.effective_batch_size)
    total_steps = max(1, ceil(steps * epochs))
    if max_steps is not None:
        total_steps = min(total_steps, max_steps)
    share = largest_share(min(samples, batching.effective_batch_size), batching.world_size)
    cuts = balanced_cuts(share, batching.micro_batch_size)
    padded = sum(size * _padded_tokens(lengths, size) for size in cuts)
    if timed is None:
        micro_batches = len(cuts) * speed.alpha_seconds + padded * speed.beta_seconds_per_token
    else:
        micro_batches = median(timed.seconds) * share / timed.samples
    whole_steps = samples / min(samples, batching.effective_batch_size)
    seconds_per_epoch = micro_batches * whole_steps + steps * speed.update_seconds
    validation_seconds = 0.0
    if validation:
        rows = sum(count for _, count in validation[0])
        validation_tokens = rows * _padded_tokens(validation, batching.micro_batch_size)
        validation_seconds = validation_tokens * speed.evaluation_seconds_per_token
    return Forecast(
        rows=samples,
        epochs=epochs,
        steps_per_epoch=steps,
        total_steps=total_steps,
        seconds_per_epoch=seconds_per_epoch,
        validation_seconds=validation_seconds,
        total_seconds=seconds_per_epoch * total_steps / steps + validation_seconds * ceil(total_steps / steps),
        padded_tokens_per_sample=padded / share,
    )


def _padded_tokens(lengths: Sequence[Histogram], rows: int) -> float:
    """Return the tokens that a sample is expected to cost among so many rows, on all sides together."""
    return sum(expected_longest(histogram, rows) for histogram in lengths)
