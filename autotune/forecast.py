"""Rows, lengths, epochs and speed -> steps, hours, padding. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import ceil, inf
from random import Random
from statistics import median
from typing import NamedTuple

from autotune.batching import PADDING_MULTIPLE, balanced_cuts, largest_share
from autotune.errands import DRY_MICRO_BATCHES, DataSummary, Recipe
from autotune.evidence import traced_work
from autotune.plan import Batching, Forecast, Layout, Precision, Rates, Speed, Timed, Traced, Trial, Work, Workload

REPEATS = 3
"""One timing decides nothing."""
SIMULATED_STEPS = 8
"""Laid out to know what a layout makes of the lengths there are."""
RANKS_BYTES_PER_SECOND = 10e9
"""Between cards without NVLink, over PCI Express 4.0 x16, as all-reduces come to in practice."""
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


def fastest(timed: Sequence[Timed], factor: float) -> Timed | None:
    """Return what took the least time, if in each of three repeats it beat the first by this factor."""
    if not timed or len(timed[0].seconds) < REPEATS:
        return None
    own, *others = timed
    beat = [t for t in others if all(factor * a < b for a, b in zip(t.seconds, own.seconds, strict=True))]
    return min(beat, key=lambda t: median(t.seconds), default=None)


def beats(trial: Trial, other: Trial, factor: float) -> bool:
    """Say whether a row of full length took less, by this factor, in each of a trial's steps than in any of another's.

    They were taken at different times, so that only what holds for all of them is no accident.
    """
    slowest, fastest = max(_seconds_per_row(trial), default=inf), min(_seconds_per_row(other), default=0.0)
    return factor * slowest < fastest


def _seconds_per_row(trial: Trial) -> list[float]:
    longest = max((t.padded_tokens for t in trial.timings), default=0)
    return [t.seconds / trial.micro_batch_size for t in trial.timings[1:] if t.padded_tokens == longest]


def measure_speed(trial: Trial, workload: Workload, batching: Batching) -> Speed | None:
    """Turn a trial's timings into seconds = alpha + beta x padded tokens of a micro-batch; None without timings.

    Rows of several lengths were timed at the trial's number of rows, as a run will have them. The line is that of least
    squares, neither of its terms below zero.
    """
    timings = trial.timings[1:]
    if not timings:
        return None
    alpha, beta = _line([(t.padded_tokens, t.seconds) for t in timings])
    rows = trial.micro_batch_size * workload.tokens_per_row
    return _speed_of(
        workload,
        batching,
        alpha=alpha,
        beta=beta,
        least=0.0,
        update=median(t.update_seconds for t in timings),
        evaluation=(trial.evaluation_seconds or 0.0) / rows,
        matrix_flops=trial.matrix_flops,
    )


def roofline_speed(traced: Sequence[Traced], rates: Rates, workload: Workload, batching: Batching) -> Speed:
    """Say how fast a device would be that does nothing but the traced work, at its dense rates, without overlap.

    seconds = flops / rate + bytes moved / bandwidth: the roofline of Williams et al. 2009, both sides added up, as in
    eager mode an operator waits for the one before. It takes no less than to start the operators, where those are
    started while others work, and that on top of it where they are not.
    """
    rows, ranks = batching.micro_batch_size, batching.world_size
    tokens = rows * workload.tokens_per_row
    work = traced_work(traced, rows)
    whole, one = _roofline(work, rates), _roofline(traced_work(traced, 1), rates)
    beta = (whole - one) / (tokens - workload.tokens_per_row) if rows > 1 else whole / tokens
    starting = rates.operator_seconds * work.operators
    alpha = max(0.0, whole - beta * tokens) + (0.0 if rates.overlaps else starting)
    update = _roofline(traced[0].update, rates)
    if ranks > 1:  # a ring moves each gradient twice, but for a rank's own share
        update += 2 * (ranks - 1) / ranks * 4 * workload.trainable_parameters / RANKS_BYTES_PER_SECOND
    forwards = 4 if workload.gradient_checkpointing == "on" else 3  # a backward takes two
    evaluating = max(whole, starting) / forwards if rates.overlaps else (whole + starting) / forwards
    return _speed_of(
        workload,
        batching,
        alpha=alpha,
        beta=beta,
        least=starting if rates.overlaps else 0.0,
        update=update,
        evaluation=evaluating / tokens,
        matrix_flops={workload.precision: rates.flops},
    )


def _speed_of(
    workload: Workload,
    batching: Batching,
    *,
    alpha: float,
    beta: float,
    least: float,
    update: float,
    evaluation: float,
    matrix_flops: dict[Precision, float],
) -> Speed:
    """Add up a step of full length: its micro-batches, none below the least, and the optimizer."""
    share = largest_share(batching.effective_batch_size, batching.world_size)
    cuts = balanced_cuts(share, batching.micro_batch_size)
    seconds = sum(max(least, alpha + beta * workload.tokens_per_row * rows) for rows in cuts) + update
    return Speed(
        tokens_per_second=batching.effective_batch_size * workload.tokens_per_row / seconds,
        samples_per_second=batching.effective_batch_size / seconds,
        seconds_per_step=seconds,
        alpha_seconds=alpha,
        beta_seconds_per_token=beta,
        least_seconds=least,
        update_seconds=update,
        evaluation_seconds_per_token=evaluation,
        matrix_flops=matrix_flops,
    )


def _roofline(work: Work, rates: Rates) -> float:
    return work.flops / rates.flops + work.moved_bytes / rates.bytes


def seconds_per_sample(
    rows: int, timed: Sequence[Timed], speed: Speed | None, tokens_per_row: int
) -> tuple[float, bool] | None:
    """Return the seconds that a sample takes in micro-batches of so many rows, and whether they were measured.

    What a micro-batch takes to begin is shared by its rows: the line is in 1 / rows, through the sizes that were timed
    on real samples; else by the plan's alpha and beta at full length. None where nothing was timed.
    """
    known = sorted((1 / t.rows, median(t.seconds) / t.samples) for t in timed)
    if not known:
        return (speed.alpha_seconds / rows + speed.beta_seconds_per_token * tokens_per_row, False) if speed else None
    for x, seconds in known:
        if x == 1 / rows:
            return seconds, True
    if len(known) == 1:
        return None
    at = min(max(bisect_left(known, (1 / rows,)), 1), len(known) - 1)
    (x0, y0), (x1, y1) = known[at - 1], known[at]
    return max(min(y0, y1) / 2, y0 + (y1 - y0) * (1 / rows - x0) / (x1 - x0)), False


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return intercept and slope of least squares, neither negative."""
    count = len(points)
    x_mean, y_mean = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread if spread else 0.0
    slope = min(max(slope, 0.0), y_mean / x_mean)
    return max(0.0, y_mean - slope * x_mean), slope


