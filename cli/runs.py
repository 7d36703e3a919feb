"""The folder of a run: which it is, what it goes on from, whether it has room, and what the run was given."""

from __future__ import annotations

import glob
import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.disk import sync, write_whole
from autotune.errands import Resume
from autotune.errors import ConfigurationError, MachineError, RunExistsError
from autotune.plan import Hardware, Plan, Workload
from cli.wiring import LEARNING_RATES
from profiles import Resolved, Settings

MIB = 2**20
SCRATCH = ".rehearsal"
"""In the folder of a run, what a rehearsal writes: on the disk that the run will have."""
OF_THIS_RUN = ("plan", "this run")
"""Origins of what the run alone decided."""


@dataclass(frozen=True)
class Resuming:
    """What was said of going on."""

    resume: bool
    place: str | None
    """A checkpoint, or a run, that was named."""
    weights_only: bool

    def __bool__(self) -> bool:
        return self.resume or self.place is not None


@dataclass(frozen=True)
class RunPlace:
    """The folder of a run, and what it goes on from, if it does."""

    folder: Path
    resume: Resume | None

    @property
    def plan_file(self) -> Path | None:
        """The plan of the run that is gone on from, whose numbers are to be had again; None where there is none."""
        if self.resume is None or self.resume.weights_only:
            return None
        file = run_of(Path(self.resume.place)) / "plan.json"
        return file if file.exists() else None


