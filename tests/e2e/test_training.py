"""Whole runs by the real command: what is planned is what trains, and what is left behind loads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandRunner, chatlm_path
from test_command_line import DIALOGUES, write_rows

SHORT = ("--max-seq-len", 64, "--effective-batch-size", 7)
FIXED = ("--max-seq-len", 64, "--effective-batch-size", 7, "--batch-size-per-gpu", 7)
GIB = 2**30


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "dialogues.jsonl", DIALOGUES)


@pytest.fixture(scope="module")
def auto_run(tmp_path_factory: pytest.TempPathFactory, chatlm_environment: dict[str, str]) -> Path:
    """A run of `train --auto` in whose folder the data lies too."""
    folder = tmp_path_factory.mktemp("auto")
    data = write_rows(folder / "dialogues.jsonl", DIALOGUES)
    command = [chatlm_path(), "train", "--auto", "--data", data, "--validation", data, *SHORT, "--epochs", 2]
    done = subprocess.run(
        [*map(str, command), "--learning-rate", "1e-3", "--output-dir", str(folder / "run")],
        env=chatlm_environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"model: {folder}/run/model" in done.stdout
    assert "RANDOM weights" in done.stderr
    return folder


def metrics(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def losses(run: Path) -> list[str]:
    return [float(row["loss"]).hex() for row in metrics(run)]


def test_a_run_leaves_what_was_decided_what_happened_and_the_model(auto_run: Path) -> None:
    run = auto_run / "run"
    names = {"config.toml", "plan.json", "evidence.json", "metrics.jsonl", "log.txt", "model"}
    assert {p.name for p in run.iterdir()} == names
    assert [row["samples"] for row in metrics(run)] == [7, 7, 7, 3] * 2
    assert [row["epoch"] for row in metrics(run, "train")] == [1] * 4 + [2] * 4
    assert [row["step"] for row in metrics(run, "validation")] == [4, 8]
    config = tomllib.loads((run / "config.toml").read_text())
    assert (config["effective_batch_size"], config["epochs"]) == (7, 2)


def test_auto_and_the_same_plan_from_a_file_train_alike_to_the_bit(
    auto_run: Path, tmp_path: Path, chatlm: CommandRunner
) -> None:
    done = chatlm("train", "--plan", auto_run / "run" / "plan.json", "--data", auto_run / "dialogues.jsonl",
                  "--max-seq-len", 64, "--epochs", 2, "--learning-rate", "1e-3", "--output-dir", "again")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "again") == losses(auto_run / "run")


def test_a_run_is_not_written_over(auto_run: Path, chatlm: CommandRunner) -> None:
    before = (auto_run / "run" / "metrics.jsonl").read_bytes()
    done = chatlm("train", "--data", auto_run / "dialogues.jsonl", "--output-dir", auto_run / "run")
    assert done.returncode == 5
    assert "already holds a run" in done.stderr
    assert (auto_run / "run" / "metrics.jsonl").read_bytes() == before


def test_a_trained_model_is_a_checkpoint_to_train_from(auto_run: Path, tmp_path: Path, chatlm: CommandRunner) -> None:
    done = chatlm("train", "--model", auto_run / "run" / "model", "--data", auto_run / "dialogues.jsonl", *FIXED,
                  "--max-steps", 1, "--output-dir", "second")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "RANDOM" not in done.stderr
    assert metrics(tmp_path / "second")[0]["loss"] < 0.9 * metrics(auto_run / "run")[0]["loss"]
    before, after = auto_run / "run" / "model", tmp_path / "second" / "model"
    assert (before / "model.safetensors").read_bytes() != (after / "model.safetensors").read_bytes()
    assert (before / "tokenizer.json").read_bytes() == (after / "tokenizer.json").read_bytes()


def test_a_size_that_was_given_is_kept_and_the_effective_batch_reached(
    tmp_path: Path, dialogues: Path, chatlm: CommandRunner
) -> None:
    done = chatlm("train", "--batch-size-per-gpu", 3, "--data", dialogues, *SHORT, "--output-dir", "run")
    assert done.returncode == 0, done.stderr
    batching = json.loads((tmp_path / "run" / "plan.json").read_text())["batching"]
    assert (batching["micro_batch_size"], batching["effective_batch_size"]) == (3, 7)
    assert batching["limited_by"] == "user"
    assert [row["micro_batches"] for row in metrics(tmp_path / "run")] == [3, 3, 3, 1]


def test_a_size_that_was_given_and_does_not_fit_is_refused(dialogues: Path, chatlm: CommandRunner) -> None:
    done = chatlm("train", "--batch-size-per-gpu", 900, "--data", dialogues, "--max-seq-len", 64,
                  "--memory-limit", "1GiB")  # fmt: skip
    assert done.returncode == 1
    assert "a batch of 900 rows" in done.stderr
    assert "--auto" in done.stderr


def test_where_one_row_does_not_fit_the_answer_names_what_would(chatlm: CommandRunner) -> None:
    done = chatlm("plan", "--model", "tiny", "--memory-limit", "514MiB", "--max-seq-len", 1024)
    assert done.returncode == 1
    assert "one row of 1024 tokens" in done.stderr
    assert "would fit" in done.stderr


def test_a_plan_for_shorter_rows_than_the_data_has_is_refused_unless_the_data_is_cut(
    auto_run: Path, tmp_path: Path, chatlm: CommandRunner
) -> None:
    plan = json.loads((auto_run / "run" / "plan.json").read_text())
    plan["workload"]["max_seq_len"] = 16
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    again = ("train", "--plan", "plan.json", "--data", auto_run / "dialogues.jsonl", "--output-dir", "run")
    done = chatlm(*again)
    assert done.returncode == 2
    assert "the plan holds for rows of 16 tokens" in done.stderr
    done = chatlm(*again, "--max-seq-len", 16, "--max-steps", 1)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run")[0]["padded_tokens"] == 7 * 16
    done = chatlm(*again, "--model", "tiny-t5", "--output-dir", "other")
    assert done.returncode == 2
    assert "the plan has model tiny" in done.stderr


def test_ctrl_c_leaves_a_model_that_loads(tmp_path: Path, dialogues: Path, chatlm_environment: dict[str, str]) -> None:
    command = [chatlm_path(), "train", "--batch-size-per-gpu", "7", "--data", str(dialogues), "--max-seq-len", "64",
               "--effective-batch-size", "7", "--epochs", "100000", "--output-dir", "run"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, env=chatlm_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    file = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not file.exists() or file.read_text().count('"train"') < 3:
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped after" in out
    assert metrics(tmp_path / "run", "event")[-1]["event"] == "stopped"
    loads = "from transformers import AutoModelForCausalLM as A; A.from_pretrained('run/model')"
    subprocess.run([sys.executable, "-c", loads], cwd=tmp_path, check=True, capture_output=True)


def test_documents_are_pretrained_on(tmp_path: Path, real_data: Path, chatlm: CommandRunner) -> None:
    done = chatlm("train", "--data", real_data / "dialogue" / "pretrain_docs.jsonl", "--limit", 40, *FIXED,
                  "--max-steps", 3, "--output-dir", "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    workload = json.loads((tmp_path / "run" / "plan.json").read_text())["workload"]
    assert workload["stage"] == "pretrain"
    rows = metrics(tmp_path / "run")
    assert all(row["tokens"] - row["target_tokens"] == row["samples"] for row in rows)


@pytest.fixture
def memory_group() -> Any:
    """A memory control group (version 1) of 1.5 GiB, where one may be made."""
    folder = Path("/sys/fs/cgroup/memory") / f"chatlm-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(3 * GIB // 2))
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
    assert "oom_kill 0" in (memory_group / "memory.oom_control").read_text()
