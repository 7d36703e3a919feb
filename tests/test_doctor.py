"""What doctor says follows from facts alone: each finding on the machine that has it, and the real command here."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import facts as made
import psutil
import pynvml
import pytest
from conftest import CommandRunner, chatlm_path
from fake_nvml import LARGE, SLICED, SMALL, FakeCard, FakeNvml

from autotune.cards import survey_cards
from autotune.errands import Probed
from autotune.errors import ConfigurationError
from autotune.plan import CardProcess, Fact
from cli.doctor.bundle import MOST_LINES, write_bundle
from cli.doctor.facts import CardFacts, Driver, Facts, Host, Limit, Place, Software, TableRates
from cli.doctor.findings import find
from cli.doctor.gather import find_features, gather, look_at_place, read_private
from cli.masking import Private
from cli.render.doctor import print_report
from cli.render.units import rate
from cli.wiring import cache_dir

GIB = 2**30
MIB = 2**20
RTX = "NVIDIA GeForce RTX 3080"


def card(**changes: Any) -> CardFacts:
    told: dict[str, Any] = {
        "name": RTX,
        "memory_total_bytes": 20 * GIB,
        "memory_free_bytes": 19 * GIB,
        "compute_capability": (8, 6),
        "fast_bf16": True,
        "mig": False,
        "celsius": 45,
        "clock_mhz": 1700,
        "most_clock_mhz": 1980,
        "slowed_by": (),
        "others": (),
        "own_process_ids": (812, 77, 9),
    }
    return CardFacts(**(told | changes))


def place(path: str, **changes: Any) -> Place:
    told = {"what": "current folder", "disk": "/data", "free_bytes": 100 * GIB, "refused": ""}
    return Place.model_validate({"path": path} | told | changes)


def machine(**changes: Any) -> Facts:
    """A machine with one card and nothing wrong; fields of any part of it change by their names."""
    parts: dict[str, Fact] = {
        "software": Software(
            versions={"chatlm": "0.1.0", "torch": "2.13.0", "transformers": "5.3.0", "Python": "3.11.7"},
            torch_cuda="12.8",
            system="Linux 6.8.0 x86_64",
            glibc="2.39",
            wsl=False,
            windows=False,
            container="",
            compiler=True,
        ),
        "host": Host(
            processor="AMD Ryzen 5 5600",
            features=("avx2", "fma"),
            machine_cores=12,
            affinity_cores=12,
            memory_total_bytes=32 * GIB,
            memory_available_bytes=24 * GIB,
            limits=(),
            swap_total_bytes=8 * GIB,
            swap_used_bytes=0,
            shared_memory_bytes=16 * GIB,
            places=(
                place("/data/x"),
                place("/data/.cache/chatlm", what="cache folder"),
            ),
        ),
        "driver": Driver(version="570.124.06", cuda=(12, 8), card_is_seen=True, trouble=""),
        "hardware": made.hardware(device_name=RTX, world_size=1, cores=12),
        "table": TableRates(flops={"fp32": 29.8e12, "bf16": 59.5e12}, bytes_per_second=760e9),
        "measured": Probed(
            sees_card=True,
            why_not="",
            architectures=("sm_75", "sm_80", "sm_86", "sm_90"),
            instructions="AVX2",
            threads=12,
            matrix_flops={"fp32": 25e12, "bf16": 50e12},
            copy_bytes=640e9,
            failed="",
            seconds=1.5,
        ),
    }
    rest: dict[str, Any] = {
        "made": "2026-11-28",
        "cards": (card(),),
        "visible": None,
        "precision": "bf16",
        "t5_precision": "bf16",
        "environment": {},
        "worker_failed": "",
    }
    for name in [name for name in changes if name in rest or (name in parts and changes[name] is None)]:
        rest[name] = changes.pop(name)
    for part, fact in list(parts.items()):
        mine = {name: changes.pop(name) for name in list(changes) if name in type(fact).model_fields}
        parts[part] = fact.model_copy(update=mine)
    assert not changes, f"no such fact: {changes}"
    return Facts(**(parts | rest | {"sources": gather_sources()}))


def gather_sources() -> dict[str, str]:
    return dict.fromkeys(
        ("software.versions", "software.torch_cuda", "software.system", "driver", "cards", "visible", "host.processor",
         "hardware.cores", "host.memory_total_bytes", "host.swap_used_bytes", "host.shared_memory_bytes", "host.places",
         "hardware.host_memory_available_bytes", "precision", "measured", "table"), "here",
    )  # fmt: skip


def processor(**changes: Any) -> Facts:
    """The same machine without the card."""
    nothing: dict[str, Any] = {
        "cards": (), "version": "", "cuda": None, "card_is_seen": False, "torch_cuda": None, "table": None,
        "trouble": "NVML: NVML Shared Library Not Found", "device": "cpu", "device_name": "AMD Ryzen 5 5600",
        "sees_card": False, "matrix_flops": {"fp32": 2e11}, "architectures": (), "precision": "fp32",
        "t5_precision": "fp32", "compute_capability": None, "fast_bf16": False,
    }  # fmt: skip
    return machine(**(nothing | changes))


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert find(machine()) == ()
    assert find(processor()) == ()


OLLAMA = CardProcess(process_id=812, name="ollama", bytes=3 * GIB)
NAMELESS = CardProcess(process_id=77, name="", bytes=None)
PROBLEM, NOTE = "problem", "worth knowing"
FOUND: list[tuple[str, Callable[[], Facts], str, str, str, str]] = [
    (
        "no driver", lambda: processor(card_is_seen=True, torch_cuda="12.8"), PROBLEM, "no-driver",
        "an NVIDIA card is in this machine, and its driver cannot be asked (NVML: NVML Shared Library Not Found)",
        "install the driver: sudo ubuntu-drivers install, or from nvidia.com/drivers; then restart the machine",
    ),
    (
        "no driver in a container", lambda: processor(card_is_seen=True, torch_cuda="12.8", container="docker"),
        PROBLEM, "no-driver",
        "an NVIDIA card is in this machine, and its driver cannot be asked (NVML: NVML Shared Library Not Found)",
        "start the container with the card: docker run --gpus all ...",
    ),
    (
        "driver and library of two versions",
        lambda: processor(trouble="NVML: Driver/library version mismatch", card_is_seen=True, torch_cuda="12.8"),
        PROBLEM, "driver-refuses",
        "the NVIDIA driver cannot be asked for cards (NVML: Driver/library version mismatch)",
        "nvidia-smi says more; after an update of the driver, restart the machine: sudo reboot",
    ),
    (
        "driver too old", lambda: machine(version="535.183.01", cuda=(12, 2), torch_cuda="13.0", sees_card=False),
        PROBLEM, "driver-too-old",
        "the driver, 535.183.01, runs CUDA up to 12.2, and torch 2.13.0 is built for CUDA 13.0",
        "update the driver to 580 or later, or pip uninstall torch, then the command that pytorch.org, "
        "\"Get started\", gives for CUDA 12: pip install torch ...",
    ),
    (
        "torch without CUDA", lambda: machine(torch_cuda=None, sees_card=False), PROBLEM, "torch-without-cuda",
        "torch 2.13.0 is built without CUDA and cannot use the card here, NVIDIA GeForce RTX 3080",
        "pip uninstall torch, then the command that pytorch.org, \"Get started\", gives for CUDA 12.8 or older: "
        "pip install torch ...",
    ),
    (
        "torch sees none", lambda: machine(sees_card=False, why_not="CUDA unknown error"),
        PROBLEM, "torch-sees-no-card",
        "the driver shows NVIDIA GeForce RTX 3080, and torch 2.13.0 sees no card: CUDA unknown error",
        'python -c "import torch; torch.cuda.init()" says it alone; restart the machine, or pip install '
        "--force-reinstall torch",
    ),
    (
        "a card too old for torch",
        lambda: machine(compute_capability=(6, 1), architectures=("sm_75", "sm_120", "compute_120")),
        PROBLEM, "no-kernels",
        "NVIDIA GeForce RTX 3080 has compute capability 6.1, and torch 2.13.0 is built for sm_75, sm_120, compute_120",
        "pip uninstall torch, then the command that pytorch.org, \"Get started\", gives for an older CUDA: pip install "
        "torch ...",
    ),
    (
        "no torch", lambda: machine(versions={"torch": ""}, worker_failed="exit code 1", measured=None),
        PROBLEM, "no-torch", "torch is not installed for this Python",
        "pip install torch, or the command that pytorch.org, \"Get started\", gives",
    ),
    (
        "broken torch",
        lambda: processor(worker_failed="the worker ended with exit code 1: ImportError: libcublas.so", measured=None),
        PROBLEM, "worker-failed",
        "the worker, which loads torch, came to grief: the worker ended with exit code 1: ImportError: libcublas.so",
        'python -c "import torch" shows whether torch is broken; pip install --force-reinstall torch mends that',
    ),
    (
        "no room to measure", lambda: machine(failed="CUDA out of memory."), PROBLEM, "not-measured",
        "NVIDIA GeForce RTX 3080 could not be measured: CUDA out of memory.",
        "close other programs that use it, and run chatlm doctor again",
    ),
    (
        "hidden", lambda: machine(device="cpu", visible="", notes=()), NOTE, "hidden",
        "CUDA_VISIBLE_DEVICES= hides the card here, NVIDIA GeForce RTX 3080: the processor trains",
        "unset CUDA_VISIBLE_DEVICES, unless that is meant",
    ),
    (
        "another named", lambda: machine(device="cpu", visible="2", cards=(card(), card())), PROBLEM, "hidden",
        "CUDA_VISIBLE_DEVICES=2 names none of the 2 cards here: the processor trains",
        "export CUDA_VISIBLE_DEVICES=0, or unset it; nvidia-smi -L lists what there is",
    ),
    (
        "no slice", lambda: machine(device="cpu", cards=(card(mig=True),), notes=("card 0 cannot be used (it is in MIG "
                                    "mode, and no slice of it is ours): the processor is used",)),
        PROBLEM, "card-not-used",
        "card 0 cannot be used (it is in MIG mode, and no slice of it is ours): the processor is used",
        "nvidia-smi says more; a card in MIG mode needs a slice of its own",
    ),
    (
        "foreign", lambda: machine(cards=(card(memory_free_bytes=16 * GIB, others=(OLLAMA, NAMELESS)),)),
        NOTE, "foreign-processes",
        "other programs hold 4.00 GiB of the 20.00 GiB of NVIDIA GeForce RTX 3080 (20%): ollama (pid 812, 3.00 GiB), "
        "process (pid 77)",
        "close them, or: kill 812",
    ),
    (
        "full", lambda: machine(cards=(card(memory_free_bytes=GIB // 2),)), PROBLEM, "foreign-processes",
        "other programs hold 19.50 GiB of the 20.00 GiB of NVIDIA GeForce RTX 3080 (98%): the driver names none of "
        "them",
        "nvidia-smi shows who it is; close what is not needed",
    ),
    (
        "hot", lambda: machine(cards=(card(slowed_by=("heat",), celsius=91, clock_mhz=900),)), NOTE, "slowed",
        "NVIDIA GeForce RTX 3080 is held down by heat at 900 of 1980 MHz, 91 degrees Celsius",
        "nvidia-smi -q -d PERFORMANCE,CLOCK,TEMPERATURE,POWER says more; see to its cooling and its power limit",
    ),
    (
        "slow", lambda: machine(matrix_flops={"fp32": 9e12, "bf16": 20e12}), NOTE, "slow-card",
        "NVIDIA GeForce RTX 3080 multiplied bf16 matrices at 20.0 TFLOP/s, 34% of the 59.5 TFLOP/s that it can do",
        "is it in use, hot, or limited? nvidia-smi -q -d PERFORMANCE,CLOCK,TEMPERATURE,POWER",
    ),
    (
        "slower bf16", lambda: processor(precision="bf16", matrix_flops={"fp32": 2e11, "bf16": 3e10}),
        NOTE, "slower-precision",
        "bf16, which the rule takes here, was measured at 30.0 GFLOP/s, fp32 at 200 GFLOP/s",
        "chatlm train --precision fp32 ... is faster, and takes more memory",
    ),
    (
        "WSL", lambda: machine(wsl=True), NOTE, "spills",
        "this Linux runs in Windows (WSL): when the card is full, its driver goes on in main memory, and steps take 10 "
        "to 100 times as long instead of failing",
        'NVIDIA Control Panel, Manage 3D settings: set "CUDA - Sysmem Fallback Policy" to "Prefer No Sysmem Fallback"',
    ),
    (
        "little memory", lambda: machine(host_memory_available_bytes=GIB // 2, host_memory_limited_by="free memory"),
        PROBLEM, "little-memory",
        "0.50 GiB of main memory may be used (free memory), a worker alone takes about 0.3 GiB",
        "close other programs, or give the container or job more memory",
    ),
    (
        "swap", lambda: machine(swap_used_bytes=3 * GIB), NOTE, "swap",
        "3.00 GiB of swap is in use beside 32.00 GiB of memory, of which 24.00 GiB is free: what is swapped in again "
        "makes steps slow",
        "close other programs; the largest: ps aux --sort=-rss | head",
    ),
    (
        "cgroup", lambda: machine(limits=(Limit(path="/sys/fs/cgroup/job", limit_bytes=4 * GIB, available_bytes=GIB),)),
        NOTE, "limited",
        "a control group allows 4.00 GiB of the 32.00 GiB of memory: /sys/fs/cgroup/job",
        "if more is meant: docker run --memory 28g ..., sbatch --mem=28G ..., or systemd's MemoryMax=",
    ),
    (
        "ulimit", lambda: machine(host_memory_available_bytes=6 * GIB, host_memory_limited_by="ulimit -v"),
        NOTE, "limited", "ulimit -v leaves a process 6.00 GiB of 24.00 GiB of free memory", "ulimit -v unlimited",
    ),
    (
        "little disk",
        lambda: machine(places=(place("/data/x", free_bytes=3 * GIB),)),
        NOTE, "little-disk", "the disk of the current folder, /data/x, has 3.00 GiB free",
        "free some: du -xh --max-depth=2 /data | sort -h | tail; or cd to another, or give --output-dir DIR to train",
    ),
    (
        "no disk", lambda: machine(places=(place("/c", what="cache folder", disk="/", free_bytes=MIB),)),
        PROBLEM, "little-disk", "the disk of the cache folder, /c, has 0.00 GiB free",
        "free some: du -xh --max-depth=2 / | sort -h | tail; or export XDG_CACHE_HOME=DIR, on another disk",
    ),
    (
        "one disk of two folders",
        lambda: machine(
            places=(place("/data/x", free_bytes=GIB), place("/data/c", free_bytes=GIB, what="cache folder"))
        ),
        NOTE, "little-disk",
        "the disk of the current folder, /data/x, and the cache folder, /data/c, has 1.00 GiB free",
        "free some: du -xh --max-depth=2 /data | sort -h | tail; or cd to another, or give --output-dir DIR to train; "
        "and export XDG_CACHE_HOME=DIR, on another disk",
    ),
    (
        "not writable",
        lambda: machine(places=(place("/c", what="cache folder", refused="Read-only"),)),
        PROBLEM, "not-writable", "the cache folder, /c, cannot be written (Read-only)",
        "export XDG_CACHE_HOME=DIR, on another disk",
    ),
    (
        "shared memory", lambda: machine(cards=(card(), card()), shared_memory_bytes=64 * MIB), NOTE, "shared-memory",
        "/dev/shm has 64 MiB, which several ranks (2 cards are here) may find too small",
        "docker run --shm-size=1g ..., or: sudo mount -o remount,size=1G /dev/shm",
    ),
    (
        "threads", lambda: machine(environment={"OMP_NUM_THREADS": "1"}), NOTE, "threads",
        "OMP_NUM_THREADS=1 keeps torch to 1 of the 12 cores that it may use",
        "unset OMP_NUM_THREADS, or: export OMP_NUM_THREADS=12",
    ),
    (
        "environment", lambda: machine(environment={"CUDA_LAUNCH_BLOCKING": "1", "MALLOC_ARENA_MAX": ""}),
        NOTE, "environment", "CUDA_LAUNCH_BLOCKING=1 makes the host wait for each kernel: far slower steps",
        "unset CUDA_LAUNCH_BLOCKING, unless that is meant",
    ),
    (
        "compiler", lambda: machine(compiler=False), NOTE, "no-compiler",
        "there is no C++ compiler, so layers are not compiled where that would be faster",
        "sudo apt install g++, or your system's own",
    ),
    (
        "glibc", lambda: processor(glibc="2.31"), NOTE, "glibc",
        "glibc 2.31 is older than 2.35, so huge pages are not used: steps on the processor take 5 to 10 % longer",
        "a newer system has it: Ubuntu 22.04, Debian 12, or later",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "severity", "name", "message", "hint"), [row[1:] for row in FOUND], ids=[row[0] for row in FOUND]
)
def test_each_machine_has_its_finding_and_no_other(
    facts: Callable[[], Facts], severity: str, name: str, message: str, hint: str
) -> None:
    (found,) = find(facts())
    assert (found.severity, found.name, found.message, found.hint) == (severity, name, message, hint)


def test_problems_stand_first_and_all_are_told_at_once() -> None:
    found = find(machine(wsl=True, swap_used_bytes=GIB, torch_cuda=None, sees_card=False, compiler=False))
    assert [finding.severity for finding in found] == ["problem", *["worth knowing"] * 3]


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 6), ("sm_80",), True),
        ((8, 0), ("sm_86",), False),
        ((12, 0), ("sm_90", "compute_90"), True),
        ((12, 0), ("sm_90",), False),
        ((9, 0), ("sm_90a",), True),
        ((6, 1), ("gfx90a",), True),
    ],
)
def test_a_card_runs_kernels_of_its_major_version_or_compiles_what_is_older(
    capability: tuple[int, int], architectures: tuple[str, ...], runs: bool
) -> None:
    found = find(machine(compute_capability=capability, architectures=architectures))
    assert ("no-kernels" in [finding.name for finding in found]) is not runs


# How it is read.


class Nvml(FakeNvml):
    """With a driver that tells its version and its clocks."""

    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    NVML_CLOCK_SM = pynvml.NVML_CLOCK_SM
    reasons = pynvml.nvmlClocksThrottleReasonSwThermalSlowdown | pynvml.nvmlClocksThrottleReasonGpuIdle

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "570.124.06"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return 12080

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: FakeCard) -> int:  # noqa: N802
        return self.reasons

    def nvmlDeviceGetTemperature(self, card: FakeCard, sensor: int) -> int:  # noqa: N802
        return 80

    def nvmlDeviceGetClockInfo(self, card: FakeCard, kind: int) -> int:  # noqa: N802
        return 900

    def nvmlDeviceGetMaxClockInfo(self, card: FakeCard, kind: int) -> int:  # noqa: N802
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvmlClocksThrottleReason"):
            return getattr(pynvml, name)
        raise AttributeError(name)


def test_all_cards_are_seen_with_their_driver_whichever_are_visible() -> None:
    nvml = Nvml([LARGE, SMALL, SLICED])
    survey = survey_cards(nvml)
    assert (survey.driver, survey.cuda, survey.trouble) == ("570.124.06", (12, 8), "")
    assert [(state.card.name, state.mig) for state in survey.states] == [
        (LARGE.name, False), ("Tesla T4", False), (SLICED.name, True),
    ]  # fmt: skip
    first = survey.states[0]
    assert (first.slowed_by, first.celsius, first.clock_mhz, first.most_clock_mhz) == (("heat",), 80, 900, None)
    assert nvml.open_count == 0


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, pynvml.NVML_ERROR_LIBRARY_NOT_FOUND])
def test_a_library_that_cannot_be_opened_says_why(code: int, tmp_path: Path) -> None:
    survey = survey_cards(FakeNvml([LARGE], {"nvmlInit": pynvml.NVMLError(code)}), tmp_path)
    assert (survey.states, survey.hardware) == ((), False)
    assert survey.trouble.startswith("NVML: ")


def test_facts_hold_the_cards_the_rule_and_the_table_and_no_secret() -> None:
    environ = {"HF_TOKEN": "geheim-geheim", "OMP_NUM_THREADS": "2", "EDITOR": "vi", "CUDA_VISIBLE_DEVICES": "0"}
    facts = gather(environ, Nvml([LARGE, SMALL]), measure=False)
    assert [one.name for one in facts.cards] == [LARGE.name, "Tesla T4"]
    assert (facts.used, facts.precision, facts.visible) == (facts.cards[0], "bf16", "0")
    assert facts.table is not None, "an RTX 3080 of 20 GiB is in the table by its name and memory"
    assert facts.table.flops["bf16"] > facts.table.flops["fp32"]
    assert facts.environment == {"CUDA_VISIBLE_DEVICES": "0", "HF_TOKEN": "***", "OMP_NUM_THREADS": "2"}
    assert "geheim" not in facts.model_dump_json()
    assert read_private(environ).secrets == ("geheim-geheim",)


def test_a_card_without_bf16_takes_fp16_and_fp32_for_t5() -> None:
    facts = gather({}, Nvml([SMALL]), measure=False)
    assert (facts.precision, facts.t5_precision) == ("fp16", "fp32")


def test_features_of_processors_are_read_of_either_kind() -> None:
    assert find_features("flags\t\t: fpu avx2 sse avx512_bf16\n") == ("avx2", "avx512_bf16")
    assert find_features("Features\t: fp asimd bf16\n") == ("asimd", "bf16")
    assert find_features("") == ()


def test_a_folder_that_is_not_there_is_tried_where_it_would_be_made_and_nothing_is_left(tmp_path: Path) -> None:
    place = look_at_place("cache folder", tmp_path / "a" / "b")
    assert (place.refused, place.path) == ("", str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    assert look_at_place("cache folder", tmp_path / "file").refused == "Not a directory"


TOO_LONG = "x" * 300
"""A name that the system refuses to look up, whoever asks: as a home that nobody may read."""


def test_a_folder_that_cannot_be_looked_at_is_refused_and_its_disk_is_the_nearest(tmp_path: Path) -> None:
    place = look_at_place("cache folder", tmp_path / TOO_LONG / ".cache")
    assert place.refused == "File name too long"
    assert Path(place.disk) in (tmp_path, *tmp_path.parents)
    assert place.free_bytes == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.1)


def test_a_file_system_without_bytes_is_no_full_disk() -> None:
    told = look_at_place("current folder", Path("/proc/self"))
    assert (told.free_bytes, told.disk) == (None, "/proc")
    found = find(machine(places=(told,)))
    assert [finding.name for finding in found] == ["not-writable"]


def test_a_user_without_home_and_entry_has_facts_and_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> Any:
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)  # what every Python asks
    assert (read_private({}).home, read_private({}).user) == ("", "")
    (place,) = (place for place in gather({}, Nvml([]), measure=False).host.places if place.what == "cache folder")
    found = find(machine(places=(place,)))
    assert [(finding.name, finding.hint) for finding in found] == [
        ("not-writable", "export XDG_CACHE_HOME=DIR, on another disk")
    ]
    assert "no home folder" in found[0].message
    with pytest.raises(ConfigurationError, match="no home folder"):
        cache_dir()


@pytest.mark.parametrize("name", ["Xorg", "gnome-shell", "kwin_wayland", "Xwayland", "dwm.exe", ""])
def test_what_draws_the_screen_or_has_no_name_or_is_another_users_is_not_to_be_killed(name: str) -> None:
    for process, own in ((CardProcess(process_id=9, name=name, bytes=None), (9,)), (OLLAMA, ())):
        (found,) = find(machine(cards=(card(memory_free_bytes=9 * GIB, others=(process,), own_process_ids=own),)))
        assert found.hint == "nvidia-smi shows who it is; close what is not needed"


def test_whose_a_process_on_a_card_is_is_asked_of_the_system() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    busy = FakeCard("card", "GPU-1", 20 * GIB, GIB, (8, 6), computing={child.pid: GIB, 2**30: GIB})
    (one,) = gather({}, Nvml([busy]), measure=False).cards
    child.communicate(b"\n")
    assert (len(one.others), one.own_process_ids) == (2, (child.pid,))


@pytest.mark.parametrize(
    ("per_second", "said"),
    [(59.5e12, "59.5 TFLOP/s"), (9.96e9, "9.96 GFLOP/s"), (2e11, "200 GFLOP/s"), (0, "0.00 MFLOP/s")],
)
def test_rates_have_three_figures(per_second: float, said: str) -> None:
    assert rate(per_second, "FLOP/s") == said


# What is printed, and what is bundled.


def printed(facts: Facts, private: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    def mask(text: str) -> str:
        for word, shown in private.items():
            text = text.replace(word, shown)
        return text

    print_report(facts, find(facts), mask, width=200)
    return " ".join(capsys.readouterr().out.split())


def test_a_report_tells_each_figure_with_its_source_and_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(machine(cards=(card(others=(OLLAMA,)),)), {}, capsys)
    assert "bf16 matrices at 50.0 TFLOP/s, 84% of the card's 59.5 TFLOP/s here; here" in text
    assert "memory copied at 640 GB/s, 84% of the card's 760 GB/s, read and write" in text
    assert "taken by others: 3.00 GiB: ollama (3.00 GiB)" in text
    assert "Found: no problem, nothing else to know" in text


def test_whatever_is_printed_is_masked(capsys: pytest.CaptureFixture[str]) -> None:
    facts = machine(
        processor="mine", system="mine", environment={"HF_HOME": "mine"}, visible="mine", device="cpu", measured=None,
        worker_failed="mine", cards=(card(name="mine"),), versions={"chatlm": "mine", "Python": "3", "torch": "2"},
        places=(place("mine", what="cache folder", disk="mine", refused="mine", free_bytes=9),),
    )  # fmt: skip
    assert "mine" not in printed(facts, {"mine": "<user>"}, capsys)


ROW = {"kind": "train", "step": 1, "loss": 2.5, "tokens": 512}
PRIVATE = Private(home="/home/ann", user="ann", host="thinkpad", secrets=("geheim-geheim",))
TOKEN = "hf_" + "aB3" * 12


def run_of_ann(folder: Path) -> Path:
    """A run in whose every file something stands that is nobody's business."""
    folder.mkdir()
    (folder / "config.toml").write_text(
        f'model = "/home/ann/m"  # command line\napi_key = "{TOKEN}"  # x\nprompt = ["my diary"]  # command line\n'
    )
    (folder / "plan.json").write_text(json.dumps({"workload": {"model": "/home/ann/m"}, "note": "geheim-geheim"}))
    (folder / "evidence.json").write_text('{"password": "abc", "cut')
    (folder / "log.txt").write_text("first\n" * MOST_LINES + f"on thinkpad: Bearer {TOKEN}\n")
    rows = [ROW] * MOST_LINES + [{"kind": "event", "answer": "my diary", "file": "/home/ann/x"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text("my diary\n")
    return folder


def test_a_bundle_has_the_end_of_a_run_and_nothing_that_is_not_to_be_told(tmp_path: Path) -> None:
    file = tmp_path / "bundle.zip"
    names = write_bundle(file, '{"a": 1}', run_of_ann(tmp_path / "run"), PRIVATE)
    with zipfile.ZipFile(file) as bundle:
        texts = {name: bundle.read(name).decode() for name in bundle.namelist()}
    assert list(texts) == names
    assert names == ["doctor.json", *(f"run/{name}" for name in
                     ("config.toml", "plan.json", "evidence.json", "log.txt", "metrics.jsonl"))]  # fmt: skip
    whole = "\n".join(texts.values())
    for secret in (TOKEN, "geheim", "diary", "/home/ann", "thinkpad", '"abc"'):
        assert secret not in whole
    assert texts["run/config.toml"] == (
        'model = "~/m"  # command line\napi_key = "***"  # x\nprompt = "(left out)"  # command line\n'
    )
    assert json.loads(texts["run/plan.json"]) == {"workload": {"model": "~/m"}, "note": "***"}
    rows = [json.loads(line) for line in texts["run/metrics.jsonl"].splitlines()]
    assert rows == [ROW] * (MOST_LINES - 1) + [{"kind": "event", "answer": "(left out)", "file": "~/x"}]
    assert len(texts["run/log.txt"].splitlines()) == MOST_LINES


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["runs/x"], 2, "a run is named for what a bundle has of it"),
        (["--bundle", "x.tar"], 2, "a bundle is a zip"),
        (["--bundle", "there.zip"], 5, "there.zip is there already"),
        (["--bundle", "no/x.zip"], 2, "no such folder"),
        (["--bundle", "x.zip", "runs/x"], 2, "runs/x: no such folder"),
    ],
)
def test_what_cannot_be_bundled_is_told_before_anything_is_measured(
    arguments: list[str], code: int, said: str, tmp_path: Path, chatlm: CommandRunner
) -> None:
    (tmp_path / "there.zip").touch()
    done = chatlm("doctor", *arguments, timeout=30)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "hint:" in done.stderr


