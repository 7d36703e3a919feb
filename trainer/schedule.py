"""How many steps a run has, and the learning rate of each. Pure."""

from __future__ import annotations

import math
from math import ceil

from autotune.errands import Recipe

FLOOR = 0.1
"""The cosine ends at this share of the peak rate."""
LINEAR_END = 1e-3
"""Of the peak, where a line's last step is not known by its number: no step has a rate of zero."""
FINAL_DIVISOR = 1e4
"""One cycle ends at its first rate over this (torch.optim.lr_scheduler.OneCycleLR)."""


def steps_in(samples: int, effective_batch_size: int, recipe: Recipe) -> int:
    """Return the optimizer steps of the whole run; the last step of an epoch may be smaller, none is dropped."""
    steps = max(1, ceil(ceil(samples / effective_batch_size) * recipe.epochs))
    return steps if recipe.max_steps is None else min(steps, recipe.max_steps)


def learning_rate_of(done: float, step: int, recipe: Recipe) -> float:
    """Return the rate of a step by the share of its schedule that is done with it, above 0 to 1, of no certain length.

    The same curves as of steps that are counted. A warm-up of so many steps is by them, and the share is of what comes
    after; one of a share is by that.
    """
    peak, lowest = recipe.learning_rate, recipe.learning_rate / recipe.div_factor
    if recipe.warmup >= 1:
        warmed, after = (step + 1) / (round(recipe.warmup) + 1), done
    else:
        warmed = done / recipe.warmup if recipe.warmup else 1.0
        after = (done - recipe.warmup) / (1 - recipe.warmup)
    if warmed < 1:
        return _half_cosine(lowest, peak, warmed) if recipe.schedule == "one-cycle" else peak * warmed
    match recipe.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * max(1 - after, LINEAR_END)
        case "cosine":
            return _half_cosine(peak, FLOOR * peak, after)
        case "one-cycle":
            return _half_cosine(peak, lowest / FINAL_DIVISOR, after)


def is_warming_up(step: int, recipe: Recipe) -> bool:
    """Whether a step is one of a warm-up of so many, which takes no share of what comes after."""
    return recipe.warmup >= 1 and step < round(recipe.warmup)


def learning_rate_at(step: int, total_steps: int, recipe: Recipe) -> float:
    """Return the rate of a step (0 is the first): a warm-up to what was asked, then down, or level.

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
