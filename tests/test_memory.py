"""The heap of a real process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from autotune.process import ALLOCATORS, HOME

FREE_SMALL_PIECES = """
import numpy as np, torch
from trainer.memory import PeakMeter, prepare_heap
meter = PeakMeter(torch.device("cpu"))
pieces = [np.ones(25_000) for _ in range(500)]  # 100 MB, each piece below the threshold
above = bytes(100_000)
del pieces
held = meter.held_bytes()
prepare_heap(torch.device("{device}"), "{allocator}")
print(held - meter.held_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the heap is glibc's")
@pytest.mark.parametrize(
    ("device", "allocator", "least", "most"),
    [("cpu", "tight", 80_000_000, 110_000_000), ("cpu", "fast", -(10**6), 10**6), ("cuda", "tight", -(10**6), 10**6)],
)
def test_what_was_freed_is_given_back_before_a_step_on_a_processor_under_the_tight_setting(
    device: str, allocator: str, least: int, most: int
) -> None:
    environment = os.environ | ALLOCATORS[allocator] | {"PYTHONPATH": str(HOME)}  # type: ignore[index]
    # What the heap keeps is to be seen for itself, so that nothing is given back on its own.
    environment["MALLOC_TRIM_THRESHOLD_"] = str(2**40)
    program = FREE_SMALL_PIECES.format(device=device, allocator=allocator)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) <= most
