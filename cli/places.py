"""What is meant by a name of a model there is: a folder that transformers loads, a run, or one of its checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from autotune.errands import SavedModel
from autotune.errors import ConfigurationError
from autotune.plan import Plan
from cli.runs import run_of
from cli.wiring import cache_dir, read_plan

MODELS = ("model", "best")
"""Folders that a run leaves."""


@dataclass(frozen=True)
class Found:
    """A model, and how it was trained where that is known."""

    saved: SavedModel
    plan: Plan | None
    run: Path | None

    @property
    def seq2seq(self) -> bool:
        """Whether its configuration says that it has an encoder, where a folder has one."""
        try:
            told = json.loads((Path(self.saved.model) / "config.json").read_bytes())
            return bool(told.get("is_encoder_decoder"))
        except (OSError, ValueError, AttributeError, RecursionError):
            return False


def find_saved(place: str) -> Found:
    """Return where a model and its tokenizer lie, and the plan that it was trained by, where there is one.

    Of a run it is the model that it left, or the newest checkpoint of one that has not ended. Raises
    ConfigurationError for a name that is none of them.
    """
    if not place.isprintable():  # what is no UTF-8 cannot be told to a worker
        raise ConfigurationError(f"{place!r}: a name that cannot be shown cannot be asked for", "rename the folder")
    path = Path(place)
    if not path.is_dir():
        raise ConfigurationError(
            f"{place}: no such folder", "give a run (runs/NAME), one of its checkpoints, or a model's folder"
        )
    for folder in (path, path / "model"):
        if (folder / "config.json").exists() and not _is_overtaken(folder):
            return _in_folder(place, folder)
    run = run_of(path)
    if not (run / "plan.json").exists() or not any((run / "checkpoints").glob("step-*")):
        raise ConfigurationError(
            f"{place} is neither a model (no config.json) nor a run with a checkpoint",
            "give a run (runs/NAME), one of its checkpoints, or a model's folder",
        )
    plan = read_plan(str(run / "plan.json"))
    workload = plan.workload
    kept = cache_dir() / "tokenizers" / str(workload.tokenizer_fingerprint)
    tokenizers = (kept, Path(workload.model))
    found = next((str(place) for place in tokenizers if (place / "tokenizer.json").exists()), None)
    saved = SavedModel(
        place=place,
        model=workload.model,
        vocabulary_size=workload.vocabulary_size,
        checkpoint=place,
        tokenizer=found,
        stage=workload.stage,
    )
    return Found(saved, plan, run)


def _in_folder(place: str, folder: Path) -> Found:
    real = folder.resolve()
    plan_file = real.parent / "plan.json"
    plan = read_plan(str(plan_file)) if real.name in MODELS and plan_file.exists() else None
    saved = SavedModel(
        place=place,
        model=str(folder),
        vocabulary_size=None,
        checkpoint=None,
        tokenizer=str(folder) if (folder / "tokenizer.json").exists() else None,
        stage=plan.workload.stage if plan else "sft",
    )
    return Found(saved, plan, real.parent if plan else None)


def _is_overtaken(folder: Path) -> bool:
    """Whether a run that went on after it left this model has saved checkpoints since."""
    saved = [file.stat().st_mtime for file in folder.parent.glob("checkpoints/step-*/manifest.json")]
    return folder.name == "model" and max(saved, default=0.0) > (folder / "config.json").stat().st_mtime
