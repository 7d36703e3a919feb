"""Whole runs by the real command: what is planned is what trains, and what is left behind loads."""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from conftest import CommandRunner, chatlm_path, metrics
from safetensors.torch import load_file
from test_command_line import DIALOGUES, write_rows
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.tokenizer import load_tokenizer

SHORT = ("--max-seq-len", 64, "--effective-batch-size", 7)
FIXED = (*SHORT, "--batch-size-per-gpu", 7, "--compile", "off")
"""A run that is measured anew; for what is no matter of planning there is `plan`."""
GIB = 2**30


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "dialogues.jsonl", DIALOGUES)


@pytest.fixture(scope="module")
def auto_run(tmp_path_factory: pytest.TempPathFactory, chatlm_environment: dict[str, str]) -> Path:
    """A run of `train --auto` in whose folder the data lies too."""
    folder = tmp_path_factory.mktemp("auto")
    data = write_rows(folder / "dialogues.jsonl", DIALOGUES)
    command = [chatlm_path(), "train", "--auto", "--data", data, "--validation", data, *SHORT, "--epochs", 2,
               "--prompt", "你好"]  # fmt: skip
    done = subprocess.run(
        [*map(str, command), "--learning-rate", "1e-3", "--output-dir", str(folder / "run")],
        env=chatlm_environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"model: {folder}/run/model" in done.stdout
    assert "RANDOM weights" in done.stderr
    assert "plan against real: worst case" in done.stdout
    assert "verified: " in done.stderr
    assert "step 8: 你好 -> " in done.stderr
    assert "of tokens right, BLEU " in done.stderr
    assert "best: the last one (step 8, validation loss " in done.stdout
    assert "went into answers" in done.stdout
    return folder


def losses(run: Path) -> list[str]:
    return [float(row["loss"]).hex() for row in metrics(run)]


def test_a_run_leaves_what_was_decided_what_happened_and_the_model(auto_run: Path) -> None:
    run = auto_run / "run"
    files = {"config.toml", "plan.json", "evidence.json", "data.json", "metrics.jsonl", "samples.jsonl", "log.txt"}
    assert {p.name for p in run.iterdir()} == files | {"checkpoints", "model"}
    assert [row["samples"] for row in metrics(run)] == [7, 7, 7, 3] * 2
    assert [row["epoch"] for row in metrics(run, "train")] == [1] * 4 + [2] * 4
    evaluated = metrics(run, "validation")
    assert [row["step"] for row in evaluated] == [4, 8]
    assert all(0 <= row["accuracy"] <= 1 and row["bleu_rows"] == 24 for row in evaluated)
    assert all("tok:" in row["bleu_signature"] and row["generation_seconds"] < row["seconds"] for row in evaluated)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in samples] == [4] * 4 + [8] * 4
    assert all(row.keys() == {"step", "prompt", "answer", "reference"} for row in samples)
    assert [row["reference"] is None for row in samples] == [True, False, False, False] * 2
    assert samples[0]["prompt"] == "你好"
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


