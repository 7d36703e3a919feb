"""Which numbers a dropout keeps, drawn faster on a processor. Knows torch's generator and numpy's, no model.

torch draws them one by one on one thread, 9 ns each, unless MKL draws for it, which it does on Intel's processors
alone: a quarter of a step of a small T5. Here torch's generator gives a seed to each mask, as it gives MKL one, so that
its state is still all there is to keep, and a faster generator of numpy draws from that.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.library import Library

CPUINFO = Path("/proc/cpuinfo")
BITS = 32
"""Of each number that is compared to the probability: what that is rounded to."""
AT_ONCE = 2**18
"""Numbers drawn, 1 MiB of them: so that a mask takes no memory beside its own."""


def mkl_draws() -> bool:
    """Say whether torch has a fast way of its own here."""
    with contextlib.suppress(OSError):
        return torch.backends.mkl.is_available() and "GenuineIntel" in CPUINFO.read_text()  # type: ignore[no-untyped-call]
    return False


@contextmanager
def fast_masks() -> Iterator[None]:
    """Draw inside as `draw` does, whoever asks for a dropout: layers, functions, attention."""
    library = Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings(action="ignore"):  # that there is another way already
        library.impl("bernoulli_.float", draw, "CPU", allow_override=True)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def draw(mask: Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> Tensor:
    """Fill a tensor with ones, each with probability `p`, and zeros: what `Tensor.bernoulli_` does."""
    if not mask.is_contiguous():
        return mask.copy_(draw(torch.empty(mask.shape, dtype=mask.dtype), p, generator=generator))
    if p in (0.0, 1.0):
        return mask.fill_(p)
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    source = np.random.SFC64(seed)
    # The numbers have a sign: the least of them is kept, at any probability.
    most = max(1, round(p * 2**BITS)) - 2 ** (BITS - 1) - 1
    for part in torch.split(mask.view(-1), AT_ONCE):
        drawn = torch.from_numpy(source.random_raw((len(part) + 1) // 2).view(np.int32))
        torch.le(drawn[: len(part)], most, out=part)
    return mask
