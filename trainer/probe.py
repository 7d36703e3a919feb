"""The errand: what torch sees of this machine, and how fast the device is, in about two seconds."""

from __future__ import annotations

import time

import torch

from autotune.errands import Probe, Probed
from autotune.plan import Precision
from trainer.memory import first_line
from trainer.rate import copy_bytes, matrix_flops


def probe(errand: Probe) -> Probed:
    """Look, then measure; a rate that cannot be had is left out and told."""
    began = time.monotonic()
    sees_card = torch.cuda.is_available()
    rates: dict[Precision, float] = {}
    copied, failed = None, ""
    if errand.device == "cpu" or sees_card:
        device = torch.device(errand.device)
        try:
            copied = copy_bytes(device)
            for precision in errand.precisions:
                rates[precision] = matrix_flops(device, precision)
        except (RuntimeError, MemoryError) as error:  # no room, or no kernels for this card
            failed = first_line(error)
    return Probed(
        sees_card=sees_card,
        why_not="" if sees_card or errand.device == "cpu" else _why_not(),
        architectures=tuple(torch.cuda.get_arch_list()),
        instructions=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        matrix_flops=rates,
        copy_bytes=copied,
        failed=failed,
        seconds=time.monotonic() - began,
    )


def _why_not() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # the latter of a build without CUDA
        return first_line(error)
    return ""
