"""What a training holds of its data does not grow with it: a store of ten million samples, as flat files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

MIB = 2**20
LENGTH = 8
LOADING = """
import re, sys
from pathlib import Path
from trainer.data import Order, TokenStore

store = TokenStore(Path(sys.argv[1]))
order = Order(len(store), 42, 0)
for first in range(0, len(store), max(32, len(store) // 300)):
    for i in order[first : first + 32]:
        assert len(store.tokens(i)) == 8 and store.spans(i).tolist() == [[4, 8]]
print(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def write(folder: Path, samples: int) -> None:
    """Write what `write_store` would, of samples of eight tokens whose last four are targets."""
    folder.mkdir()
    np.zeros(samples * LENGTH, np.uint16).tofile(folder / "tokens")
    np.arange(0, (samples + 1) * LENGTH, LENGTH).tofile(folder / "offsets")
    np.full((samples, 2), (4, 8), np.int32).tofile(folder / "spans")
    np.arange(samples + 1).tofile(folder / "span_offsets")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory apart")
def test_ten_thousand_and_ten_million_samples_take_the_same_memory(tmp_path: Path) -> None:
    held = []
    for samples in (10_000, 10_000_000):
        write(tmp_path / str(samples), samples)
        command = [sys.executable, "-c", LOADING, str(tmp_path / str(samples))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        held.append(int(done.stdout) * 1024)
    assert abs(held[1] - held[0]) <= 64 * MIB
