"""Folders of models and tokenizers from strangers: what is read of one lies in it. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from autotune.errors import ConfigurationError

INDEX = "model.safetensors.index.json"


def check_links(folder: str, names: Iterable[str] = ()) -> None:
    """Raise ConfigurationError for a file of a folder, or one of these names there, that leads out of it.

    Links of the hub's cache lead from snapshots/REVISION to the blobs beside: those are the files themselves.
    """
    path = Path(folder)
    real = path.resolve()
    homes = [real, *([real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [])]
    files = [file for pattern in ("*", "additional_chat_templates/*") for file in path.glob(pattern) if file.is_file()]
    for name in (*(str(file.relative_to(path)) for file in files), *names):
        place = Path(os.path.realpath(path / name))
        if not any(place.is_relative_to(home) for home in homes):
            raise ConfigurationError(
                f"{folder}: {name} leads out of this folder, to {place}",
                "put what you trust into the folder, as a file",
            )


def check_weights(folder: str, name: str) -> None:
    """Raise ConfigurationError for weights, by the name that transformers opens, that lie elsewhere or are pickled."""
    check_links(folder, [name])
    index = Path(folder) / name
    if not name.endswith(".index.json") or not index.is_file():
        return
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        wrong = [shard for shard in shards if not shard.endswith(".safetensors") or "\0" in shard]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ConfigurationError(f"{index}: not an index of weights", "save the model with save_pretrained") from None
    if wrong:
        raise ConfigurationError(f"{index}: names {wrong[0]!r}, and only safetensors are read")
    check_links(folder, shards)
