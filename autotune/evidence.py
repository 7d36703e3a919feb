"""The facts a decision rests on: what was tried on which machine, and the memory curve they draw. Decides nothing.

No files, no clock, no environment.
"""

from __future__ import annotations

from collections.abc import Iterable

from autotune.plan import Fact, Hardware, Trial, Workload

APART = 0.75
"""A size at most this share of another is far enough below it for a slope."""


class Evidence(Fact):
    """Everything a plan was made from: replayed, it gives the same plan on a machine without the device."""

    workload: Workload
    hardware: Hardware
    budget_bytes: int
    trials: tuple[Trial, ...]


class MemoryModel(Fact):
    """Peak bytes of each phase as an affine function of rows: the peak is the largest of them.

    A phase apart is close to a line where the peak is not: at few rows the optimizer's phase may bind, and a line
    through the peaks of two sizes would then promise too much.
    """

    phases: dict[str, tuple[float, float]]
    """Fixed bytes and bytes per row, by phase."""

    def peak_bytes(self, rows: int) -> int:
        """Predict the peak of a micro-batch of so many rows."""
        return round(max(fixed + slope * rows for fixed, slope in self.phases.values()))


def fit(trials: Iterable[Trial]) -> MemoryModel | None:
    """Draw the phases through the largest completed size and another well below it: neighbours tell only their noise.

    With one size alone, what it holds above the resident state is taken to grow with its rows, which is more than it
    does; None without a completed trial.
    """
    completed = sorted((t for t in trials if t.completed), key=lambda t: t.micro_batch_size)
    if not completed:
        return None
    last = completed[-1]
    if len(completed) == 1:
        lower, base = 0, dict.fromkeys(last.phases, last.resident_bytes or 0)
    else:
        apart = [t for t in completed[:-1] if t.micro_batch_size <= APART * last.micro_batch_size]
        other = apart[-1] if apart else completed[0]
        lower, base = other.micro_batch_size, _phases(other)
    return MemoryModel(
        phases={
            name: _line_through(lower, base.get(name, 0), last.micro_batch_size, peak)
            for name, peak in _phases(last).items()
        }
    )


def _phases(trial: Trial) -> dict[str, int]:
    """Return the phases, raised to what the allocator held beyond what was allocated in the highest of them."""
    highest, held = max(trial.phases.values(), default=0), trial.peak_bytes or 0
    if held <= highest or highest == 0:
        return trial.phases
    return {name: peak * held // highest for name, peak in trial.phases.items()}


def _line_through(x0: int, y0: int, x1: int, y1: int) -> tuple[float, float]:
    """Return intercept and slope; a falling line is noise and is taken as flat at its higher end."""
    slope = (y1 - y0) / (x1 - x0)
    if slope < 0:
        return float(max(y0, y1)), 0.0
    return y0 - slope * x0, slope
