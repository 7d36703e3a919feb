"""How many steps a run has, and the learning rate of each. Pure."""

from __future__ import annotations

import math
from math import ceil

from autotune.errands import Recipe

FLOOR = 0.1
"""The cosine ends at this share of the peak rate."""
FINAL_DIVISOR = 1e4
"""One cycle ends at its first rate over this (torch.optim.lr_scheduler.OneCycleLR)."""


def steps_in(samples: int, effective_batch_size: int, recipe: Recipe) -> int:
    """Return the optimizer steps of the whole run; the last step of an epoch may be smaller, none is dropped."""
    steps = max(1, ceil(ceil(samples / effective_batch_size) * recipe.epochs))
    return steps if recipe.max_steps is None else min(steps, recipe.max_steps)


def learning_rate_at(step: float, total_steps: int, recipe: Recipe) -> float:
    """Return the rate of a step (0 is the first), or between two: a warm-up to what was asked, then down, or level.

    The warm-up is linear from nothing; that of one cycle (Smith 2018, 1803.09820) is half a cosine from the rate over
    its `div_factor`. No step has a rate of zero.
    """
    peak = recipe.learning_rate
    warmup = round(recipe.warmup * total_steps if recipe.warmup < 1 else recipe.warmup)
    warmup = min(warmup, total_steps - 1)
    lowest = peak / recipe.div_factor
    if step < warmup:
        if recipe.schedule == "one-cycle":
            return _half_cosine(lowest, peak, step / warmup)
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total_steps - 1 - warmup)
    match recipe.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (total_steps - step) / (total_steps - warmup)
        case "cosine":
            return _half_cosine(peak, FLOOR * peak, done)
        case "one-cycle":
            return _half_cosine(peak, lowest / FINAL_DIVISOR, done)


def _half_cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