def test_what_a_run_said_of_its_validation_data_evaluate_says_of_its_model(
    auto_run: Path, chatlm: CommandRunner
) -> None:
    """The same losses, of the model and of a checkpoint before it, and the same scores of the same answers."""
    run, data = auto_run / "run", auto_run / "dialogues.jsonl"
    places = (run, run / "checkpoints" / "step-00000004")
    done = chatlm("evaluate", *places, "--data", data, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    said = metrics(run, "validation")
    for place, row in zip(places, (said[1], said[0]), strict=True):
        ours = told[str(place)]
        assert ours["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert ours["accuracy"] == pytest.approx(row["accuracy"], rel=1e-9)
        assert (ours["answered"], ours["bleu_signature"]) == (row["bleu_rows"], row["bleu_signature"])
        assert ours["bleu"] == pytest.approx(row["bleu"])
        assert 0 <= ours["chrf"] <= 100


def test_what_was_trained_answers_as_it_did_in_training(auto_run: Path, chatlm: CommandRunner) -> None:
    """Of the run and of its last checkpoint; a prompt is answered by itself, and side by side for people."""
    run = auto_run / "run"
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    (then,) = [row["answer"] for row in samples if row["prompt"] == "你好" and row["step"] == 8]
    last = run / "checkpoints" / "step-00000008"
    asked = ("chat", run, "--compare", last, "--prompt", "你好", "--prompt", "你好", "--max-new-tokens", 12)
    done = chatlm(*asked, "--json")
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    texts = {answer["text"].strip() for row in (first, second) for answer in row["answers"].values()}
    assert len(texts) == 1
    assert then.startswith(texts.pop())
    done = chatlm(*asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens/s") == 4


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="a terminal of one's own is POSIX's")
def test_ctrl_c_ends_an_answer_and_not_the_conversation(
    auto_run: Path, tmp_path: Path, chatlm_environment: dict[str, str]
) -> None:
    """Of a model of random weights, whose likeliest tokens never end."""
    torch.manual_seed(0)
    shape = AutoConfig.from_pretrained(auto_run / "run" / "model", max_position_embeddings=30_000)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "endless")
    load_tokenizer(str(auto_run / "run" / "model")).save_pretrained(tmp_path / "endless")
    outer, inner = os.openpty()
    command = [chatlm_path(), "chat", "endless", "--max-new-tokens", "29000"]
    with subprocess.Popen(
        command, stdin=inner, stdout=inner, stderr=inner, cwd=tmp_path, env=chatlm_environment
    ) as talking:
        os.close(inner)

        def seen_until(mark: str, at_least: int = 0) -> str:
            seen = ""
            while mark not in seen or len(seen) < at_least:
                readable, _, _ = select.select([outer], [], [], 60)
                assert readable, seen
                seen += os.read(outer, 4096).decode(errors="replace")
            return seen

        seen_until("you> ")
        os.write(outer, b"hello\n")
        seen_until("", at_least=200)
        talking.send_signal(signal.SIGINT)
        assert "not ended by the model" in seen_until("you> ")
        os.write(outer, b"/clear\n")
        assert "what was said is forgotten" in seen_until("you> ", at_least=20)
        os.write(outer, b"/exit\n")
        assert talking.wait(60) == 0
    os.close(outer)


def test_a_run_goes_out_in_half_precision_and_comes_back(auto_run: Path, tmp_path: Path, chatlm: CommandRunner) -> None:
    """As MiniMind's own file, which is imported again; what is no model is a sentence."""
    done = chatlm("export", auto_run / "run", "--output", "full_sft_128.pth", "--format", "minimind")
    assert done.returncode == 0, done.stderr
    assert "hidden_size=128, num_hidden_layers=4, num_attention_heads=4" in done.stdout
    done = chatlm("train", "--model", "full_sft_128.pth", "--data", auto_run / "dialogues.jsonl")
    assert done.returncode == 2
    assert "hint: chatlm import full_sft_128.pth --output NEW" in done.stderr
    done = chatlm(
        "import", "full_sft_128.pth", "--output", "new", "--heads", 4, "--tokenizer", auto_run / "run" / "model"
    )
    assert done.returncode == 0, done.stderr
    assert_loads(tmp_path / "new")
    before = load_file(auto_run / "run" / "model" / "model.safetensors")
    after = load_file(tmp_path / "new" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name].half()) for name in before)
    for command, code, words in (
        (("import", "full_sft_128.pth", "--output", "new"), 5, "new is there already"),
        (("import", "none.pth", "--output", "x"), 2, "none.pth: no such file or folder"),
        (("export", tmp_path, "--output", "y"), 2, "is neither a model (no config.json) nor a run"),
        (("export", "new", "--output", "y", "--format", "onnx"), 2, "--format onnx is none of transformers, "),
        (("chat", "nowhere", "--prompt", "a"), 2, "nowhere: no such folder"),
        (("chat", "new", "--prompt", "a", "--top-k", 3), 2, "at temperature 0 none are"),
        (("chat", "new", "--prompt", "a", "--device", "tpu"), 2, "--device tpu is none of auto, cpu, cuda"),
        (("chat", "new", "--prompt", "a", "--max-new-tokens", 40000), 2, "the model has 32768 positions in all"),
    ):
        done = chatlm(*command)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr


