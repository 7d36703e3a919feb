"""Which micro-batch to try next, and which is the largest safe one: a fold over trials. Pure.

A size is safe only if it completed and its peak lies within the budget; what was never measured is never the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from autotune.batching import balanced_size
from autotune.evidence import MemoryModel, fit
from autotune.plan import Traced, Trial

FINE = 10
"""A gain of less than one row in ten is not worth another trial."""
SURE = 0.75
"""Share of the budget up to which the trace alone is believed: before any trial it was seen to be up to 15 % low."""
TOO_SLOW = 8
"""A size that took too long is not approached again: the next has so many times fewer rows, and the first safe one ends
it."""
SPREAD = 4
"""Each traced size has so many times the rows of the one before."""


def is_safe(trial: Trial, budget_bytes: int) -> bool:
    """Say whether a trial ran to the end within the budget."""
    return trial.completed and trial.peak_bytes is not None and trial.peak_bytes <= budget_bytes


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
    trials: Sequence[Trial], budget_bytes: int, largest: int, traced: Sequence[Traced] = (), process_bytes: int = 0
) -> int | None:
    """Return the size to try next, in 1..`largest`, or None when the answer is known.

    By the trace, start where it promises room to spare: at the size that would run, else at half of the budget. What it
    missed is then the same at all sizes, so go for the prediction, which ends it where the trace is right. Without a
    trace start at one row, and aim once at half of what is left, since a single size tells little of the slope. Where
    memory is not what the model says, halve what is left of the bracket.
    """
    model = fit(trials, traced, process_bytes)
    if not trials:
        return _first(model, budget_bytes, largest) if model else 1
    low = largest_safe(trials, budget_bytes)
    high = min(
        (t.micro_batch_size for t in trials if t.micro_batch_size > low and not is_safe(t, budget_bytes)),
        default=largest + 1,
    )
    if any(t.outcome == "timed_out" for t in trials):
        return None if low or high <= 1 else max(1, high // TOO_SLOW)
    if low == 0:
        return _smaller(model, budget_bytes, high)
    if low >= high - 1:
        return None
    assert model is not None  # low is a completed trial
    return _inside(model, trials, budget_bytes, low, high, has_failed=high <= largest)


def _first(model: MemoryModel, budget_bytes: int, largest: int) -> int:
    """Choose where to begin by the trace alone: as a run would cut `largest` rows, if there is room to be wrong."""
    fits = largest_predicted(model, budget_bytes, 0, largest + 1)
    run_at = balanced_size(largest, fits) if fits else 1
    if model.peak_bytes(run_at) <= SURE * budget_bytes:
        return run_at
    return max(1, largest_predicted(model, budget_bytes // 2, 0, largest + 1))


def _smaller(model: MemoryModel | None, budget_bytes: int, high: int) -> int | None:
    """Choose below a first size that was not safe; one row that is not ends the search."""
    if high <= 1:
        return None
    predicted = largest_predicted(model, budget_bytes, 0, high) if model else 1
    return max(1, min(predicted, high // 2))


def largest_predicted(model: MemoryModel, budget_bytes: int, low: int, high: int) -> int:
    """Return the largest size between two, neither included, that is predicted to fit; the lower one if none is."""
    return max((r for r in range(low + 1, high) if model.peak_bytes(r) <= budget_bytes), default=low)


def _inside(
    model: MemoryModel, trials: Sequence[Trial], budget_bytes: int, low: int, high: int, *, has_failed: bool
) -> int | None:
    """Choose a size strictly between a safe one and one that is not, or None if the model rules all of them out."""
    if has_failed and high - 1 - low <= low // FINE:
        return None
    if has_failed and model.peak_bytes(high) <= budget_bytes:
        return (low + high) // 2  # memory is not what the model says: halve the bracket
    # Next to a size that failed, what is predicted to fit by a hair will not.
    margin = high // (2 * FINE) if has_failed else 0
    predicted = min(largest_predicted(model, budget_bytes, low, high), max(low, high - 1 - margin))
    if not model.traced and sum(t.completed for t in trials) == 1 and predicted < high - 1:
        half = (budget_bytes + model.peak_bytes(low)) // 2
        return max(low + 1, largest_predicted(model, half, low, high))
    takes_all = not has_failed and predicted == high - 1
    return predicted if takes_all or predicted - low > low // FINE else None
