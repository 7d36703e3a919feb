"""What a checkpoint is, and whether it still is what was written: its name, its manifest, every byte of it. No torch.

    checkpoints/step-00000500/{model.safetensors, optimizer.safetensors, state.json, manifest.json}

The manifest has the size and hash of each of the others and begins with a hash of its own.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from autotune.errands import Recipe
from autotune.errors import ConfigurationError, MachineError
from autotune.plan import Fact, Plan

FOLDER, GIVEN_UP = "checkpoints", "checkpoints-given-up"
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
CHECKSUM = re.compile(rb'\{"checksum": "([0-9a-f]{64})",\n')
"""How a manifest begins: the hash of all that follows in its file."""


class Identity(Fact):
    """What has to be the same for a run to go on as if it had not been stopped."""

    data: str
    """Hash of the samples, whatever the files are called."""
    samples: int
    tokenizer: str | None
    effective_batch_size: int
    seed: int
    optimizer: str
    frozen: tuple[str, ...]


class FileFacts(Fact):
    """What a file is, to the byte."""

    bytes: int
    sha256: str


class Manifest(Fact):
    """What a checkpoint is, and of what."""

    schema_name: Literal["chatlm.checkpoint/1"] = Field(alias="schema")
    step: int
    samples: int
    """Used so far, over all epochs: the place in the data."""
    identity: Identity
    recipe: Recipe
    plan: str
    """Hash of the plan that was trained: under another, losses may differ in their last digits."""
    versions: dict[str, str]
    files: dict[str, FileFacts]


class DamagedError(Exception):
    """A folder that is no whole checkpoint; says why."""


@dataclass(frozen=True)
class Found:
    """A checkpoint whose every byte was verified."""

    folder: Path
    manifest: Manifest
    damaged: tuple[str, ...]
    """Newer ones that were passed over, each with the reason."""


@dataclass(frozen=True)
class Origin:
    """What a checkpoint is of: whoever resumes it holds this against his own."""

    identity: Identity
    recipe: Recipe
    plan: Plan

    @property
    def plan_hash(self) -> str:
        """Hash of all that decides the numbers of a step."""
        workload = self.plan.workload.model_dump_json(exclude={"model", "data_fingerprint", "tokenizer_fingerprint"})
        decides = (workload, self.plan.batching.model_dump_json(), self.plan.hardware.device)
        return hashlib.sha256("\n".join(decides).encode()).hexdigest()


def find(place: Path) -> Found | None:
    """Return the newest checkpoint that verifies, in the folder of a run or of checkpoints, or which it is itself.

    None where there is none at all; raises MachineError where not one of them is whole.
    """
    if (place / MANIFEST).exists() or NAME.fullmatch(place.name):
        candidates = [place]
    else:
        candidates = all_in(place / FOLDER if (place / FOLDER).is_dir() else place)
    damaged: list[str] = []
    for folder in candidates:
        try:
            return Found(folder, verify(folder), tuple(damaged))
        except DamagedError as error:
            damaged.append(f"{folder.name}: {error}")
    if damaged:
        raise MachineError(
            f"{place}: no checkpoint is whole: {'; '.join(damaged)}",
            "begin anew in another --output-dir, or give --resume-from the folder of another checkpoint",
        )
    return None


def verify(folder: Path, name: str = "") -> Manifest:
    """Return the manifest of a checkpoint whose every file is what was written, by size and hash; else DamagedError.

    `name` is what it is called if not by its folder, as one that is hidden is not.
    """
    try:
        written = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    head = CHECKSUM.match(written)
    if head is None or hashlib.sha256(written[head.end() :]).hexdigest().encode() != head[1]:
        raise DamagedError(f"{MANIFEST} is not what was written")
    try:
        manifest = Manifest.model_validate_json(b"{" + written[head.end() :])
    except ValidationError as error:
        raise DamagedError(f"{MANIFEST} is of another version of chatlm ({error.errors()[0]['loc']})") from None
    if (name or folder.name) != name_of(manifest.step):
        raise DamagedError(f"it is step {manifest.step}, under another name")
    for name, facts in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
            if size != facts.bytes:
                raise DamagedError(f"{name} has {size:,} bytes, {facts.bytes:,} were written")
            if hash_of(folder / name) != facts.sha256:
                raise DamagedError(f"{name} is not what was written")
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from None
    return manifest


def sealed(manifest: Manifest) -> bytes:
    """Return a manifest as it is written: JSON that begins with the hash of all that follows."""
    body = manifest.model_dump_json(by_alias=True, indent=2).encode()[1:]
    return b'{"checksum": "' + hashlib.sha256(body).hexdigest().encode() + b'",\n' + body


def check_identity(found: Found, now: Identity) -> None:
    """Raise ConfigurationError, by name, where going on would not be the same run."""
    before = found.manifest.identity
    for name in Identity.model_fields:
        then, today = getattr(before, name), getattr(now, name)
        if then != today:
            what = name.replace("_", " ")
            raise ConfigurationError(
                f"{found.folder} was trained with another {what}: {_shown(then)} then, {_shown(today)} now",
                "give what it was trained with, or begin a new run from its weights alone: --resume-from "
                f"{found.folder} --resume-weights-only --output-dir NEW",
            )


def is_whole(folder: Path, name: str = "") -> bool:
    """Whether a folder is a checkpoint of this name, or its own, whose every byte is what was written."""
    try:
        verify(folder, name)
    except DamagedError:
        return False
    return True


def name_of(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step-{step:08d}"


def all_in(checkpoints: Path) -> list[Path]:
    """Return what is named as a checkpoint, the newest first."""
    found = [folder for folder in checkpoints.glob("step-*") if NAME.fullmatch(folder.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def hash_of(file: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _shown(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
