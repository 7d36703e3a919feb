"""What is seen of machine and runs at a moment: plain facts, and the same as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from cli.monitor.curves import Point

SCHEMA = "chatlm.monitor/1"


@dataclass(frozen=True)
class CardFacts:
    """One card, or slice of one; None is what it does not tell."""

    name: str
    shares_host_memory: bool
    memory_total_bytes: int | None
    memory_used_bytes: int | None
    memory_of_runs_bytes: int | None
    """What the runs that are shown hold."""
    memory_of_others_bytes: int | None
    memory_budget_bytes: int | None
    """By the plan of the run that is on it."""
    utilization: float | None
    temperature_celsius: float | None
    power_watts: float | None
    power_limit_watts: float | None
    slowed_by: tuple[str, ...] | None


@dataclass(frozen=True)
class MemoryFacts:
    """The host's memory, or what a control group leaves of it."""

    total_bytes: int
    available_bytes: int
    of_runs_bytes: int | None
    """What the runs that are shown hold, anonymous and shared; None where no run of this machine is."""
    budget_bytes: int | None
    """By the plan of the run with the least."""


@dataclass(frozen=True)
class GroupFacts:
    """The control group that leaves a run, or the monitor where none is here, the least of the host's memory."""

    path: str
    memory: MemoryFacts
    """Of it, and of the runs that are in it."""


@dataclass(frozen=True)
class SwapFacts:
    """The host's swap."""

    total_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class DiskFacts:
    """A disk that runs are on."""

    folder: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class MachineFacts:
    """What the machine has and does."""

    name: str
    cores: int
    processor_utilization: float | None
    """Share of all cores; None at the first look."""
    memory: MemoryFacts
    groups: tuple[GroupFacts, ...]
    """Each once; empty where none sets a limit."""
    swap: SwapFacts
    disks: tuple[DiskFacts, ...]
    gpus: tuple[CardFacts, ...]
    gpu_note: str
    """Why no card is told of, where a driver refuses."""


@dataclass(frozen=True)
class LeftFacts:
    """What is left of a run's time, and its range."""

    seconds: float
    low_seconds: float
    high_seconds: float


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint that lies there."""

    step: int
    held_bytes: int
    age_seconds: float


@dataclass(frozen=True)
class NoticeFacts:
    """The last thing that went otherwise than it should, and how many there were."""

    event: str
    step: int
    message: str
    count: int


@dataclass(frozen=True)
class RunFacts:
    """One run: where it is and how it goes; None is what is not known, or is no number."""

    name: str
    folder: str
    state: str
    """running, finished, stopped, died, or removed where its folder is gone."""
    process_id: int | None
    silent_seconds: float | None
    """Since it wrote last."""
    device: str | None
    model: str | None
    step: int
    total_steps: int | None
    epoch: float | None
    epochs: float | None
    left: LeftFacts | None
    """None when it does not run."""
    loss: float | None
    validation_loss: float | None
    validation_step: int | None
    best_validation_loss: float | None
    learning_rate: float | None
    tokens_per_second: float | None
    """Over the last steps of its process, as the next."""
    model_flops_utilization: float | None
    peak_memory_bytes: int | None
    planned_peak_memory_bytes: int | None
    memory_budget_bytes: int | None
    checkpoints: tuple[CheckpointFacts, ...]
    """The last ones, the newest first."""
    notice: NoticeFacts | None
    log: tuple[str, ...]
    loss_curve: tuple[Point, ...]
    tokens_per_second_curve: tuple[Point, ...]


@dataclass(frozen=True)
class Glance:
    """All that is seen at a moment."""

    at_seconds: float
    """Since the epoch of the clock."""
    machine: MachineFacts
    runs: tuple[RunFacts, ...]

    def to_json(self) -> str:
        """Return it as one JSON object of schema `chatlm.monitor/1`."""
        facts = asdict(self)
        for run in facts["runs"]:
            for name in ("loss_curve", "tokens_per_second_curve"):
                run[name] = [point._asdict() for point in run[name]]
        return json.dumps({"schema": SCHEMA} | facts, indent=2, allow_nan=False)
