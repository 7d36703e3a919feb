"""Which micro-batch to try next, and which is the largest safe one: a fold over trials. Pure.

A size is safe only if it took all its dry steps and its peak lies within the budget; what was never measured is never
the answer. `sizes` are those worth trying, rising: no two of them reach a step in as many micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

from autotune.evidence import MemoryModel, fit
from autotune.plan import Traced, Trial

FINE = 10
"""A gain of less than one row in ten is not worth another trial."""
SURE = 0.75
"""Share of the budget up to which the trace alone is believed: before any trial it was seen to be up to 15 % low."""
EXPLORED = 0.99
"""Share of the budget that is aimed at while all trials were short: more steps were seen to hold up to 3 % more."""
TOO_SLOW = 8
"""A size that took too long is not approached again: the next has so many times fewer rows, and the first safe one ends
it."""
SPREAD = 4
"""Each traced size has so many times the rows of the one before."""


def is_within(trial: Trial, budget_bytes: int) -> bool:
    """Say whether a trial ran to its end within the budget."""
    return trial.completed and trial.peak_bytes is not None and trial.peak_bytes <= budget_bytes


def is_safe(trial: Trial, budget_bytes: int) -> bool:
    """Say whether a trial took all dry steps within the budget."""
    return trial.verified and is_within(trial, budget_bytes)


def largest_safe(trials: Sequence[Trial], budget_bytes: int) -> int:
    """Return the largest size that was measured to be safe, 0 if none was."""
    return max((t.micro_batch_size for t in trials if is_safe(t, budget_bytes)), default=0)


def sizes_to_trace(largest: int) -> tuple[int, ...]:
    """Return the sizes whose trace tells those between them: four times as many rows each, and all."""
    sizes = [1]
    while SPREAD * sizes[-1] < largest:
        sizes.append(SPREAD * sizes[-1])
    return (*sizes, largest) if largest > 1 else (1,)


def next_size(
    trials: Sequence[Trial],
    budget_bytes: int,
    sizes: Sequence[int],
    traced: Sequence[Traced] = (),
    process_bytes: int = 0,
) -> int | None:
    """Return the size to try next, or None when the answer is known.

    By the trace, start where it promises room to spare: at the size that would run, else half way to the budget. What
    it missed is then the same at all sizes, so go for the prediction, which ends it where the trace is right. Without a
    trace start with the fewest rows, and aim once at half of what is left, since a single size tells little of the
    slope. Where memory is not what the model says, halve what is left of the bracket. A size that was only explored is
    tried once more where it turns out to be the answer.
    """
    model = fit(trials, traced, process_bytes)
    if not trials:
        return _first(model, budget_bytes, sizes) if model else sizes[0]
    low, high = bracket(trials, budget_bytes)
    inside = [size for size in sizes if low < size < high]
    found = _inside(model, trials, budget_bytes, low, inside, high) if inside else None
    unverified = low > largest_safe(trials, budget_bytes)
    return low if found is None and unverified else found


def bracket(trials: Sequence[Trial], budget_bytes: int) -> tuple[int, float]:
    """Return the largest size that was within the budget, 0 if none was, and the smallest above it that was not.

    A size that was so once, and not the other time, was not.
    """
    over = {t.micro_batch_size for t in trials if not is_within(t, budget_bytes)}
    low = max((t.micro_batch_size for t in trials if t.micro_batch_size not in over), default=0)
    return low, min((size for size in over if size > low), default=float("inf"))


def largest_predicted(model: MemoryModel, budget_bytes: int, sizes: Sequence[int]) -> int:
    """Return the largest of these sizes that is predicted to fit, 0 if none is."""
    return max((size for size in sizes if model.peak_bytes(size) <= budget_bytes), default=0)


def _first(model: MemoryModel, budget_bytes: int, sizes: Sequence[int]) -> int:
    """Choose where to begin by the trace alone: at what would run, if there is room to be wrong."""
    fits = largest_predicted(model, budget_bytes, sizes) or sizes[0]
    if model.peak_bytes(fits) <= SURE * budget_bytes:
        return fits
    half_way = (budget_bytes + model.peak_bytes(0)) // 2
    return largest_predicted(model, half_way, sizes) or sizes[0]


def _inside(
    model: MemoryModel | None,
    trials: Sequence[Trial],
    budget_bytes: int,
    low: int,
    inside: Sequence[int],
    high: float,
) -> int | None:
    """Choose among the sizes between one within the budget and one that is not; None if the model rules all out."""
    if any(t.outcome == "timed_out" for t in trials):
        slower = [size for size in inside if size * TOO_SLOW <= high] or inside[:1]
        return None if low else slower[-1]
    has_failed = high < float("inf")
    if low == 0:
        return _below(model, budget_bytes, inside, high)
    assert model is not None  # low is a completed trial
    if has_failed and inside[-1] - low <= low // FINE:
        return None
    if has_failed and model.peak_bytes(int(high)) <= budget_bytes:
        return inside[len(inside) // 2]  # memory is not what the model says: halve the bracket
    # Next to a size that failed, what is predicted to fit by a hair will not.
    margin = high // (2 * FINE) if has_failed else 0
    aim = budget_bytes if any(t.verified for t in trials) else round(EXPLORED * budget_bytes)
    predicted = largest_predicted(model, aim, [size for size in inside if size < high - margin])
    if not model.traced and sum(t.completed for t in trials) == 1 and predicted < inside[-1]:
        half = (budget_bytes + model.peak_bytes(low)) // 2
        return largest_predicted(model, half, inside) or inside[0]
    takes_all = not has_failed and predicted == inside[-1]
    return predicted if takes_all or predicted - low > low // FINE else None


def _below(model: MemoryModel | None, budget_bytes: int, inside: Sequence[int], high: float) -> int:
    """Choose below a first size that was not within the budget."""
    half = [size for size in inside if 2 * size <= high] or inside[:1]
    return largest_predicted(model, budget_bytes, half) or inside[0] if model else inside[0]