def compile_seconds(trial: Trial) -> float:
    """Return by how much a compiled trial's first step took longer than those after it: what it costs a run, at most.

    Kernels are kept on disk, so that a run after its trial pays less.
    """
    first = trial.timings[0].seconds
    return DRY_MICRO_BATCHES * (first - min(t.seconds for t in trial.timings))


def rows_per_second(trial: Trial) -> float:
    """Return how fast a trial went at its full length, its first step left out; 0 if it did not run to the end."""
    if not trial.completed or len(trial.timings) < 2:
        return 0.0
    longest = max(t.padded_tokens for t in trial.timings)
    return trial.micro_batch_size / min(t.seconds for t in trial.timings[1:] if t.padded_tokens == longest)


class StepShape(NamedTuple):
    """What a rank computes on in a step of its whole share, as is to be expected."""

    micro_batches: float
    padded_tokens: float
    """Of all of them together."""


def expected_shape(
    lengths: Sequence[Histogram], layout: Layout, limits: tuple[int, ...], rows: int, share: int, starting_tokens: float
) -> StepShape:
    """Say what a layout makes of samples of these lengths, given by side.

    Plain rows by the expected length of the longest of so many; other layouts by laying out a few steps of samples
    drawn at random, the sides of each drawn apart.
    """
    if layout == "fixed":
        return plain_shape([rounded(h, PADDING_MULTIPLE, m) for h, m in zip(lengths, limits, strict=True)], rows, share)
    from autotune.layout import arrange, padded_lengths  # loads numpy

    batches = padded = 0
    for samples in _drawn_steps(lengths, share):
        arranged = arrange(samples, layout, rows, limits, starting_tokens)
        batches += len(arranged)
        padded += sum(len(batch) * sum(padded_lengths(batch, samples, limits)) for batch in arranged)
    return StepShape(batches / SIMULATED_STEPS, padded / SIMULATED_STEPS)


def most_packed_rows(lengths: Sequence[Histogram], limits: tuple[int, ...], share: int) -> int:
    """Return the rows that a step of packed samples takes at most, of a few drawn at random."""
    from autotune.layout import arrange  # loads numpy

    steps = (arrange(samples, "packed", share, limits, 0) for samples in _drawn_steps(lengths, share))
    return max(sum(map(len, step)) for step in steps)