def begun(run: RunPlace) -> tuple[int, float]:
    """Return the steps that are done of a run that goes on, and the seconds they took, as its newest checkpoint has it.

    Nothing of a run that begins anew, from weights alone too; which checkpoint is whole, its worker finds out.
    """
    if run.resume is None or run.resume.weights_only:
        return 0, 0.0
    place = Path(run.resume.place)
    for state in sorted([place / "state.json", *place.glob("checkpoints/step-*/state.json")], reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(state.read_bytes())["progress"]
            return int(told["step"]), float(told["seconds"])
    return 0, 0.0


def find_run(settings: Settings, resuming: Resuming) -> RunPlace:
    """Return the folder of the run; raises RunExistsError for one that holds a run, unless it is to go on."""
    if resuming.weights_only and resuming.place is None:
        raise ConfigurationError("--resume-weights-only says how, not from what", "give --resume-from FOLDER too")
    if resuming.place is not None:
        return _named(settings, resuming)
    folder = Path(settings.output_dir or (_newest(settings) if resuming else None) or _new(settings))
    if not resuming:
        _check_free(folder)
    elif any((folder / "checkpoints").glob("*step-*")):  # those that a kill left without their name, too
        return RunPlace(folder, Resume(place=str(folder), weights_only=False))
    elif (folder / "model").exists():
        raise RunExistsError(f"{folder} holds a model and no checkpoint to go on from", "give another --output-dir")
    return RunPlace(folder, None)


def _check_free(folder: Path) -> None:
    """Raise RunExistsError where a run lies in the folder: a model, checkpoints, or rows of metrics."""
    metrics = folder / "metrics.jsonl"
    begun = metrics.exists() and metrics.stat().st_size
    if begun or (folder / "model").exists() or any((folder / "checkpoints").glob("*step-*")):
        raise RunExistsError(f"{folder} already holds a run", "go on with it: --resume; or give another --output-dir")


def _named(settings: Settings, resuming: Resuming) -> RunPlace:
    place = Path(resuming.place or "")
    if not place.is_dir():
        raise ConfigurationError(f"{place}: no such folder", "give a run's folder, or one of its checkpoints")
    of_place = run_of(place)
    folder = Path(settings.output_dir or (_new(settings) if resuming.weights_only else of_place))
    if resuming.weights_only or folder.resolve() != of_place.resolve():
        _check_free(folder)
    return RunPlace(folder, Resume(place=str(place), weights_only=resuming.weights_only))


def run_of(place: Path) -> Path:
    """Return the folder of the run that a checkpoint is of, or a folder of such, or which it is itself."""
    place = place.absolute()
    if re.fullmatch(r"step-\d{8,}", place.name):
        place = place.parent
    return place.parent if place.name.startswith("checkpoints") else place


def _new(settings: Settings) -> Path:
    return Path("runs") / f"{Path(settings.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _newest(settings: Settings) -> Path | None:
    """Return the newest run of this model, where no folder was named; their names end in their dates."""
    return max(Path("runs").glob(f"{glob.escape(Path(settings.model).name)}-????????-??????"), default=None)


def disk_needed(workload: Workload, keep_last: int) -> int:
    """Return the bytes of the checkpoints that stay, the best, one under way, and two models."""
    model = 4 * workload.parameters
    return (max(2, keep_last) + 2) * (model + workload.optimizer_state_bytes) + 2 * model + 16 * MIB


def check_disk(folder: Path, workload: Workload, keep_last: int, hardware: Hardware) -> None:
    """Raise MachineError where the disk has no room for what a run leaves; what lies there already counts."""
    needed = disk_needed(workload, keep_last)
    there = sum(file.stat().st_size for file in folder.glob("**/*.safetensors") if SCRATCH not in file.parts)
    if hardware.disk_free_bytes + there < needed:
        raise MachineError(
            f"the disk of {folder} has {(hardware.disk_free_bytes + there) / MIB:,.0f} MiB for it, "
            f"checkpoints and models take {needed / MIB:,.0f} MiB",
            "free some, keep fewer with --keep-last 2, or give an --output-dir on another disk",
        )


def write_run(
    folder: Path, resolved: Resolved, settings: Settings, plan: Plan, evidence: str | None, data: str | None
) -> None:
    """Write what the run was given: `config.toml` with the origin of every value, and plan, evidence and data as JSON.

    Each is what it was or what it shall be, whatever ends us: a run that goes on writes them again.
    """
    # What this run alone decided is a comment: the file can be given as --config to another.
    lines = [
        f"{'# ' * (origin in OF_THIS_RUN)}{name} = {json.dumps(value, ensure_ascii=False)}  # {origin}"
        for name, (value, origin) in _decided(resolved, settings, plan, folder).items()
        if value is not None
    ]
    write_whole(folder / "config.toml", "\n".join(lines) + "\n")
    write_whole(folder / "plan.json", plan.to_json() + "\n")
    if evidence is not None:
        write_whole(folder / "evidence.json", evidence + "\n")
    if data is not None:
        write_whole(folder / "data.json", data + "\n")
    sync(folder)


def _decided(resolved: Resolved, settings: Settings, plan: Plan, folder: Path) -> dict[str, tuple[Any, str]]:
    """Return every setting with its value in force and its origin: what was left to us says by what it was decided."""
    batching, workload = plan.batching, plan.workload
    by_rule: dict[str, Any] = {
        "learning_rate": LEARNING_RATES[workload.stage],
        "precision": workload.precision,
        "stage": workload.stage,
        "gradient_checkpointing": workload.gradient_checkpointing,
        "layout": workload.layout,
        "loss_head": workload.loss_head,
        "compile": workload.compile,
    }
    by_plan = {
        "output_dir": str(folder),
        "batch_size_per_gpu": batching.micro_batch_size,
        "effective_batch_size": batching.effective_batch_size,
        "gradient_accumulation_steps": batching.gradient_accumulation_steps,
    }
    decided = {}
    for name, value in vars(settings).items():
        asked, origin = getattr(resolved.settings, name), resolved.origins[name]
        if value in (None, "auto") and name in by_rule:
            decided[name] = (by_rule[name], "rule")
        elif (planned := by_plan.get(name, value)) != asked:
            decided[name] = (planned, "this run" if name == "output_dir" else "plan")
        else:
            decided[name] = (value, origin)
    return decided
