"""How fast a size goes: seconds of a step from its timings, or from its trace and a device's rates. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import inf
from statistics import median

from autotune.batching import balanced_cuts, largest_share
from autotune.errands import DRY_MICRO_BATCHES
from autotune.evidence import traced_work
from autotune.plan import Batching, Precision, Rates, Speed, Timed, Traced, Trial, Work, Workload

REPEATS = 3
"""One timing decides nothing."""
RANKS_BYTES_PER_SECOND = 10e9
"""Between cards without NVLink, over PCI Express 4.0 x16, as all-reduces come to in practice."""


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
