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
from trainer.encode import ids_of
from trainer.model import load_config, load_weights, set_generation_ids, set_ids, task_of
from trainer.tokenizer import load_tokenizer


def open_model(saved: SavedModel, device: torch.device) -> Any:
    """Return a model in fp32 for evaluation; raises ConfigurationError for one that is damaged, or not whole."""
    config = load_config(saved.model, saved.vocabulary_size, None)
    auto = AutoModelForSeq2SeqLM if task_of(config) == "seq2seq" else AutoModelForCausalLM
    if saved.checkpoint is None:
        model = load_weights(auto, saved.model, config, None)
    else:
        found = manifest.find(Path(saved.checkpoint))
        if found is None:
            raise ConfigurationError(f"{saved.checkpoint} has no checkpoint")
        ids = None
        if saved.tokenizer is not None:
            ids = ids_of(load_tokenizer(saved.tokenizer), task_of(config), saved.stage)
            set_ids(config, ids, special=True)
        model = auto.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        check_model(found.folder, model)
        restore_weights(found.folder, model)
        if ids is not None:
            set_generation_ids(model, ids)
    return model.to(device).eval()