def test_a_run_that_no_longer_gets_better_ends_early_with_its_best_model(
    tmp_path: Path, dialogues: Path, plan: tuple[str, ...], chatlm: CommandRunner
) -> None:
    """So high a rate that it gets worse; without data to evaluate on the option is refused."""
    early = ("train", "--data", dialogues, *plan, "--epochs", 50, "--early-stopping", 1, "--eval-every", 2)
    done = chatlm(*early)
    assert done.returncode == 2
    assert "early_stopping = 1 (command line) needs data to evaluate on" in done.stderr
    assert "give --validation FILE" in done.stderr
    done = chatlm(*early, "--validation", dialogues, "--learning-rate", 3, "--bleu-rows", 0, "--samples", 0,
                  "--schedule", "constant", "--warmup", 0, "--output-dir", "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (stopped,) = [row for row in metrics(tmp_path / "run", "event") if row["event"] == "early_stopping"]
    evaluated = metrics(tmp_path / "run", "validation")
    assert [row["step"] for row in evaluated] == list(range(2, stopped["step"] + 1, 2))
    assert stopped["best_loss"] == min(row["loss"] for row in evaluated[:-1]) <= evaluated[-1]["loss"]
    assert f"step {stopped['step']}: early stopping, the last 1 losses were not less than" in done.stderr
    assert f"finished after {stopped['step']} steps" in done.stdout
    assert f"best: run/best (step {stopped['best_step']}, validation loss" in done.stdout
    for name in ("best", "model"):
        assert_loads(tmp_path / "run" / name)
    assert (tmp_path / "run" / "samples.jsonl").read_text() == ""


def test_a_size_that_was_given_is_kept_and_the_effective_batch_reached(
    tmp_path: Path, dialogues: Path, chatlm: CommandRunner
) -> None:
    done = chatlm("train", "--batch-size-per-gpu", 3, "--layout", "fixed", "--data", dialogues, *SHORT,
                  "--deterministic", "on", "--output-dir", "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["workload"]["deterministic"] == "on"
    batching = plan["batching"]
    assert (batching["micro_batch_size"], batching["effective_batch_size"]) == (3, 7)
    assert batching["limited_by"] == "user"
    assert [row["micro_batches"] for row in metrics(tmp_path / "run")] == [3, 3, 3, 1]


def test_a_size_that_was_given_and_does_not_fit_is_refused(dialogues: Path, chatlm: CommandRunner) -> None:
    done = chatlm("train", "--batch-size-per-gpu", 900, "--data", dialogues, "--max-seq-len", 64,
                  "--gradient-checkpointing", "off",
                  "--memory-limit", "1GiB")  # fmt: skip
    assert done.returncode == 1
    assert "a batch of 900 rows" in done.stderr
    assert "--auto" in done.stderr


@pytest.mark.slow
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


@pytest.fixture
def plan(auto_run: Path) -> tuple[str, ...]:
    """What was planned for the dialogues: a run that is not about planning need not measure it again."""
    return ("--plan", str(auto_run / "run" / "plan.json"), "--max-seq-len", "64")


def started(tmp_path: Path, environment: dict[str, str], steps: int, *more: str) -> subprocess.Popen[str]:
    """A training that has taken so many steps and goes on."""
    command = [chatlm_path(), "train", "--data", str(tmp_path / "dialogues.jsonl"), *more,
               "--output-dir", "run"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    file = tmp_path / "run" / "metrics.jsonl"
    try:
        _wait_until(
            lambda: (file.exists() and file.read_text().count('"train"') >= steps) or process.poll() is not None
        )
    except AssertionError:
        kill_all(process)
        raise
    assert process.poll() is None, process.communicate()
    return process


def _wait_until(holds: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def assert_loads(model: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model)


def test_ctrl_c_leaves_a_model_that_loads(
    tmp_path: Path, dialogues: Path, plan: tuple[str, ...], chatlm_environment: dict[str, str]
) -> None:
    process = started(tmp_path, chatlm_environment, 3, *plan, "--epochs", "100000")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopped after" in out
    assert metrics(tmp_path / "run", "event")[-1]["event"] == "stopped"
    assert_loads(tmp_path / "run" / "model")


def test_ctrl_c_while_the_model_is_saved_does_not_harm_it(
    tmp_path: Path, dialogues: Path, plan: tuple[str, ...], chatlm_environment: dict[str, str]
) -> None:
    process = started(tmp_path, chatlm_environment, 4, *plan, "--epochs", "1")  # the last of its steps is done
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, 75), err
    assert "model: run/model" in out
    assert {p.name for p in (tmp_path / "run").iterdir() if "model" in p.name} == {"model"}
    assert_loads(tmp_path / "run" / "model")


def test_a_run_whose_supervisor_is_killed_saves_its_model(
    tmp_path: Path, dialogues: Path, plan: tuple[str, ...], chatlm_environment: dict[str, str]
) -> None:
    process = started(tmp_path, chatlm_environment, 3, *plan, "--epochs", "100000")
    process.kill()
    process.communicate()
    _wait_until(lambda: metrics(tmp_path / "run", "event")[-1]["event"] == "stopped")
    assert_loads(tmp_path / "run" / "model")


def test_a_number_that_is_none_is_told_and_written_as_json_has_it(
    tmp_path: Path, dialogues: Path, plan: tuple[str, ...], chatlm: CommandRunner
) -> None:
    done = chatlm("train", "--data", dialogues, *plan, "--learning-rate", "1e30", "--warmup", 0, "--output-dir", "run")
    assert done.returncode == 0, done.stderr
    assert "had a gradient that is not finite, and changed no weight" in done.stderr
    norms = [row["gradient_norm"] for row in metrics(tmp_path / "run")]
    assert norms[0] is not None
    assert norms[1:] == [None] * 3


def test_documents_are_pretrained_on(tmp_path: Path, real_data: Path, chatlm: CommandRunner) -> None:
    done = chatlm("train", "--data", real_data / "dialogue" / "pretrain_docs.jsonl", "--limit", 40, *FIXED,
                  "--max-steps", 3, "--output-dir", "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    workload = json.loads((tmp_path / "run" / "plan.json").read_text())["workload"]
    assert workload["stage"] == "pretrain"
    rows = metrics(tmp_path / "run")
    assert all(row["tokens"] - row["target_tokens"] == row["samples"] for row in rows)


def command_again(err: str) -> list[str]:
    """The command that a stop tells, as a shell would split it."""
    (line,) = [line for line in err.splitlines() if line.startswith("go on with:")]
    return shlex.split(line.removeprefix("go on with:"))


def kill_all(process: subprocess.Popen[str]) -> None:
    """Signal 9 to a command and all that it started, as when power fails."""
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.communicate()


def test_stopped_or_killed_and_resumed_by_the_command_that_is_told_it_is_the_same_run(
    tmp_path: Path, dialogues: Path, plan: tuple[str, ...], chatlm_environment: dict[str, str], chatlm: CommandRunner
) -> None:
    """Signal 9 before there is a checkpoint, SIGTERM, SIGUSR1, signal 9 to all: the losses of a run left alone."""
    more = (*plan, "--epochs", "30", "--save-every", "5", "--samples", "0")
    done = chatlm("train", "--data", dialogues, *more, "--output-dir", "whole")
    assert done.returncode == 0, done.stderr
    process = started(tmp_path, chatlm_environment, 2, *more, "--save-every", "1000")
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "killed by signal 9" in err
    process = started(tmp_path, chatlm_environment, 3, *more, "--resume")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "run has no checkpoint: beginning at the start" in err
    again = command_again(err)
    assert again[:2] == ["chatlm", "train"]
    process = started(tmp_path, chatlm_environment, len(metrics(tmp_path / "run")) + 3, *more, "--resume")
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, command_again(err)) == (75, again)
    process = started(tmp_path, chatlm_environment, len(metrics(tmp_path / "run")) + 7, *more, "--resume")
    kill_all(process)
    killed_at = metrics(tmp_path / "run")[-1]["step"]
    done = chatlm(*again[1:])
    assert done.returncode == 0, done.stderr
    assert "verified to the byte" in done.stderr
    assert "finished after 120 steps" in done.stdout
    resumed = [row for row in metrics(tmp_path / "run", "event") if row["event"] == "resumed"]
    assert [row["same_plan"] for row in resumed] == [True] * 3
    assert resumed[-1]["step"] <= killed_at
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "run/model" / name).read_bytes() == (tmp_path / "whole/model" / name).read_bytes()
    assert not (tmp_path / "run" / ".lock").exists()


def test_one_run_at_a_time_in_a_folder_and_a_second_ctrl_c_ends_it_at_once_and_harms_nothing(
    tmp_path: Path, dialogues: Path, plan: tuple[str, ...], chatlm_environment: dict[str, str], chatlm: CommandRunner
) -> None:
    process = started(tmp_path, chatlm_environment, 9, *plan, "--epochs", "100000", "--save-every", "2")
    again = ("train", "--data", dialogues, *plan, "--max-steps", 12, "--output-dir", "run", "--resume")
    second = chatlm(*again)
    assert second.returncode == 5
    assert f"run is in use by process {process.pid} on " in second.stderr
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode in (130, 75)
    done = chatlm(*again)
    assert done.returncode == 0, done.stderr
    assert "going on from run/checkpoints/step-0000" in done.stderr


def test_other_data_or_another_batch_is_refused_by_name(
    tmp_path: Path, dialogues: Path, plan: tuple[str, ...], chatlm: CommandRunner
) -> None:
    first = ("train", "--data", dialogues, *plan, "--output-dir", "run", "--samples", 0)
    assert chatlm(*first).returncode == 0
    shorter = write_rows(tmp_path / "shorter.jsonl", DIALOGUES[:-1])
    done = chatlm("train", "--data", shorter, *plan, "--output-dir", "run", "--epochs", 2, "--resume",
                  "--tokenizer", "run/model")  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "was trained with another data: " in done.stderr
    before = (tmp_path / "run" / "plan.json").read_bytes()
    done = chatlm("train", "--data", dialogues, *FIXED, "--effective-batch-size", 5, "--batch-size-per-gpu", 5,
                  "--output-dir", "run", "--epochs", 2, "--resume")  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "was trained with another effective batch size: 7 then, 5 now" in done.stderr
    assert (tmp_path / "run" / "plan.json").read_bytes() == before, "what is refused changes nothing"
    done = chatlm("train", "--data", shorter, *plan, "--output-dir", "other", "--resume-from", "run",
                  "--resume-weights-only", "--tokenizer", "run/model", "--max-steps", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "its weights alone" in done.stderr
    moved = dialogues.rename(tmp_path / "moved.jsonl")
    done = chatlm("train", "--data", moved, *plan, "--output-dir", "run", "--epochs", 2, "--resume", "--samples", 0)
    assert done.returncode == 0, done.stderr
    assert "changed since it was saved: epochs 1.0 -> 2.0" in done.stderr
    assert len(metrics(tmp_path / "run")) == 8
