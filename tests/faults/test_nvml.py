"""A library NVML that fails: each error code at each call, calls that are missing, answers that are none.

`nvml.c` is built in place of the driver's, so that the bindings that chatlm uses are the real ones.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import CODES
from micro import Command, make_home, refused
from tiers import some

SOURCE = Path(__file__).with_name("nvml.c")
CALLS = [line.split("(")[0].split()[1] for line in SOURCE.read_text().splitlines() if line.startswith("int nvml")]
VISIBLE = (None, "0", "GPU-1", "MIG-1", "0,1", "GPU-2", "7", "")
MEMORY = ((80 << 30, 70 << 30), (9 << 30, 8 << 30))

LOOKER = """
import ctypes, json, os, sys
from pathlib import Path
import pynvml
from autotune.hardware import read_hardware
before = dict(os.environb)
for line in sys.stdin:
    os.environb.clear()
    os.environb.update(before | {name.encode(): value.encode("latin-1") for name, value in json.loads(line).items()})
    found = read_hardware(Path("."))
    calls = pynvml.nvmlLib.calls_made
    calls.restype = ctypes.c_char_p
    told = found.model_dump(mode="json") | {"calls": calls().decode().split()}
    print(json.dumps(told), flush=True)
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs Linux and a C compiler")

    def built(missing: str | None = None) -> Path:
        """Return a folder with the library, without a call that an older driver does not have."""
        folder = tmp_path_factory.mktemp("nvml")
        gone = [f"-D{missing}=gone"] if missing else []
        library = folder / "libnvidia-ml.so.1"
        subprocess.run(["cc", "-shared", "-fPIC", "-w", *gone, "-o", library, SOURCE], check=True)
        return folder

    return built


def looks(library: Path, trials: list[dict[str, str]]) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Look at the hardware by this library, once for each trial: words of the environment, of Latin-1 bytes."""
    done = subprocess.run(
        [sys.executable, "-c", LOOKER], input="".join(json.dumps(trial) + "\n" for trial in trials),
        capture_output=True, text=True, env=os.environ | {"LD_LIBRARY_PATH": str(library)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return zip(trials, map(json.loads, done.stdout.splitlines()), strict=True)


def check(found: dict[str, Any]) -> None:
    """There is a card with its memory, or the processor, and the reason why."""
    if found["device"] == "cuda":
        memory = (found["device_memory_total_bytes"], found["device_memory_free_bytes"])
        host = (found["host_memory_total_bytes"], found["host_memory_available_bytes"])
        assert memory in (*MEMORY, host)
        assert memory != host or "has no memory of its own" in found["notes"][0]
        assert found["fast_bf16"] == (found["compute_capability"] == [8, 0])
    else:
        assert "cannot be" in found["notes"][0]


def test_each_error_code_of_each_call_leaves_a_card_or_the_reason_why_not(build: Any, tell: Any) -> None:
    trials = [
        {"NVML_FAILS": f"{call}:{code}"} | {"CUDA_VISIBLE_DEVICES": visible}
        for call in CALLS
        for code in CODES.values()
        for visible in ("0", "GPU-1", "MIG-1")
    ]
    met = set()
    for trial, found in looks(build(), trials):
        if trial["NVML_FAILS"] != f"nvmlInitWithFlags:{CODES['NVML_ERROR_LIBRARY_NOT_FOUND']}":
            check(found)
        met |= {call for call in found["calls"] if trial["NVML_FAILS"].startswith(f"{call}:")}
    assert met == set(CALLS), "the call that fails is never made"
    tell(len(trials))


def test_calls_that_are_missing_and_answers_that_are_none_leave_one_too(build: Any, tell: Any) -> None:
    count = 0
    for call in CALLS:
        for _, found in looks(build(call), [{"CUDA_VISIBLE_DEVICES": of} for of in ("0", "GPU-1", "MIG-1")]):
            check(found)
            assert call not in found["calls"]
            count += 1
    answers = [{"NVML_NAME": name} for name in ("", "\xff\xfe", "n" * 300)] + [{"NVML_PROCESSES": "5000"}]
    for trial, found in looks(build(), answers):
        check(found)
        assert found["device"] == "cuda"
        assert len(found["others"]) == int(trial.get("NVML_PROCESSES", found["others"] and 1))
        count += 1
    tell(count)


def test_what_is_visible_is_what_is_read_and_what_is_not_there_is_told(build: Any, tell: Any) -> None:
    trials = [{} if of is None else {"CUDA_VISIBLE_DEVICES": of} for of in VISIBLE]
    for trial, found in looks(build(), trials):
        of = trial.get("CUDA_VISIBLE_DEVICES")
        if of == "":
            assert (found["device"], found["notes"], found["calls"]) == ("cpu", [], [])
        elif of in ("GPU-2", "7"):
            assert found["device"] == "cpu"
            assert f"card {of} cannot be used" in found["notes"][0]
        else:
            assert found["device_memory_free_bytes"] == 8 << 30
    tell(len(trials))


def test_a_card_that_is_lost_as_the_command_plans_is_told(build: Any, tmp_path: Path, tell: Any) -> None:
    """At any call: the processor is planned for, or, where a card is still seen, torch is to blame, which has none."""
    make_home(tmp_path)
    command, library = Command(tmp_path, tmp_path), build()
    failing = some(CALLS, 1)
    for call in failing:
        lost = f"{call}:{CODES['NVML_ERROR_GPU_IS_LOST']}"
        done = command("plan", LD_LIBRARY_PATH=library, NVML_FAILS=lost, CUDA_VISIBLE_DEVICES="0")
        if done.returncode:
            refused(done, 4, "this plan is for a GPU, and torch", "finds none")
        else:
            assert "the processor is used" in done.stderr
    tell(len(failing))
