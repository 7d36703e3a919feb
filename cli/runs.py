"""The folder of a run: which it is, whether it can be written, and what the run was given."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from autotune.errands import ModelSummary
from autotune.errors import MachineError, RunExistsError
from autotune.plan import Hardware, Plan
from cli.wiring import LEARNING_RATES
from profiles import Resolved, Settings

MIB = 2**20
OF_THIS_RUN = ("plan", "this run")
"""Origins of what the run alone decided."""


def run_folder(settings: Settings) -> Path:
    """Return the folder of the run; raises RunExistsError for one that holds a run."""
    name = f"{Path(settings.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(settings.output_dir or Path("runs") / name)
    metrics = folder / "metrics.jsonl"
    if (folder / "model").exists() or (metrics.exists() and metrics.stat().st_size):
        raise RunExistsError(f"{folder} already holds a run", "give another --output-dir, or move that folder away")
    return folder


def make_folder(folder: Path, model: ModelSummary, hardware: Hardware) -> None:
    """Make the folder of the run; raises MachineError where it cannot be made, or the model would not fit the disk."""
    needed = 2 * 4 * model.parameters + 16 * MIB
    if hardware.disk_free_bytes < needed:
        raise MachineError(
            f"the disk of {folder} has {hardware.disk_free_bytes / MIB:,.0f} MiB free, "
            f"saving the model takes {needed / MIB:,.0f} MiB",
            "free some, or give an --output-dir on another disk",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: {error.strerror}", "give an --output-dir that can be written") from None


def write_run(folder: Path, resolved: Resolved, settings: Settings, plan: Plan, evidence: str | None) -> None:
    """Write what the run was given: `config.toml` with the origin of every value, `plan.json`, `evidence.json`."""
    # What this run alone decided is a comment: the file can be given as --config to another.
    lines = [
        f"{'# ' * (origin in OF_THIS_RUN)}{name} = {json.dumps(value, ensure_ascii=False)}  # {origin}"
        for name, (value, origin) in _decided(resolved, settings, plan, folder).items()
        if value is not None
    ]
    (folder / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
    if evidence is not None:
        (folder / "evidence.json").write_text(evidence + "\n", encoding="utf-8")


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
