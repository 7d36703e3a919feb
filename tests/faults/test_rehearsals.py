"""A rehearsal finds what was planted before a run of days does: each fault is real, and so is the command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from micro import Command, make_home
from tiers import FULL, some
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FAULTY_EVALUATION = '''
import importlib.util
import os
import sys
from importlib.machinery import PathFinder


class Faulty:
    """Gives trainer.evaluate, whose losses ask for more than there is."""

    def find_spec(self, name, path=None, target=None):
        if name != "trainer.evaluate":
            return None
        spec = PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            import torch
            module.totals = lambda *_: torch.empty(2**55)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Faulty())
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    make_home(place)
    return place


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small disk; skips who may not."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a disk takes root")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def rehearsed(command: Command, *more: object, **environment: object) -> tuple[int, list[str], str]:
    """The exit code, the checks that failed, and all that was told."""
    done = command("train", "--rehearse", "--model", "tiny", *more, **environment)
    assert "Traceback" not in done.stderr
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines() if line[:2].strip().isdecimal()]
    return done.returncode, [name for _, verdict, name, *_ in lines if verdict == "FAILED"], done.stdout + done.stderr


def no_disk(command: Command, mounted: Callable[[str], Path], _folder: Path) -> Any:
    return "disk", ("--output-dir", mounted("size=2m") / "run"), {}


def read_only(command: Command, mounted: Callable[[str], Path], folder: Path) -> Any:
    place = mounted("size=64m")
    (place / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    return "folder", ("--output-dir", place / "run"), {}


def too_long(command: Command, _mounted: Callable[[str], Path], folder: Path) -> Any:
    row = {"conversations": [{"role": "user", "content": "你好 " * 40_000}, {"role": "assistant", "content": "你好"}]}
    rows = (command.home / "data.jsonl").read_text(encoding="utf-8")
    (folder / "long.jsonl").write_text(rows + json.dumps(row) + "\n", encoding="utf-8")
    return "rows", ("--data", folder / "long.jsonl"), {}


def wrong_tokenizer(command: Command, _mounted: Callable[[str], Path], folder: Path) -> Any:
    """One of words, which knows none of these."""
    words = {"<unk>": 0, "<pad>": 1, "<eos>": 2, "alpha": 3, "beta": 4}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>",
        chat_template=(
            "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
            "{% if add_generation_prompt %}assistant {% endif %}"
        ),
    ).save_pretrained(folder / "words")  # fmt: skip
    return "tokenizer", ("--tokenizer", folder / "words"), {}


def evaluation_out_of_memory(command: Command, _mounted: Callable[[str], Path], folder: Path) -> Any:
    (folder / "fault").mkdir()
    (folder / "fault" / "sitecustomize.py").write_text(FAULTY_EVALUATION, encoding="utf-8")
    arguments = ("--validation", command.home / "data.jsonl", "--plan", folder / "plan.json")
    done = command("plan", "--json", "--model", "tiny")
    (folder / "plan.json").write_text(done.stdout, encoding="utf-8")
    return "evaluation", arguments, {"PYTHONPATH": folder / "fault"}


FAULTS = [evaluation_out_of_memory, no_disk, read_only, too_long, wrong_tokenizer]


@pytest.mark.parametrize("plant", some(FAULTS, 2), ids=lambda plant: plant.__name__)
def test_a_rehearsal_finds_the_fault_that_was_planted(
    plant: Any, home: Path, tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    command = Command(tmp_path, home)
    name, arguments, environment = plant(command, mounted, tmp_path)
    code, failed, told = rehearsed(command, *arguments, **environment)
    assert (code, failed) == (1, [name]), told
    assert not (tmp_path / "runs").exists(), "nothing is left"


def test_a_run_in_which_nothing_is_wrong_passes_all_checks_and_leaves_nothing(home: Path, tmp_path: Path) -> None:
    command = Command(tmp_path, home)
    code, failed, told = rehearsed(command, "--validation", home / "data.jsonl", "--samples", 2)
    assert (code, failed) == (0, []), told
    assert "the same, to the last bit" in told
    assert "Train it:" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not FULL, reason="in the full tier")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_rehearsal_that_is_ended_leaves_nothing(number: int, home: Path, tmp_path: Path) -> None:
    command = Command(tmp_path, home)
    arguments = command.arguments("train", "--rehearse", "--model", "tiny", "--output-dir", "run")
    with subprocess.Popen(arguments, cwd=tmp_path, env=command.environment, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not (tmp_path / "run" / ".rehearsal" / "first" / "metrics.jsonl").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == (130 if number == signal.SIGINT else 128 + number)
    assert list(tmp_path.iterdir()) == []


if sys.platform != "linux":
    pytest.skip("mounts and memory are those of Linux", allow_module_level=True)
