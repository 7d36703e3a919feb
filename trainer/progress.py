"""Where a run is, and what it remembers of the way: with weights and moments, all that a checkpoint has to hold. Pure.

Everything else follows from the plan, the recipe and the data: which samples a step takes, its learning rate, and the
random numbers that it draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WINDOW = 128
"""Steps that a spike is told by."""
SIGMAS = 6.0
"""Standard deviations above the mean that are one: OLMo-core's SkipStepOptimizer, whose window that is too."""
PATIENCE = 5
"""Steps in a row without a finite gradient, after which a run ends: the weights that made them stay as they are."""


@dataclass
class Best:
    """The evaluation with the least validation loss so far."""

    step: int | None = None
    loss: float | None = None
    without: int = 0
    """Evaluations since, none of which had less."""

    def take(self, step: int, loss: float) -> bool:
        """Say whether this is the best there was."""
        if not loss < (math.inf if self.loss is None else self.loss):  # nor is what is no number
            self.without += 1
            return False
        self.step, self.loss, self.without = step, loss, 0
        return True

    def told(self) -> dict[str, Any]:
        """Return what a row says of it; nothing where nothing was evaluated."""
        return {} if self.step is None else {"best_step": self.step, "best_loss": self.loss}


@dataclass
class Watch:
    """Looks at the loss and the gradient's norm of each step; what is not finite is counted, and judges nothing."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    not_finite: int = 0
    """Steps in a row that changed no weight."""

    def look(self, loss: float, norm: float) -> dict[str, float]:
        """Return what leapt, if anything did: `loss` or `gradient_norm`, and the mean that it had before."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.not_finite += 1
            return {}
        self.not_finite = 0
        leapt: dict[str, float] = {}
        for name, value, before in (("loss", loss, self.losses), ("gradient_norm", norm, self.norms)):
            if len(before) >= WINDOW // 2 and value > np.mean(before) + SIGMAS * np.std(before, ddof=1):
                leapt |= {name: value, f"mean_{name}": float(np.mean(before))}
            before.append(value)
            del before[:-WINDOW]
        return leapt


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Samples used in them, over all epochs."""
    evaluated_at: int = 0
    """The step of the last evaluation that was not broken off."""
    seconds: float = 0.0
    """That the run has taken so far, all its processes together."""
    position: float | None = None
    """Share of the schedule that is done, of a run that has only so much time; None of one that counts steps."""
    best: Best = field(default_factory=Best)
    watch: Watch = field(default_factory=Watch)


def place_of(step: int, samples: int, effective_batch_size: int) -> tuple[int, slice]:
    """Return the epoch of a step (0 is the first of either) and where in its order the samples of the step stand."""
    epoch, at = divmod(step, math.ceil(samples / effective_batch_size))
    return epoch, slice(at * effective_batch_size, min(samples, (at + 1) * effective_batch_size))


def seed_of(run_seed: int, step: int, rank: int) -> int:
    """Return the seed of a step's random numbers (dropout): the same whenever and however often it is taken."""
    return int(np.random.SeedSequence([run_seed, step, rank]).generate_state(1, np.uint64)[0])


def told_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what is not as it was, by name, for people."""
    return [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
