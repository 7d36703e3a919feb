"""The card that is here, on a fake of NVML that fails at will, and the table of those that need not be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest
from fake_nvml import CODES, GIB, LARGE, SECOND_SLICE, SLICE, SLICED, SMALL, FakeCard, FakeNvml, failing

from autotune.cards import TABLE, Card, Look, find_card, find_rates, read_card
from autotune.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[1]
NONE = None
FAILURES = pytest.mark.parametrize("code", CODES.values(), ids=CODES)
NO_SUCH_PROCESS = 2**32 - 1


def card_of(look: Look) -> Card:
    assert look.card is not None, look.notes
    return look.card


# Which card.


@pytest.mark.parametrize(
    ("visible", "card"),
    [
        (None, LARGE),
        ("0", LARGE),
        ("1", SMALL),
        ("1,0", SMALL),
        (" 1 , 0", SMALL),
        ("GPU-8932f937-d72c-4106", LARGE),
        ("GPU-89aa", SMALL),
        ("GPU-89aa,0", SMALL),
        ("3", NONE),
        ("4294967296", NONE),
        ("GPU-77", NONE),
        ("GPU-89", NONE),  # begins both
        ("NoDevFiles", NONE),
        ("2", SLICE),  # a card in MIG mode, and its first slice
        ("GPU-a100", SLICE),
        ("MIG-1c4f-77", SLICE),
        ("MIG-5e20-12", SECOND_SLICE),
        ("MIG-5e20-12,0", SECOND_SLICE),
        ("MIG-77", NONE),
    ],
)
def test_the_card_is_the_first_that_cuda_sees(visible: str | None, card: FakeCard | None) -> None:
    nvml = FakeNvml([LARGE, SMALL, SLICED])
    found = read_card(visible, nvml).card
    assert (found and found.memory) == (card and (card.total, card.free))
    assert nvml.open_count == 0, "NVML was left open"


@pytest.mark.parametrize("visible", ["", "-1", " ", "-1,0"])
def test_when_cuda_is_to_see_no_device_nvml_is_not_opened_and_nothing_is_said(visible: str) -> None:
    nvml = FakeNvml([LARGE])
    assert read_card(visible, nvml) == (None, ())
    assert nvml.calls == []


@pytest.mark.parametrize(
    ("visible", "said"),
    [
        (None, "card 0 cannot be used (cards here: 0): the processor is used"),
        ("1", "card 1 cannot be used (cards here: 0): the processor is used"),
        ("GPU-7", "card GPU-7 cannot be used (cards whose UUID begins so: 0): the processor is used"),
        ("MIG-7", "card MIG-7 cannot be used (NVML: Not Found): the processor is used"),
    ],
)
def test_a_card_that_is_not_there_is_told(visible: str | None, said: str) -> None:
    assert read_card(visible, FakeNvml([])) == (None, (said,))


def test_a_card_that_is_lost_does_not_hide_another_named_by_uuid() -> None:
    class Losing(FakeNvml):
        def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:  # noqa: N802
            if index == 0:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
            return self.cards[index]

    assert card_of(read_card("GPU-89aa", Losing([LARGE, SMALL]))).name == "Tesla T4"


# What is read of it.


def test_a_name_is_text_whether_nvml_gives_text_or_bytes() -> None:
    names = [card_of(read_card(None, FakeNvml([card]))).name for card in (LARGE, SMALL)]
    assert names == ["NVIDIA GeForce RTX 3080", "Tesla T4"]


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 1), True)])
def test_bf16_is_fast_from_compute_capability_8_0(capability: tuple[int, int], fast: bool) -> None:
    card = card_of(read_card(None, FakeNvml([FakeCard("card", "GPU-1", GIB, GIB, capability)])))
    assert (card.compute_capability, card.fast_bf16) == (capability, fast)


@pytest.mark.parametrize("visible", ["0", "GPU-a100", "MIG-1c4f-77"])
def test_a_slice_has_its_own_name_and_memory_and_the_capability_of_its_card(visible: str) -> None:
    card = card_of(read_card(visible, FakeNvml([SLICED])))
    assert card == (SLICE.name, (SLICE.total, SLICE.free), SLICED.capability, ())


@pytest.mark.parametrize("slices", [[], [None, None]])
def test_a_card_in_mig_mode_without_a_slice_of_ours_is_not_used(slices: list[FakeCard | None]) -> None:
    look = read_card("0", FakeNvml([FakeCard("A100", "GPU-1", GIB, GIB, slices=slices)]))
    assert look.card is None
    assert "MIG mode" in look.notes[0]


def test_a_card_whose_mig_mode_is_off_is_used_whole() -> None:
    class Off(FakeNvml):
        def nvmlDeviceGetMigMode(self, card: FakeCard) -> list[int]:  # noqa: N802
            return [pynvml.NVML_DEVICE_MIG_DISABLE, pynvml.NVML_DEVICE_MIG_ENABLE]

    assert card_of(read_card("0", Off([SLICED]))).memory == (SLICED.total, SLICED.free)


@pytest.mark.parametrize(
    "nvml",
    [
        failing([FakeCard("GB10", "GPU-1", 0, 0)], "nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_NOT_SUPPORTED),
        FakeNvml([FakeCard("GB10", "GPU-1", 0, 0)]),
    ],
    ids=["not supported", "nothing"],
)
def test_a_card_without_memory_of_its_own_shares_the_hosts_and_says_so(nvml: FakeNvml) -> None:
    look = read_card(None, nvml)
    assert card_of(look).memory is None
    assert look.notes == ("GB10 has no memory of its own: what the host has and has free counts",)


# Who else is on it.


def test_the_others_on_the_card_are_named_the_largest_first() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        card = FakeCard("card", "GPU-1", 20 * GIB, 9 * GIB, computing={os.getppid(): GIB, other.pid: 3 * GIB})
        others = card_of(read_card(None, FakeNvml([card]))).others
        name = psutil.Process(other.pid).name()
        other.communicate(b"\n")
    assert [(process.process_id, process.bytes) for process in others] == [(other.pid, 3 * GIB), (os.getppid(), GIB)]
    assert others[0].name == name
    assert "python" in name.lower()


def test_we_ourselves_are_not_another_and_who_draws_and_computes_counts_once() -> None:
    both = {NO_SUCH_PROCESS: GIB, os.getpid(): GIB}
    card = FakeCard("card", "GPU-1", 20 * GIB, 9 * GIB, computing=both, drawing=both)
    assert [tuple(dict(p).values()) for p in card_of(read_card(None, FakeNvml([card]))).others] == [
        (NO_SUCH_PROCESS, "", GIB)
    ], "a process that is not ours to see has no name"


def test_what_another_holds_may_be_unknown_and_comes_last() -> None:
    card = FakeCard("card", "GPU-1", GIB, GIB, drawing={7: None, NO_SUCH_PROCESS: 1})
    others = card_of(read_card(None, FakeNvml([card]))).others
    assert [process.bytes for process in others] == [1, None]


def test_on_a_slice_only_its_own_processes_count() -> None:
    part = FakeCard("MIG 1g", "MIG-1", GIB, GIB, computing={NO_SUCH_PROCESS: 5})
    whole = FakeCard("A100", "GPU-1", GIB, GIB, slices=[part], computing={NO_SUCH_PROCESS - 1: 6})
    assert [process.bytes for process in card_of(read_card("0", FakeNvml([whole]))).others] == [5]


@pytest.mark.parametrize("kind", ["Compute", "Graphics"])
def test_a_driver_too_old_to_list_processes_hides_only_those(kind: str) -> None:
    card = FakeCard("card", "GPU-1", GIB, GIB, computing={NO_SUCH_PROCESS: 5}, drawing={NO_SUCH_PROCESS - 1: 6})
    error = pynvml.NVMLLibraryMismatchError("use a versioned function")
    look = read_card(None, FakeNvml([card], {f"nvmlDeviceGet{kind}RunningProcesses": error}))
    assert [process.bytes for process in card_of(look).others] == [6 if kind == "Compute" else 5]


# What counts when NVML fails: each of its error codes at each call.


@FAILURES
@pytest.mark.parametrize(
    ("visible", "name"),
    [
        ("0", "nvmlDeviceGetCount"),
        ("0", "nvmlDeviceGetHandleByIndex"),
        ("0", "nvmlDeviceGetMaxMigDeviceCount"),
        ("0", "nvmlDeviceGetMemoryInfo"),
        ("GPU-a100", "nvmlDeviceGetCount"),
        ("MIG-1c4f-77", "nvmlDeviceGetHandleByUUID"),
        ("MIG-1c4f-77", "nvmlDeviceGetMemoryInfo"),
    ],
)
def test_without_its_handle_or_its_memory_a_card_is_not_used_and_the_reason_is_told(
    visible: str, name: str, code: int
) -> None:
    nvml = failing([SLICED], name, code)
    look = read_card(visible, nvml)
    assert nvml.open_count == 0
    if (name, code) == ("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_NOT_SUPPORTED):
        assert card_of(look).memory is None
        return
    reason = str(pynvml.NVMLError(code)).rstrip(".")
    assert look == (None, (f"card {visible} cannot be used (NVML: {reason}): the processor is used",))


@FAILURES
def test_a_card_whose_slices_cannot_be_had_is_not_used(code: int) -> None:
    look = read_card("0", failing([SLICED], "nvmlDeviceGetMigDeviceHandleByIndex", code))
    assert look == (
        None,
        ("card 0 cannot be used (it is in MIG mode, and no slice of it is ours): the processor is used",),
    )


@FAILURES
@pytest.mark.parametrize("name", ["nvmlDeviceGetUUID", "nvmlDeviceGetHandleByIndex"])
def test_a_card_that_does_not_tell_its_uuid_is_not_found_by_it(name: str, code: int) -> None:
    look = read_card("GPU-a100", failing([SLICED], name, code))
    assert look.card is None
    assert "cards whose UUID begins so: 0" in look.notes[0]


@FAILURES
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("nvmlDeviceGetName", {"name": "NVIDIA card of unknown name"}),
        ("nvmlDeviceGetCudaComputeCapability", {"compute_capability": None}),
        ("nvmlDeviceGetMigMode", {}),
        ("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", {}),
        ("nvmlDeviceGetComputeRunningProcesses", {}),
        ("nvmlDeviceGetGraphicsRunningProcesses", {}),
        ("nvmlShutdown", {}),
    ],
)
def test_a_detail_that_cannot_be_read_costs_that_detail_alone(
    name: str, changed: dict[str, str | None], code: int
) -> None:
    nvml = failing([LARGE], name, code)
    whole, found = card_of(read_card("0", FakeNvml([LARGE]))), card_of(read_card("0", nvml))
    assert name in nvml.calls
    assert found._asdict() == whole._asdict() | changed


@FAILURES
def test_without_a_capability_bf16_is_not_assumed_and_the_user_is_told(code: int) -> None:
    look = read_card(None, failing([LARGE], "nvmlDeviceGetCudaComputeCapability", code))
    assert not card_of(look).fast_bf16
    assert look.notes == ("the compute capability of NVIDIA GeForce RTX 3080 cannot be read: bf16 is not assumed",)


@FAILURES
def test_a_slice_whose_card_is_not_told_answers_for_itself(code: int) -> None:
    nvml = failing([SLICED], "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", code)
    assert card_of(read_card("0", nvml)).compute_capability == SLICE.capability


@FAILURES
def test_a_driver_that_cannot_be_asked_means_the_processor_and_is_told(tmp_path: Path, code: int) -> None:
    nvml = failing([LARGE], "nvmlInit", code)
    look = read_card(None, nvml, tmp_path)
    assert look.card is None
    assert nvml.calls == ["nvmlInit"]
    assert len(look.notes) == (code != pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, False),
        ({"dev/nvidia0": ""}, True),
        ({"dev/nvhost-gpu": ""}, True),
        ({"dev/nvidia-caps": "", "dev/nvidiactl": ""}, False),
        ({"sys/bus/pci/devices/1/vendor": "0x10de\n", "sys/bus/pci/devices/1/class": "0x030200\n"}, True),
        ({"sys/bus/pci/devices/1/vendor": "0x10de\n", "sys/bus/pci/devices/1/class": "0x040300\n"}, False),
        ({"sys/bus/pci/devices/1/vendor": "0x1002\n", "sys/bus/pci/devices/1/class": "0x030000\n"}, False),
        ({"sys/bus/pci/devices/1/vendor": "0x10de\n"}, False),
    ],
)
def test_without_nvml_the_processor_is_used_and_that_is_told_where_a_card_is(
    tmp_path: Path, files: dict[str, str], told: bool
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    look = read_card(None, failing([], "nvmlInit", pynvml.NVML_ERROR_LIBRARY_NOT_FOUND), tmp_path)
    said = "an NVIDIA card is in this machine but cannot be used (no driver library, NVML, is found)"
    assert look == (None, (f"{said}: the processor is used",) if told else ())


def test_without_the_module_pynvml_the_processor_is_used(tmp_path: Path) -> None:
    program = f"""if True:
        import sys
        from pathlib import Path
        sys.modules["pynvml"] = None
        from autotune.cards import read_card
        print(read_card(None, root=Path({str(tmp_path)!r})) == (None, ()), 'torch' in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["True", "False"]


def test_an_error_that_is_not_nvmls_is_a_bug_and_is_shown() -> None:
    with pytest.raises(AttributeError):
        read_card(None, SimpleNamespace(NVMLError=pynvml.NVMLError))


# Cards that are not here.


def test_a_card_is_found_as_people_write_its_name() -> None:
    for name in ("RTX 3080 20GB", "rtx3080 20gb", "NVIDIA GeForce RTX 3080-20GB"):
        card = find_card(name)
        assert card.name == "RTX 3080 20GB"
        assert card.memory is not None
        assert card.memory.total_bytes == 20 * GIB
        assert card.memory.free_bytes == pytest.approx(19.58 * GIB, rel=1e-3)
        assert card.fast_bf16
    assert not find_card("T4").fast_bf16


def test_an_unknown_card_is_answered_with_those_that_are_near() -> None:
    with pytest.raises(ConfigurationError, match="no card 'RTX 3085'") as error:
        find_card("RTX 3085")
    assert "RTX 3080" in error.value.hint


def test_every_card_of_the_table_is_one() -> None:
    cards = tomllib.loads(TABLE.read_text(encoding="utf-8"))["cards"]
    assert len(cards) >= 20
    for name, card in cards.items():
        gigabytes = card["memory_mib"] / 1024
        assert 8 < gigabytes < 150, name
        assert (7, 0) <= tuple(card["capability"]) <= (12, 0), name
        said = re.search(r"(\d+)GB", name)
        assert said is None or gigabytes == pytest.approx(int(said[1]), rel=0.01), name


@pytest.mark.parametrize("name", ["RTX 4080", "NVIDIA GeForce RTX 4080", "rtx4080 16gb"])
def test_a_name_without_its_memory_will_do_where_one_card_has_it(name: str) -> None:
    assert find_card(name).name == "RTX 4080 16GB"


def test_a_name_that_several_cards_have_is_asked_back() -> None:
    with pytest.raises(ConfigurationError) as error:
        find_card("RTX 3080")
    assert error.value.hint == "say which: RTX 3080 10GB, RTX 3080 12GB, RTX 3080 20GB"
    assert find_rates("RTX 3080", "bf16") is None


def test_rates_are_those_of_the_vendor_and_none_for_bf16_where_there_is_none() -> None:
    """GA102 white paper: 71 bf16 TFLOPS dense with fp32 accumulation, 35.6 fp32, 936 GB/s."""
    bf16, fp32 = (find_rates("NVIDIA GeForce RTX 3090", precision) for precision in ("bf16", "fp32"))
    assert bf16 is not None
    assert fp32 is not None
    assert bf16.flops == pytest.approx(71e12, rel=0.01)
    assert fp32.flops == pytest.approx(35.6e12, rel=0.01)
    assert bf16.bytes == pytest.approx(936e9, rel=0.01)
    assert find_rates("T4", "bf16") is None
    assert find_rates("AMD EPYC", "fp32") is None


def test_every_card_of_the_table_has_plausible_rates() -> None:
    for name, card in tomllib.loads(TABLE.read_text())["cards"].items():
        rates = find_rates(name, "fp32")
        assert rates is not None
        assert 5e12 < rates.flops < 150e12
        assert 200e9 < rates.bytes < 10e12
        assert card["fp16_tflops"] >= card["fp32_tflops"], name
        assert (card["bf16_tflops"] > 0) == (card["capability"] >= [8, 0]), name
