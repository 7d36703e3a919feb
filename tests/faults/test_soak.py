"""A long run holds no more memory, descriptors and threads than a short one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from conftest import chatlm_path, metrics
from micro import write_dialogues
from tiers import trials

from autotune.process import held_bytes

MIB = 2**20
STEPS, FIRST, SAVE_EVERY = trials(800, 20_000), trials(300, 1000), trials(20, 100)


def test_memory_descriptors_and_threads_stay_what_they_were(
    tmp_path: Path, chatlm_environment: dict[str, str], tell: Any
) -> None:
    """The profile `tiny` on short rows of all lengths, saving all the while."""
    write_dialogues(tmp_path / "data.jsonl", 40)
    command = [
        chatlm_path(), "train", "--profile", "tiny", "--data", "data.jsonl", "--max-seq-len", 32, "--samples", 0,
        "--batch-size-per-gpu", 2, "--effective-batch-size", 2, "--epochs", 10_000, "--max-steps", STEPS,
        "--save-every", SAVE_EVERY, "--precision", "fp32", "--compile", "off", "--output-dir", "run",
    ]  # fmt: skip
    process = subprocess.Popen(
        [*map(str, command)], cwd=tmp_path, env=chatlm_environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    file, seen = tmp_path / "run" / "metrics.jsonl", []
    while process.poll() is None:
        time.sleep(1.0)
        step = last_step(file)
        if step >= FIRST and (worker := trainer_of(process)) is not None:
            with worker.oneshot():
                seen.append((step, held_bytes(worker.pid), worker.num_fds(), worker.num_threads()))
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert len(metrics(tmp_path / "run")) == STEPS
    training = [one for one in seen if one[0] <= STEPS - 2 * SAVE_EVERY]
    assert len(training) > 3
    early, late = training[: len(training) // 4 + 1], training[-len(training) // 4 :]
    # As it saves it holds a file or two more: the least of a while is what it holds between.
    grown = min(one[1] for one in late) - min(one[1] for one in early)
    assert grown <= 16 * MIB, f"{grown / MIB:.1f} MiB more after {STEPS} steps"
    assert min(one[2] for one in late) == min(one[2] for one in early)
    assert {one[3] for one in late} == {one[3] for one in early}
    sys.stdout.write(f"after {FIRST} steps {early[0][1] / MIB:.1f} MiB, after {STEPS} {grown / MIB:+.1f} MiB\n")
    tell(1)


def last_step(file: Path) -> int:
    """The last whole row's."""
    if not file.exists():
        return 0
    with file.open("rb") as rows:
        rows.seek(max(0, file.stat().st_size - 4000))
        lines = rows.read().split(b"\n")[1:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def trainer_of(process: subprocess.Popen[str]) -> psutil.Process | None:
    try:
        return next((p for p in psutil.Process(process.pid).children() if "trainer.worker" in p.cmdline()), None)
    except psutil.Error:
        return None
