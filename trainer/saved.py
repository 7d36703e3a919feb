"""Models that lie on the disk -> model: a folder that transformers loads, or a checkpoint with its run's shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from autotune.errands import SavedModel
from autotune.errors import ConfigurationError
from trainer import manifest
from trainer.checkpoint import check_model, restore_weights
from trainer.model import load_config, load_weights, task_of


def open_model(saved: SavedModel, device: torch.device) -> Any:
    """Return a model in fp32 for evaluation; raises ConfigurationError for one that is damaged, or not whole."""
    config = load_config(saved.model, saved.vocabulary_size, None)
    auto = AutoModelForSeq2SeqLM if task_of(config) == "seq2seq" else AutoModelForCausalLM
    if saved.checkpoint is None:
        model = load_weights(auto, saved.model, config, "sdpa")
    else:
        found = manifest.find(Path(saved.checkpoint))
        if found is None:
            raise ConfigurationError(f"{saved.checkpoint} has no checkpoint")
        model = auto.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        check_model(found.folder, model)
        restore_weights(found.folder, model)
    return model.to(device).eval()
