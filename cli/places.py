"""What is meant by a name of a model there is: a folder that transformers loads, a run, or one of its checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from autotune.errands import SavedModel
from autotune.errors import ConfigurationError
from autotune.plan import Plan, Stage
from cli.runs import run_of
from cli.wiring import cache_dir, read_plan


@dataclass(frozen=True)
class Found:
    """A model, and how it was trained where that is known."""

    saved: SavedModel
    plan: Plan | None
    run: Path | None

    @property
    def stage(self) -> Stage:
        """What it was trained on; of one that another program made, conversations."""
        return self.plan.workload.stage if self.plan else "sft"

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
    path = Path(place)
    if not path.is_dir():
        raise ConfigurationError(
            f"{place}: no such folder", "give a run (runs/NAME), one of its checkpoints, or a model's folder"
        )
    folder = path / "model" if (path / "model" / "config.json").exists() else path
    if (folder / "config.json").exists():
        plan_file = folder.parent / "plan.json"
        of_run = folder.name in ("model", "best") and plan_file.exists()
        plan = read_plan(str(plan_file)) if of_run else None
        tokenizer = str(folder) if (folder / "tokenizer.json").exists() else None
        saved = SavedModel(place=place, model=str(folder), vocabulary_size=None, checkpoint=None, tokenizer=tokenizer)
        return Found(saved, plan, folder.parent if plan else None)
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
        vocabulary_size=None if Path(workload.model).is_dir() else workload.vocabulary_size,
        checkpoint=place,
        tokenizer=found,
    )
    return Found(saved, plan, run)
