"""The command as people meet it: quick help, mistakes answered with a hint, results apart from talk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import pytest
from conftest import CommandRunner, chatlm_path
from transformers import AutoTokenizer

DIALOGUES = [
    {"prompt": "你好", "response": "你好，很高兴见到你。"},
    {"prompt": "What is a plan?", "response": "What would run here, and why."},
    {"prompt": "一加一等于几？", "response": "等于二。"},
] * 8


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "dialogues.jsonl", DIALOGUES)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "--help"], ["train", "--help"], ["doctor", "--help"], ["profiles"]]
)
def test_help_and_profiles_load_no_heavy_library(arguments: list[str]) -> None:
    program = "import sys; from cli import chatlm; chatlm(sys.argv[1:], standalone_mode=False)"
    probe = program + "; print('LOADED', sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe, *arguments], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.partition("LOADED")[2].strip(" []\n").replace("'", "").split(", "))
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "pyarrow", "accelerate", "numpy", "trainer"}


@dataclass(frozen=True)
class Planned:
    arguments: list[str]
    done: subprocess.CompletedProcess[str]
    folder: Path


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, chatlm_environment: dict[str, str]) -> Planned:
    """A plan as JSON, by a program that tells at its end what it has loaded."""
    folder = tmp_path_factory.mktemp("planned")
    data = write_rows(folder / "dialogues.jsonl", DIALOGUES)
    program = (
        "import sys\nfrom cli import chatlm\nchatlm(sys.argv[1:], standalone_mode=False)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    )
    arguments = ["plan", "--data", str(data), "--max-seq-len", "64", "--effective-batch-size", "6", "--json",
                 "--memory-limit", "2GiB"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=chatlm_environment, capture_output=True, text=True, check=True, cwd=folder,
    )  # fmt: skip
    return Planned(arguments, done, folder)


def test_a_plan_as_json_stands_alone_on_stdout_and_its_supervisor_never_loads_torch(planned: Planned) -> None:
    done = planned.done
    assert done.stderr.splitlines()[-1] == "False False"
    plan = json.loads(done.stdout)
    assert plan["schema"] == "chatlm.plan/1"
    assert plan["batching"]["effective_batch_size"] == 6
    assert plan["evidence"]["kind"] == "measured"
    assert plan["memory"]["measured_peak_bytes"] <= plan["memory"]["budget_bytes"]
    assert all(trial["peak_bytes"] > 0 for trial in plan["evidence"]["trials"])
    assert [path.name for path in planned.folder.iterdir()] == ["dialogues.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plan", "--effective-batch-sise", "8"], 2, ["--effective-batch-size"]),
        (["train", "--per_device_train_batch_size", "8"], 2, ["here it is --batch-size-per-gpu"]),
        (["plan", "--batch_size_per_gpu", "8"], 2, ["here it is --batch-size-per-gpu"]),
        (["plan", "--learn_rate", "1e-4"], 2, ["here it is --learning-rate"]),
        (["train", "--use_small_config"], 2, ["here it is --profile small"]),
        (["trian"], 2, ["train"]),
        (["plan", "--profile", "fsat"], 2, ["no profile 'fsat'", "did you mean fast?"]),
        (["plan", "--model", "tiny-t6"], 2, ["tiny-t5"]),
        (["plan", "--gpu", "RTX 3085"], 2, ["no card 'RTX 3085'", "RTX 3080"]),
        (["plan", "--memory-limit", "lots"], 2, ["'lots'", "6GiB"]),
        (["plan", "--headroom", "150%"], 2, ["'150%'"]),
        (["plan", "--epochs", "-1"], 2, ["epochs", "above 0"]),
        (["plan", "--effective-batch-size", "0"], 2, ["effective_batch_size", "at least 1"]),
        (["plan", "--batch-size-per-gpu", "7", "--gradient-accumulation-steps", "3", "--effective-batch-size", "20"], 2,
         ["7 rows x 3 accumulation", "21 samples", "20"]),
        (["train", "--plan", "nowhere.json"], 2, ["nowhere.json", "chatlm plan --json"]),
        (["data", "--validation", "a.jsonl", "--validation-split", "0.1"], 2, ["--validation-split 0.1", "leave one"]),
        (["data", "--validation-split", "1"], 2, ["validation_split = 1.0", "between 0 and 1"]),
        (["data", "nowhere.parquet"], 3, ["nowhere.parquet: no such file"]),
        (["train", "--data", "type.jsonl"], 3, ["type.jsonl: line 2", "`response` must be text", "a number"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_a_hint_without_a_traceback(
    arguments: list[str], code: int, words: list[str], tmp_path: Path, chatlm: CommandRunner
) -> None:
    write_rows(tmp_path / "type.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": 5}])
    done = chatlm(*arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert "nothing" not in {p.name for p in tmp_path.iterdir()}
    assert not (tmp_path / "runs").exists()


def test_why_a_card_is_not_used_is_told_even_where_no_plan_comes_for_lack_of_memory(
    tmp_path: Path, chatlm_environment: dict[str, str]
) -> None:
    (tmp_path / "pynvml.py").write_text(
        "NVML_ERROR_LIBRARY_NOT_FOUND = 12\n"
        "class NVMLError(Exception):\n    value = 9\n"
        "def nvmlInit():\n    raise NVMLError('Driver Not Loaded')\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment = {**chatlm_environment, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "0"}
    command = [chatlm_path(), "plan", "--model", "tiny", "--memory-limit", "32MiB"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    warning, error = (done.stderr.index(word) for word in ("warning: the NVIDIA driver", "error: the limit"))
    assert warning < error
    assert (done.returncode, done.stdout) == (1, "")
    for words in ("leaves nothing", "--memory-limit"):
        assert words in done.stderr[error:]
    assert "Traceback" not in done.stderr
    assert "(NVML: Driver Not Loaded): the processor is used" in done.stderr


def test_an_unknown_key_in_a_file_is_an_error_with_the_nearest_name(tmp_path: Path, chatlm: CommandRunner) -> None:
    (tmp_path / "mine.toml").write_text("learnin_rate = 1e-4\n")
    for option in ("--config", "--profile"):
        done = chatlm("plan", option, "mine.toml")
        assert done.returncode == 2
        assert "unknown key 'learnin_rate'" in done.stderr
        assert "did you mean learning_rate?" in done.stderr


def test_a_key_that_other_trainers_have_is_answered_with_ours(tmp_path: Path, chatlm: CommandRunner) -> None:
    (tmp_path / "theirs.toml").write_text("num_train_epochs = 3\n")
    done = chatlm("plan", "--config", "theirs.toml")
    assert done.returncode == 2
    assert "here it is --epochs" in done.stderr


def test_every_value_tells_where_it_came_from(tmp_path: Path, chatlm: CommandRunner) -> None:
    (tmp_path / "mine.toml").write_text("epochs = 5\nlearning-rate = 2e-4\n")
    done = chatlm("plan", "--profile", "fast", "--config", "mine.toml", "--epochs", "7", "--show-config")
    assert done.returncode == 0
    rows = {cells[1]: cells[2:4] for line in done.stdout.splitlines() if len(cells := _cells(line)) > 4}
    assert rows["epochs"] == ["7.0", "command line"]
    assert rows["learning_rate"] == ["0.0002", "mine.toml"]
    assert rows["effective_batch_size"] == ["64", "profile fast"]
    assert rows["clip"] == ["1.0", "default"]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("┃", "│").split("│")]


def test_profiles_are_listed_with_their_numbers(chatlm: CommandRunner) -> None:
    done = chatlm("profiles")
    rows = {cells[1]: cells[2:5] for line in done.stdout.splitlines() if len(cells := _cells(line)) > 4}
    assert rows["small"] == ["1", "16", "3"]
    assert rows["fast"] == ["16", "64", "3"]
    assert rows["standard"] == ["20", "240", "20"]
    assert rows["pretrain"] == ["24", "144", "3"]
    assert rows["pretrain-conservative"] == ["24", "144", "3"]
    assert rows["minimind-pretrain"][:2] == ["32", "256"]
    assert rows["minimind-sft"][:2] == ["64", "64"]
    assert "tiny" in rows


@pytest.mark.parametrize("encoding", ["gbk", "cp1252", "ascii"])
def test_consoles_that_are_not_utf_8_get_words_and_no_crash(encoding: str, tmp_path: Path, dialogues: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "NO_COLOR": "1", "COLUMNS": "60",
                   "XDG_CACHE_HOME": str(tmp_path / "cache")}  # fmt: skip
    for arguments in (["profiles"], ["plan", "--config", "没有.toml"], ["--help"]):
        done = subprocess.run([chatlm_path(), *arguments], env=environment, capture_output=True, cwd=tmp_path)
        assert done.returncode == (2 if "--config" in arguments else 0), done.stderr
        assert b"Traceback" not in done.stderr
        assert b"\x1b[" not in done.stdout + done.stderr


def test_a_plan_for_people_says_the_batch_the_reason_and_the_command(dialogues: Path, chatlm: CommandRunner) -> None:
    done = chatlm("plan", "--data", dialogues, "--max-seq-len", 64, "--profile", "small", "--epochs", 1, "--explain")
    assert done.returncode == 0, done.stderr
    assert "effective batch 16, exactly" in done.stdout
    assert "small 1; chosen" in done.stdout
    assert "Not larger" in done.stdout
    assert re.search(r"(forward backward|optimizer|evaluation) <- binds", done.stdout)
    assert "logits and loss" in done.stdout
    assert f"chatlm train --auto --profile small --data {dialogues} --max-seq-len 64 --epochs 1.0" in done.stdout
    assert "RANDOM weights" in done.stderr


def test_a_card_that_is_not_here_is_planned_for_by_the_trace(dialogues: Path, chatlm: CommandRunner) -> None:
    asked = ("plan", "--gpu", "rtx 3090", "--gpus", 2, "--data", dialogues, "--effective-batch-size", 9)
    plan = json.loads(chatlm(*asked, "--json").stdout)
    assert (plan["evidence"]["kind"], plan["evidence"]["trials"]) == ("estimated", [])
    assert (plan["hardware"]["device"], plan["hardware"]["device_name"]) == ("cuda", "RTX 3090")
    assert (plan["batching"]["micro_batch_size"], plan["batching"]["world_size"]) == (5, 2)
    done = chatlm(*asked)
    assert "effective batch 9, exactly: packed in about 1.0 micro-batches of at most" in done.stdout
    assert "Estimated by the trace alone" in done.stdout
    assert "give or take 15%" in done.stdout


def test_the_same_plan_comes_again_after_one_short_check_or_none(planned: Planned, chatlm: CommandRunner) -> None:
    asked, first = planned.arguments, planned.done
    again, offline = chatlm(*asked), chatlm(*asked, "--offline")
    plans = [json.loads(done.stdout) for done in (first, again, offline)]
    assert [plan["evidence"]["kind"] for plan in plans] == ["measured", "cached", "cached"]
    assert plans[0]["batching"] == plans[1]["batching"] == plans[2]["batching"]
    assert plans[0]["speed"] == plans[1]["speed"] == plans[2]["speed"]
    assert "planned here before" in again.stderr
    assert [done.stderr.count("dry steps of") for done in (again, offline)] == [1, 0]


@pytest.mark.slow
def test_levers_and_profiles_are_tabled_by_the_trace(dialogues: Path, chatlm: CommandRunner) -> None:
    done = chatlm("plan", "--gpu", "RTX 3060", "--effective-batch-size", 960, "--vary", "max-seq-len=128,1024",
                  "--vary", "gpus=2", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["change"]: row["plan"]["batching"] for row in json.loads(done.stdout)}
    assert list(rows) == ["as asked", "max-seq-len 128", "max-seq-len 1024", "gpus 2"]
    sizes = [rows[change]["micro_batch_size"] for change in ("max-seq-len 128", "as asked", "max-seq-len 1024")]
    assert sizes[0] > sizes[1] > sizes[2]
    assert rows["gpus 2"]["world_size"] == 2

    card = ("plan", "--gpu", "RTX 3060", "--data", dialogues)
    done = chatlm(*card, "--compare")
    assert done.returncode == 0, done.stderr
    for profile in ("small", "fast", "standard", "auto"):
        assert f"~ {profile} " in done.stdout
    assert "The least time for an epoch" in done.stdout
    done = chatlm(*card, "--ranks", 2)
    assert done.returncode == 2
    assert "hint: give --gpus 2 in place of --ranks" in done.stderr


@pytest.mark.parametrize(
    ("lever", "said"),
    [
        ("hello=3", "did you mean|known are"),
        ("rows", "varies nothing"),
        ("rows=0", "no whole number above 0"),
        ("epochs=x", "epochs = 'x'"),
        ("gpus=2", "give --gpu CARD"),
    ],
)
def test_a_lever_that_is_none_is_told(lever: str, said: str, dialogues: Path, chatlm: CommandRunner) -> None:
    card = () if lever == "gpus=2" else ("--gpu", "T4")
    done = chatlm("plan", *card, "--data", dialogues, "--vary", lever)
    assert done.returncode == 2, done.stderr
    assert re.search(said, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_data_says_its_lengths_what_is_cut_padded_and_trained_on(
    tmp_path: Path, real_data: Path, chatlm: CommandRunner
) -> None:
    file = real_data / "dialogue/alpaca_zh_en_2k.jsonl"
    arguments = ("data", file, "--tokenizer", real_data / "minimind/tokenizer", "--max-seq-len", 256)
    said = chatlm(*arguments)
    assert said.returncode == 0, said.stderr
    facts = json.loads(chatlm(*arguments, "--json", "--show", 3).stdout)
    tokenizer = AutoTokenizer.from_pretrained(real_data / "minimind/tokenizer")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [tokenizer.apply_chat_template(row["conversations"], tokenize=False) for row in rows]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    longest = max(lengths)
    assert facts["longest_row"] == [longest, f"{file}: line {lengths.index(longest) + 1}"]
    assert f"{longest} tokens before any cut: {file}: line {lengths.index(longest) + 1}" in said.stdout
    inside = sorted(min(length, 256) for length in lengths)
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    points = {name: inside[ceil(share * len(inside)) - 1] for name, share in shares.items()}
    assert facts["percentiles"]["length"] == points | {"max": 256}
    assert f"p50 {points['p50']}, p95 {points['p95']}, p99 {points['p99']}, max 256" in said.stdout
    assert f"answer_cut {facts['cuts']['answer_cut']:,}" in said.stdout
    assert facts["padding"]["packed"] < facts["padding"]["sorted"] < facts["padding"]["fixed"]
    for text, shown in zip(texts, facts["shown"], strict=False):
        together = "".join(token["text"] for token in shown)
        assert together in text
        answer = text.split("assistant\n")[-1].rstrip("\n")
        assert answer.startswith("".join(token["text"] for token in shown if token["trained"]))
    trained = [line.split(maxsplit=1)[1] for line in said.stdout.splitlines() if line.startswith("  trained  ")]
    assert len(trained) == 2
    assert rows[0]["conversations"][-1]["content"][:4] in trained[0].replace("|", "")
