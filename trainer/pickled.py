"""Reads pickled weights of strangers: tensors alone, by torch's unpickler that runs nothing, in bounded memory."""

from __future__ import annotations

import pickle
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from torch import Tensor

from autotune.errors import ConfigurationError
from trainer.memory import is_memory_error

INSIDE = ("model", "state_dict", "module")
"""Under which of these a file that holds more, such as one to go on from, keeps its weights."""
TAR_MARK = (257, b"ustar")
"""POSIX.1-1988: where a tar archive says that it is one."""
ALIASES = 4
"""Names that a tensor may have: T5's embedding is its encoder's, its decoder's and its output layer."""
TIMES_FILE, BEYOND_BYTES = 4, 2**30
"""Of address space: the file in memory, read from memory, in another precision and at hand."""


def read_pickled(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, as they lie there.

    Raises ConfigurationError for what is no file of weights alone, or takes more memory than weights need.
    """
    with file.open("rb") as opened:
        if (
            opened.read(TAR_MARK[0] + 5)[TAR_MARK[0] :] == TAR_MARK[1]
        ):  # of torch 0.1, which torch unpacks, then refuses
            _refuse(file, "is a tar archive")
    try:
        size = file.stat().st_size
        with limited(TIMES_FILE * size + BEYOND_BYTES):
            made = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        _refuse(file, f"is not weights alone: {_named(error)}")
    except Exception as error:  # noqa: BLE001 # whatever an unpickler makes of a stranger's file
        if isinstance(error, MemoryError) or is_memory_error(error):
            _refuse(file, "takes more memory than weights of its size can need")
        _refuse(file, "is no file of weights, or damaged")
    return _checked(_inside(made), file)


@contextmanager
def limited(more_bytes: int) -> Iterator[None]:
    """Let this process have so much more address space, where systems can; whoever started it has its time."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


HINT = "it may be damaged, or made to do harm: fetch it again from where it was published"


def _refuse(file: Path, why: str) -> NoReturn:
    raise ConfigurationError(f"{file}: it {why}", HINT) from None


def _named(error: Exception) -> str:
    """Return what torch says that a file asked for, without its advice to let it."""
    asked = re.search(r"GLOBAL (\S+) was not an allowed|Unsupported (?:class|operand|global:?) (\S+)", str(error))
    return f"it asks for {asked[1] or asked[2]}" if asked else "it is damaged, or a program"


def _inside(made: Any) -> Any:
    """Return the weights where a file has something beside them."""
    if isinstance(made, Mapping) and not _is_weights(made):
        for name in INSIDE:
            if _is_weights(made.get(name)):
                return made[name]
    return made


def _is_weights(made: Any) -> bool:
    return isinstance(made, Mapping) and bool(made) and all(isinstance(value, Tensor) for value in made.values())


def _checked(made: Any, file: Path) -> dict[str, Tensor]:
    """Raise ConfigurationError for what are no tensors by name, or tensors that are more than their file."""
    if not _is_weights(made) or not all(isinstance(name, str) for name in made):
        _refuse(file, "holds no weights by name, as a state_dict has them")
    room = file.stat().st_size
    if sum(tensor.nbytes for tensor in made.values()) > ALIASES * room:
        _refuse(file, "names the same numbers again and again")
    for name, tensor in made.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            _refuse(file, f"has {name!r} as no plain tensor: {tensor.layout}, {tensor.dtype}, {tensor.device}")
        if tensor.numel() * tensor.element_size() > min(tensor.untyped_storage().nbytes(), room):
            _refuse(file, f"has {name!r} of {tuple(tensor.shape)}, which is more than the file holds")
    return {str(name): tensor.detach() for name, tensor in made.items()}
