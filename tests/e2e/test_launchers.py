"""Several ranks by the real command: launched by itself, and inside the launchers that people know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CommandRunner, chatlm_path, metrics
from test_command_line import DIALOGUES, write_rows
from test_ranks import free_port

LAUNCHERS = {
    "torchrun": [["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]],
    "accelerate": [["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
                    "--mixed_precision=no", "--dynamo_backend=no", "--no_python"]],
    "two machines": [["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
                      f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1", "--no-python"]] * 2,
}  # fmt: skip
"""What each machine is told: all but one on one machine, the last by a rendezvous of two agents."""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
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
    machines = [
        subprocess.Popen(
            [sys.executable, *told, chatlm_path(), *given, "--output-dir", "launched"],
            cwd=tmp_path, env=chatlm_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for told in LAUNCHERS[launcher]
    ]  # fmt: skip
    said = [machine.communicate(timeout=240) for machine in machines]
    assert [machine.returncode for machine in machines] == [0] * len(machines), said
    assert sum(out.count("finished after 4 steps") for out, _ in said) == 1
    assert [row["loss"] for row in metrics(tmp_path / "launched")] == [row["loss"] for row in metrics(tmp_path / "own")]
    alone = chatlm(*given, "--output-dir", "alone")
    assert alone.returncode == 0, alone.stderr
    assert [row["loss"] for row in metrics(tmp_path / "own")] == pytest.approx(
        [row["loss"] for row in metrics(tmp_path / "alone")], rel=1e-5
    )
