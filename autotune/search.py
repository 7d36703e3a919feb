"""Which micro-batch to try next, and which is the largest safe one: a fold over trials. Pure.

A size is safe only if it completed and its peak lies within the budget; what was never measured is never the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from autotune.evidence import fit
from autotune.plan import Trial

FINE = 10
"""A gain of less than one row in ten is not worth another trial."""


def is_safe(trial: Trial, budget_bytes: int) -> bool:
    """Say whether a trial ran to the end within the budget."""
    return trial.completed and trial.peak_bytes is not None and trial.peak_bytes <= budget_bytes


def largest_safe(trials: Sequence[Trial], budget_bytes: int) -> int:
    """Return the largest size that was measured to be safe, 0 if none was."""
    return max((t.micro_batch_size for t in trials if is_safe(t, budget_bytes)), default=0)


def next_size(trials: Sequence[Trial], budget_bytes: int, largest: int) -> int | None:
    """Return the size to try next, in 1..`largest`, or None when the answer is known.

    Start at one row; then aim at half of what is left, since a single size tells little of the slope; then at the
    prediction, which costs no out-of-memory where memory is affine; then halve what is left of the bracket.
    """
    if not trials:
        return 1
    low = largest_safe(trials, budget_bytes)
    high = min(
        (t.micro_batch_size for t in trials if t.micro_batch_size > low and not is_safe(t, budget_bytes)),
        default=largest + 1,
    )
    if low == 0:
        return None if high <= 1 else 1
    if low >= high - 1:
        return None
    return _inside(trials, budget_bytes, low, high, has_failed=high <= largest)


def _inside(trials: Sequence[Trial], budget_bytes: int, low: int, high: int, *, has_failed: bool) -> int | None:
    """Choose a size strictly between a safe one and one that is not, or None if the model rules all of them out."""
    model = fit(trials)
    assert model is not None  # low is a completed trial
    if has_failed and high - 1 - low <= low // FINE:
        return None
    if has_failed and model.peak_bytes(high) <= budget_bytes:
        return (low + high) // 2  # memory is not what the model says: halve the bracket
    predicted = max((r for r in range(low + 1, high) if model.peak_bytes(r) <= budget_bytes), default=low)
    if sum(t.completed for t in trials) == 1 and predicted < high - 1:
        half = (budget_bytes + model.peak_bytes(low)) // 2
        return max((r for r in range(low + 1, high) if model.peak_bytes(r) <= half), default=low + 1)
    takes_all = not has_failed and predicted == high - 1
    return predicted if takes_all or predicted - low > low // FINE else None
