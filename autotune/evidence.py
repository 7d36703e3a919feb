"""The facts a decision rests on: what was traced and tried on which machine, and the memory curve they draw.

Decides nothing. No files, no clock, no environment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from autotune.plan import Fact, Hardware, Request, Traced, Trial, Work, Workload

APART = 0.75
"""A size at most this share of another is far enough below it for a slope."""


class Explored(Fact):
    """What was learned of one workload on one machine."""

    workload: Workload
    """With the allocator's setting that was in force at last."""
    process_bytes: int
    """What a worker held before there was a model, as the trace reported it."""
    traced: tuple[Traced, ...]
    trials: tuple[Trial, ...]


class Evidence(Fact):
    """Everything a plan was made from: replayed, it gives the same plan on a machine without the device."""

    hardware: Hardware
    request: Request
    explored: tuple[Explored, ...]


def alike(one: Workload, other: Workload) -> bool:
    """Say whether two workloads differ in no more than the allocator's setting, which a plan chooses itself."""
    return one == other.model_copy(update={"cpu_allocator": one.cpu_allocator})


class MemoryModel(Fact):
    """Peak bytes of each phase as a function of rows: the peak is the largest of them.

    A phase is what was traced of it, plus a line through what the trials held beyond that. Between traced sizes it is
    interpolated: memory is a maximum of affine pieces, so that the straight line between two sizes is never below it.
    Phases apart, since the peak of all is no line where each of them is: at few rows the optimizer's phase may bind.
    """

    traced: tuple[Traced, ...]
    """By rising size; none where there is no trace."""
    beyond: dict[str, tuple[float, float]]
    """Fixed bytes and bytes per row on top of the trace, by phase."""

    def peak_bytes(self, rows: int) -> int:
        """Predict the peak of a micro-batch of so many rows."""
        traced = traced_bytes(self.traced, rows)
        return round(max(traced.get(name, 0.0) + fixed + slope * rows for name, (fixed, slope) in self.beyond.items()))


def traced_bytes(traced: Sequence[Traced], rows: int) -> dict[str, float]:
    """Interpolate the traced peak of each phase, in bytes; beyond the last size as between the last two."""
    return _interpolate([(t.micro_batch_size, t.phases) for t in traced], rows)


def traced_items(traced: Sequence[Traced], rows: int) -> dict[str, float]:
    """Interpolate what the traced peak is made of, in bytes."""
    return _interpolate([(t.micro_batch_size, t.items) for t in traced], rows)


def traced_work(traced: Sequence[Traced], rows: int) -> Work:
    """Interpolate the work of forward and backward of a micro-batch."""
    work = _interpolate([(t.micro_batch_size, t.work.model_dump()) for t in traced], rows)
    return Work(**{name: round(value) for name, value in work.items()})


def _interpolate(points: Sequence[tuple[int, dict[str, int]]], rows: int) -> dict[str, float]:
    if not points:
        return {}
    if len(points) == 1:
        return {name: float(size) for name, size in points[0][1].items()}
    at = min(max(bisect_left(points, rows, key=lambda point: point[0]), 1), len(points) - 1)
    (below, low), (above, high) = points[at - 1], points[at]
    share = (rows - below) / (above - below)
    return {name: (1 - share) * low.get(name, 0) + share * high.get(name, 0) for name in low | high}


def fit(trials: Iterable[Trial], traced: Sequence[Traced] = (), process_bytes: int = 0) -> MemoryModel | None:
    """Draw the phases from the trace, corrected by what the trials held beyond it.

    Without a trial that is what the process holds. With one it is the same at every size; with more, a line through the
    largest and another well below it: neighbours tell only their noise. Without a trace a single trial's phases are
    taken to grow from the resident state with its rows, which is more than they do; None with neither.
    """
    traced = tuple(sorted(traced, key=lambda t: t.micro_batch_size))
    completed = _one_of_each_size(t for t in trials if t.completed)
    if not completed:
        beyond = {name: (float(process_bytes), 0.0) for t in traced for name in t.phases}
        return MemoryModel(traced=traced, beyond=beyond) if traced else None
    last = completed[-1]
    here = _beyond(last, traced)
    apart = [t for t in completed[:-1] if t.micro_batch_size <= APART * last.micro_batch_size]
    if apart or (len(completed) > 1 and not traced):
        other = apart[-1] if apart else completed[0]
        lower, there = other.micro_batch_size, _beyond(other, traced)
    elif traced:
        lower, there = 0, here
    else:
        lower, there = 0, dict.fromkeys(here, float(last.resident_bytes or 0))
    return MemoryModel(
        traced=traced,
        beyond={
            name: _line_through(lower, there.get(name, 0.0), last.micro_batch_size, bytes_)
            for name, bytes_ in here.items()
        },
    )


def _one_of_each_size(trials: Iterable[Trial]) -> list[Trial]:
    """Return trials by rising size; of several of a size the one that held the most."""
    ranked = sorted(trials, key=lambda t: (t.micro_batch_size, t.peak_bytes or 0, t.verified))
    return list({trial.micro_batch_size: trial for trial in ranked}.values())


def _beyond(trial: Trial, traced: Sequence[Traced]) -> dict[str, float]:
    """Return what each phase held beyond the trace, raised to what the allocator kept in the highest of them."""
    highest, held = max(trial.phases.values(), default=0), trial.peak_bytes or 0
    kept = held / highest if held > highest > 0 else 1
    known = traced_bytes(traced, trial.micro_batch_size)
    return {name: peak * kept - known.get(name, 0.0) for name, peak in trial.phases.items()}


def _line_through(x0: int, y0: float, x1: int, y1: float) -> tuple[float, float]:
    """Return intercept and slope; a falling line is noise and is taken as flat at its higher end."""
    slope = (y1 - y0) / (x1 - x0)
    if slope < 0:
        return max(y0, y1), 0.0
    return y0 - slope * x0, slope