def _drawn_steps(lengths: Sequence[Histogram], share: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield the lengths of a few steps' samples; the sides of each are drawn apart."""
    random = Random(0)
    for _ in range(SIMULATED_STEPS):
        drawn = [random.choices([n for n, _ in side], [count for _, count in side], k=share) for side in lengths]
        yield list(zip(*drawn, strict=True))


def plain_shape(lengths: Sequence[Histogram], rows: int, share: int) -> StepShape:
    """Say what plain rows come to, each micro-batch padded to its longest."""
    cuts = balanced_cuts(share, rows)
    return StepShape(len(cuts), sum(n * expected_longest(side, n) for n in cuts for side in lengths))


def forecast(
    samples: int,
    epochs: float,
    max_steps: int | None,
    eval_every: int | None,
    shape: StepShape,
    validation_tokens: float,
    batching: Batching,
    speed: Speed,
    timed: Timed | None,
) -> Forecast:
    """Say what a run takes: steps of the last epoch smaller, not dropped.

    `validation_tokens` are those of one evaluation, padding included; one comes after each epoch, or every so many
    steps, and at the end. What it generates is not counted. `timed` is what samples of this data took at the
    size and in the layout that run, where that is known.
    """
    steps = ceil(samples / batching.effective_batch_size)
    total_steps = max(1, ceil(steps * epochs))
    if max_steps is not None:
        total_steps = min(total_steps, max_steps)
    of_a_step = min(samples, batching.effective_batch_size)
    if timed is None:
        tokens = shape.padded_tokens / shape.micro_batches
        each = speed.alpha_seconds + speed.beta_seconds_per_token * tokens
        micro_batches = shape.micro_batches * max(speed.least_seconds, each)
    else:
        micro_batches = shape.padded_tokens * median(
            s / tokens for s, tokens in zip(timed.seconds, timed.padded_tokens, strict=True)
        )
    seconds_per_epoch = micro_batches * samples / of_a_step + steps * speed.update_seconds
    validation_seconds = validation_tokens * speed.evaluation_seconds_per_token
    return Forecast(
        rows=samples,
        epochs=epochs,
        steps_per_epoch=steps,
        total_steps=total_steps,
        seconds_per_epoch=seconds_per_epoch,
        validation_seconds=validation_seconds,
        total_seconds=seconds_per_epoch * total_steps / steps
        + validation_seconds * ceil(total_steps / (eval_every or steps)),
        padded_tokens_per_sample=shape.padded_tokens / largest_share(of_a_step, batching.world_size),
    )


def forecast_run(
    recipe: Recipe,
    data: DataSummary,
    validation: DataSummary | None,
    workload: Workload,
    batching: Batching,
    speed: Speed,
    timed: Timed | None,
) -> Forecast:
    """Say what a run on this data takes."""
    rows, validation_tokens = batching.micro_batch_size, 0.0
    if validation is not None:
        of_a_step = min(validation.samples, batching.effective_batch_size)
        shape = expected_shape(
            validation.lengths, workload.layout, workload.limits, rows, of_a_step, workload.starting_tokens
        )
        validation_tokens = shape.padded_tokens * validation.samples / of_a_step
    return forecast(
        data.samples,
        recipe.epochs,
        recipe.max_steps,
        recipe.eval_every,
        step_shape(data, workload, batching),
        validation_tokens,
        batching,
        speed,
        timed,
    )


def step_shape(data: DataSummary, workload: Workload, batching: Batching) -> StepShape:
    """Say what a rank computes on in a step on this data."""
    share = largest_share(min(data.samples, batching.effective_batch_size), batching.world_size)
    return expected_shape(
        data.lengths, workload.layout, workload.limits, batching.micro_batch_size, share, workload.starting_tokens
    )


def padding_share(
    data: DataSummary, layout: Layout, limits: tuple[int, ...], rows: int, share: int, starting_tokens: float
) -> float:
    """Return the share of padding in what a rank computes on, in a step of so many samples of this data."""
    padded_tokens = expected_shape(data.lengths, layout, limits, rows, share, starting_tokens).padded_tokens
    return max(0.0, 1 - data.tokens / data.samples * share / padded_tokens)


def expect(batching: Batching, data: DataSummary | None, workload: Workload) -> Batching:
    """Return the batching with the micro-batches that a step is expected to take on this data."""
    if data is None:
        return batching
    expected = step_shape(data, workload, batching).micro_batches
    return batching.model_copy(update={"expected_micro_batches_per_step": expected})
