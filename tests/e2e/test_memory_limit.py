"""A real memory limit: a plan made inside one is kept by the run, which the system does not kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import chatlm_path, metrics

GIB = 2**30


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A memory control group of 1.5 GiB, of the version that this machine has, where one may be made."""
    root = Path("/sys/fs/cgroup")
    second = (root / "cgroup.controllers").exists()
    folder = (root if second else root / "memory") / f"chatlm-test-{os.getpid()}"
    try:
        if second:
            (root / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
        (folder / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(3 * GIB // 2))
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    yield folder
    end = time.monotonic() + 10
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            assert time.monotonic() < end, "processes were left in the group"
            time.sleep(0.1)


def kills(group: Path) -> int:
    """How often the kernel's out-of-memory killer struck in a group."""
    counts = next(file for name in ("memory.events", "memory.oom_control") if (file := group / name).exists())
    return int(dict(line.split() for line in counts.read_text().splitlines())["oom_kill"])


@pytest.mark.slow
def test_inside_a_memory_control_group_it_plans_what_fits_and_is_not_killed(
    memory_group: Path, tmp_path: Path, real_data: Path, chatlm_environment: dict[str, str]
) -> None:
    """64 rows of this data take over 2 GiB at this shape; the group has 1.5 GiB, half of which a neighbour holds."""
    data = real_data / "chatlm_mini" / "my_train_dataset_3k.parquet"
    command = [chatlm_path(), "train", "--auto", "--model", "tiny", "--data", str(data), "--max-seq-len", "256",
               "--effective-batch-size", "64", "--prefer", "largest", "--limit", "400", "--max-steps", "2",
               "--output-dir", "run"]  # fmt: skip
    neighbour = [sys.executable, "-c", "held = bytearray(700 * 2**20); print(len(held), flush=True); input()"]
    enter = ["bash", "-c", f'echo $$ > {memory_group}/cgroup.procs && exec "$@"', "bash"]
    with subprocess.Popen([*enter, *neighbour], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert int(other.stdout.readline()) == 700 * 2**20
        done = subprocess.run(
            [*enter, *command], cwd=tmp_path, env=chatlm_environment, capture_output=True, text=True, timeout=500
        )
        other.communicate(b"\n")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["batching"]["effective_batch_size"] == 64
    assert plan["batching"]["micro_batch_size"] < 64
    assert plan["batching"]["limited_by"] == "memory"
    assert "control group" in plan["memory"]["limit_from"]
    rows = metrics(tmp_path / "run")
    assert [row["samples"] for row in rows] == [64] * 2
    assert max(row["peak_memory_bytes"] for row in rows) <= plan["memory"]["budget_bytes"]
    assert other.returncode == 0
    assert kills(memory_group) == 0
