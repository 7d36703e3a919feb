"""Several ranks by the real command: launched by itself, and inside the launchers that people know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CommandRunner, chatlm_path, metrics
from test_command_line import DIALOGUES, write_rows

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
                   "--mixed_precision=no", "--dynamo_backend=no", "--no_python"],
}  # fmt: skip


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_command_trains_alike_by_itself_and_inside_the_launchers_that_people_know(
    launcher: str, tmp_path: Path, chatlm: CommandRunner, chatlm_environment: dict[str, str]
) -> None:
    """Planned once, with what the first rank measures; the others say nothing, and all hold their share of cores."""
    data = write_rows(tmp_path / "dialogues.jsonl", DIALOGUES)
    given = ["train", "--data", str(data), "--max-seq-len", "64", "--effective-batch-size", "7", "--batch-size-per-gpu",
             "4", "--precision", "fp32", "--layout", "fixed", "--samples", "0"]  # fmt: skip
    own = chatlm(*given, "--ranks", 2, "--output-dir", "own")
    assert own.returncode == 0, own.stderr
    assert "4 rows x 1 accumulation x 2 ranks = effective batch 7, exactly" in own.stderr
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], chatlm_path(), *given, "--output-dir", "launched"],
        cwd=tmp_path, env=chatlm_environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after 4 steps") == 1
    assert [row["loss"] for row in metrics(tmp_path / "launched")] == [row["loss"] for row in metrics(tmp_path / "own")]
    alone = chatlm(*given, "--output-dir", "alone")
    assert alone.returncode == 0, alone.stderr
    assert [row["loss"] for row in metrics(tmp_path / "own")] == pytest.approx(
        [row["loss"] for row in metrics(tmp_path / "alone")], rel=1e-5
    )
