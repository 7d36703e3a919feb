"""Writes and reads checkpoints: they are there whole or not at all. What one is stands in `manifest`.

A checkpoint is written to a hidden folder beside the others. Every file is synced, then a manifest with the size and
hash of each, then the folder is renamed, which is what makes it one, and its parent synced; only then older ones go.
After a loss of power there is the old or the new, never a mix. Tensors are safetensors, all else JSON: nothing that is
read can run code. Knows files and tensors; when to save is the loop's affair.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autotune.disk import remove, sync
from autotune.errors import ConfigurationError, MachineError
from autotune.plan import Fact
from trainer.manifest import (
    GIVEN_UP,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    FileFacts,
    Found,
    Manifest,
    Origin,
    all_in,
    hash_of,
    is_whole,
    name_of,
    sealed,
    step_of,
)
from trainer.memory import first_line, is_memory_error
from trainer.progress import Progress
from trainer.step import TrainState

KEPT_AT_LEAST = 2
"""Whatever --keep-last says: where the newest does not verify there has to be another."""
SMALL_FILES_BYTES = 2**20
"""State, manifest, headers and folders, at most."""
MIB = 2**20
VERSIONS = {
    "chatlm": version("chatlm"),
    "python": platform.python_version(),
    "torch": torch.__version__,
    "transformers": version("transformers"),
}
"""What may change the last digits of a loss. Read at the start: a save looks into no folder but its own."""


class SavedState(Fact):
    """What of a training is no tensor."""

    progress: Progress
    loss_scale: float
    steps_since_overflow: float


SAVED_STATE = TypeAdapter(SavedState)


def save(checkpoints: Path, state: TrainState, progress: Progress, origin: Origin, keep_last: int) -> Path:
    """Commit a checkpoint, and remove what is older than the last so many; the best stays.

    Raises MachineError where the disk is full or fails, or memory runs out: what was there before is there still.
    """
    target = checkpoints / name_of(progress.step)
    partial = checkpoints / f".{target.name}.partial"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        if not all_in(checkpoints):  # whoever made the folders above may have been killed before they were synced
            _sync_above(checkpoints)
        _discard(partial)
        _check_room(checkpoints, state)
        partial.mkdir()
        _write(partial, state, progress, origin)
        with _hidden(target):  # one of the same step, which is there until the new one is
            os.rename(partial, target)  # noqa: PTH104 # fails where there is one already
            sync(checkpoints)
    except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
        remove(partial)
        of_memory = is_memory_error(error)
        if isinstance(error, RuntimeError) and not of_memory:
            raise
        said = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise MachineError(
            f"{target} could not be saved: {said}",
            f"free some of the {'memory' if of_memory else 'disk'}; what was saved before is still there",
        ) from None
    with suppress(OSError):  # the new one is there: what is older goes after a later save
        _rotate(checkpoints, keep_last, progress.best.step)
    return target


def restore(found: Found, state: TrainState) -> Progress:
    """Set weights, moments and loss scale to those of a checkpoint; return how far it was."""
    restore_weights(found.folder, state.model)
    names = _names(state.model)
    with safe_open(found.folder / OPTIMIZER, "pt") as saved:
        for key in saved.keys():  # noqa: SIM118 # it is no mapping
            moment, _, name = key.partition(".")
            parameter = names[name]
            state.optimizer.state[parameter][moment] = saved.get_tensor(key).to(parameter.device, copy=True)
    text = SAVED_STATE.validate_json((found.folder / STATE).read_bytes())
    state.loss_scale.fill_(text.loss_scale)
    state.steps_since_overflow.fill_(text.steps_since_overflow)
    return text.progress


def check_model(folder: Path, model: Any) -> None:
    """Raise ConfigurationError where a checkpoint's weights have other names or shapes than the model's."""
    with safe_open(folder / MODEL, "pt") as saved:
        theirs = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    ours = {name: tuple(tensor.shape) for name, tensor in _weights(model).items()}
    if different := sorted(name for name in theirs.keys() | ours if theirs.get(name) != ours.get(name)):
        first = different[0]
        raise ConfigurationError(
            f"{folder} is of another model: {len(different)} of its weights differ, first {first}: "
            f"{theirs.get(first, 'none')} there, {ours.get(first, 'none')} here",
            "give the --model that it was trained with",
        )


@torch.no_grad()
def restore_weights(folder: Path, model: Any) -> None:
    """Set a model's weights to those of a checkpoint, whose names and shapes are its own."""
    with safe_open(folder / MODEL, "pt") as saved:
        for name, tensor in _weights(model).items():
            tensor.copy_(saved.get_tensor(name))


def size_of(state: TrainState) -> int:
    """Return the bytes that a checkpoint takes."""
    tensors = [*_weights(state.model).values(), *_moments(state).values()]
    return sum(tensor.nbytes for tensor in tensors) + SMALL_FILES_BYTES


