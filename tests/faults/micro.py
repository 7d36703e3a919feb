"""The real command on a model of two small layers: a few seconds a run."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from conftest import chatlm_path, metrics
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.records import Record, Turn
from trainer.tokenizer import train_tokenizer

QUESTIONS = {
    "你好": "你好，很高兴见到你。",
    "What is a plan?": "What would run here, and why.",
    "一加一等于几？": "等于二。",
}
LENGTH = (
    *("--max-seq-len", 64, "--effective-batch-size", 7, "--batch-size-per-gpu", 7),
    *("--compile", "off", "--samples", 0),
)
VOCABULARY = 300


@dataclass
class Command:
    """The installed command in a folder; `train` has a model, data and what is the same of all."""

    folder: Path
    home: Path
    """Where model, data and cache lie."""
    path: str = chatlm_path()

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "XDG_CACHE_HOME": str(self.home / "cache"), "COLUMNS": "400"}

    def arguments(self, what: str, *more: object) -> list[str]:
        given = ("--model", self.home / "model", "--data", self.home / "data.jsonl", *LENGTH)
        return [self.path, what, *map(str, given), *map(str, more)]

    def __call__(self, what: str, *more: object, **environment: object) -> subprocess.CompletedProcess[str]:
        """Run it to its end; words of the environment by their names."""
        return subprocess.run(
            self.arguments(what, *more), cwd=self.folder, capture_output=True, text=True, timeout=300,
            env=self.environment | {name: str(value) for name, value in environment.items()},
        )  # fmt: skip

    @contextmanager
    def begun(self, what: str, *more: object, run: Path, steps: int) -> Iterator[subprocess.Popen[str]]:
        """Start a training; yields it when it has taken so many steps in its folder. What is left of it is ended."""
        process = subprocess.Popen(
            self.arguments(what, *more, "--output-dir", run), cwd=self.folder, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            end = time.monotonic() + 120
            while steps_told(run) < steps:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < end, "waited in vain"
                time.sleep(0.002)
            yield process
        finally:
            kill_all(process)
            process.communicate()


def make_home(home: Path) -> None:
    """Put a model, its tokenizer and 24 dialogues into a folder."""
    rows = [Record("", (Turn("user", q), Turn("assistant", a))) for q, a in QUESTIONS.items()]
    train_tokenizer(rows, VOCABULARY, home / "model")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(home / "model")
    write_dialogues(home / "data.jsonl", 8)


def write_dialogues(file: Path, times: int) -> None:
    import json

    rows = [json.dumps({"prompt": q, "response": a}, ensure_ascii=False) for q, a in QUESTIONS.items()]
    file.write_text("\n".join(rows * times) + "\n", encoding="utf-8")


def kill_all(process: subprocess.Popen[Any]) -> None:
    """Signal 9 to a command and all that it started, if it still runs."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
    process.wait()


def steps_told(run: Path) -> int:
    """So far; the last line of a run that was killed may be half of one."""
    file = run / "metrics.jsonl"
    return file.read_text().count('"kind": "train"') if file.exists() else 0


def losses(run: Path) -> list[tuple[int, str]]:
    return [(row["step"], float(row["loss"]).hex()) for row in metrics(run)]


def refused(done: Any, code: int, *said: str) -> None:
    """Exit code, one sentence with these words and a hint; no traceback."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    for words in (*said, "hint:"):
        assert words in done.stderr, done.stderr
