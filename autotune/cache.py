"""Remembers between commands what was learned of a workload on this machine: evidence, not plans.

What is remembered is replayed against what is free now, so that the same command gives the same plan, and more memory
another one. Kept by everything that decides memory or speed.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from autotune.evidence import Evidence
from autotune.plan import Hardware, Request, Workload

LIBRARIES = ("chatlm", "torch", "transformers", "numpy")
DECIDING = ("OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "CUDA_VISIBLE_DEVICES")
"""What a worker takes over from our environment."""
OF_THE_MOMENT = {"memory_limit_bytes", "headroom", "offline"}
"""What a request says of budgets decides which trials are needed, not what they hold."""


def recall(folder: Path, workload: Workload, hardware: Hardware, request: Request) -> Evidence | None:
    """Return what was learned before; None where there is nothing, or nothing that can be read."""
    try:
        text = _file(folder, workload, hardware, request).read_text(encoding="utf-8")
        return Evidence.model_validate_json(text)
    except (OSError, ValueError):
        return None


def keep(folder: Path, workload: Workload, hardware: Hardware, request: Request, evidence: Evidence) -> None:
    """Remember evidence; a folder that cannot be written is no reason to fail."""
    file = _file(folder, workload, hardware, request)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(evidence.model_dump_json(), encoding="utf-8")
        partial.replace(file)
    except OSError:
        with suppress(OSError):
            partial.unlink()


def _file(folder: Path, workload: Workload, hardware: Hardware, request: Request) -> Path:
    key = "\n".join(
        (
            workload.model_dump_json(),
            hardware.model_dump_json(
                include={"device", "device_name", "device_memory_total_bytes", "world_size", "cores"}
            ),
            request.model_dump_json(exclude=OF_THE_MOMENT),
            _configuration(workload.model),
            *(os.environ.get(name, "") for name in DECIDING),
            platform.python_version(),
            *(version(library) for library in LIBRARIES),
        )
    )
    return folder / "plans" / f"{sha256(key.encode()).hexdigest()[:16]}.json"


def _configuration(model: str) -> str:
    """Return what a folder says of its model: that may change, and the folder's name stay. Empty for a preset."""
    try:
        return (Path(model) / "config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