def _check_room(checkpoints: Path, state: TrainState) -> None:
    needed, free = size_of(state), shutil.disk_usage(checkpoints).free
    if free < needed:
        raise OSError(f"it takes {needed / MIB:,.0f} MiB, and the disk has {free / MIB:,.0f} MiB free")


def _write(folder: Path, state: TrainState, progress: Progress, origin: Origin) -> None:
    for name, tensors in ((MODEL, _weights(state.model)), (OPTIMIZER, _moments(state))):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})
    text = SavedState(
        progress=progress,
        loss_scale=state.loss_scale.item(),
        steps_since_overflow=state.steps_since_overflow.item(),
    )
    (folder / STATE).write_bytes(SAVED_STATE.dump_json(text, indent=2))
    names = (MODEL, OPTIMIZER, STATE)
    for name in names:
        sync(folder / name)
    manifest = Manifest(
        schema="chatlm.checkpoint/1",
        step=progress.step,
        samples=progress.samples,
        identity=origin.identity,
        recipe=origin.recipe,
        plan=origin.plan_hash,
        versions=VERSIONS,
        files={n: FileFacts(bytes=(folder / n).stat().st_size, sha256=hash_of(folder / n)) for n in names},
    )
    (folder / MANIFEST).write_bytes(sealed(manifest))
    sync(folder / MANIFEST)
    sync(folder)


def _rotate(checkpoints: Path, keep_last: int, best_step: int | None) -> None:
    """Remove what is older than the last so many, but the best, where two of those that stay are whole.

    The newest is: it was hashed as it was written. What one that stays has as its best stays too.
    """
    newest_first = all_in(checkpoints)
    kept = newest_first[: max(keep_last, KEPT_AT_LEAST)]
    best = {name_of(step) for step in (best_step, *map(_best_of, kept)) if step is not None}
    older = [folder for folder in newest_first[len(kept) :] if folder.name not in best]
    if older and any(map(is_whole, kept[1:])):
        for folder in older:
            _discard(folder)


def _best_of(folder: Path) -> int | None:
    try:
        return SAVED_STATE.validate_json((folder / STATE).read_bytes()).progress.best.step
    except (OSError, ValidationError):  # a damaged one has none
        return None


def recover(checkpoints: Path) -> None:
    """Clear up what a save or a removal that was killed has left; one that is whole gets its name."""
    for folder in sorted(checkpoints.glob(".step-*")):
        target = checkpoints / folder.name.removeprefix(".").partition(".")[0]
        if not target.exists() and is_whole(folder, target.name):
            folder.rename(target)
        else:
            remove(folder)


def give_up_after(checkpoints: Path, step: int) -> list[Path]:
    """Move checkpoints of later steps aside, so that none is taken for the newest again; return where they are."""
    moved = []
    for folder in all_in(checkpoints):
        if step_of(folder) > step:
            aside = checkpoints.with_name(GIVEN_UP) / folder.name
            _discard(aside)
            aside.parent.mkdir(exist_ok=True)
            moved.append(folder.rename(aside))
    return moved


def _discard(folder: Path) -> None:
    """Remove a folder: hidden first, so that one half removed is never taken for a checkpoint."""
    with _hidden(folder):
        pass


@contextmanager
def _hidden(folder: Path) -> Iterator[None]:
    """Put a folder, if there is one, out of sight, and remove it afterwards; where something fails it is back."""
    hidden = folder.with_name(f".{folder.name.lstrip('.')}.removed")
    remove(hidden)
    if folder.exists():
        folder.rename(hidden)
    try:
        yield
    except OSError:
        if hidden.exists():
            hidden.rename(folder)
        raise
    remove(hidden)


def _sync_above(folder: Path) -> None:
    """Make the names by which a folder is reached, on its disk, outlast a loss of power.

    What we may not read we have not made.
    """
    disk = folder.stat().st_dev
    for above in folder.resolve().parents:
        if above.stat().st_dev != disk:
            return
        with suppress(PermissionError):
            sync(above)


def _names(model: Any) -> dict[str, Tensor]:
    """Return the parameters by name; those that are tied are one."""
    return dict(model.named_parameters())


def _weights(model: Any) -> dict[str, Tensor]:
    """Return what a model is: its parameters, and those of its buffers that are saved with it."""
    saved = model.state_dict()
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in saved}
    return {name: tensor.detach() for name, tensor in (_names(model) | buffers).items()}


def _moments(state: TrainState) -> dict[str, Tensor]:
    """Return what the optimizer keeps of each parameter."""
    names = {parameter: name for name, parameter in _names(state.model).items()}
    return {
        f"{moment}.{names[parameter]}": tensor
        for parameter, kept in state.optimizer.state.items()
        for moment, tensor in kept.items()
    }