def test_the_command_measures_this_machine_and_bundles_no_planted_secret(
    tmp_path: Path, chatlm_environment: dict[str, str]
) -> None:
    run = run_of_ann(tmp_path / "run")
    (run / "log.txt").write_text(f"{Path.home() / 'x'}: planted-secret, password: hunter2hunter2\n{TOKEN}\n")
    environment = chatlm_environment | {
        "CUDA_VISIBLE_DEVICES": "", "WANDB_API_KEY": "planted-secret", "HF_HOME": f"https://ann:{TOKEN}@h/x",
    }  # fmt: skip
    done = subprocess.run(
        [chatlm_path(), "doctor", "--json", "--bundle", "b.zip", str(run)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    told = json.loads(done.stdout)
    problems = [finding for finding in told["findings"] if finding["severity"] == "problem"]
    assert done.returncode == bool(problems), done.stderr
    assert told["schema"] == "chatlm.doctor/1"
    assert told["measured"]["matrix_flops"]["fp32"] > 1e8
    assert told["measured"]["copy_bytes"] > 1e7
    assert told["measured"]["seconds"] < 30
    assert told["environment"]["HF_HOME"] == "https://***@h/x"
    with zipfile.ZipFile(tmp_path / "b.zip") as bundle:
        texts = [bundle.read(name).decode() for name in bundle.namelist()]
    assert len(texts) == 6
    for text in (done.stdout, done.stderr, *texts):
        for secret in ("planted", "hunter2", TOKEN, "diary"):
            assert secret not in text


def test_a_torch_that_is_broken_is_a_finding_and_all_else_is_told(
    tmp_path: Path, chatlm_environment: dict[str, str]
) -> None:
    folder = tmp_path / "你好"
    folder.mkdir()
    (tmp_path / "torch.py").write_text("raise ImportError('libcublas.so.12: cannot open')\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), chatlm_environment.get("PYTHONPATH"))))
    environment = chatlm_environment | {
        "PYTHONPATH": path, "PYTHONIOENCODING": "ascii", "NO_COLOR": "1", "COLUMNS": "80", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run([chatlm_path(), "doctor"], env=environment, cwd=folder, capture_output=True, timeout=60)
    lines = done.stdout.decode("ascii").splitlines()
    told = " ".join(" ".join(lines).split())
    assert done.returncode == 1, done.stderr
    assert "problem: the worker, which loads torch, came to grief: the worker ended with exit code 1:" in told
    assert "ImportError: libcublas.so.12: cannot open" in told
    for word in ("processor", "swap", "cache folder", "hint:"):
        assert word in told
    assert max(map(len, lines)) <= 80
    assert b"Traceback" not in done.stderr
