"""What cards do now, on a fake of NVML that fails at will: what is not told is None, and nothing raises."""

from __future__ import annotations

from typing import Any

import pynvml
import pytest
from fake_nvml import CALLS, CODES, GIB, SECOND_SLICE, SLICE, SLICED, FakeCard, FakeNvml, failing
from hypothesis import given
from hypothesis import strategies as st

from autotune.cards import REASONS
from autotune.gauges import Gauge, Gauges, Held

BUSY = FakeCard(
    "NVIDIA GeForce RTX 3080", "GPU-1", 20 * GIB, 4 * GIB, computing={7: 12 * GIB}, drawing={8: GIB, 7: 12 * GIB},
    busy_percent=97, celsius=72, milliwatts=312_400, limit_milliwatts=320_000, reasons=0x4,
)  # fmt: skip
NEEDED = {"nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"}


def gauge_of(**changes: Any) -> Gauge:
    unknown = dict.fromkeys(Gauge._fields[2:]) | {"name": "card", "shares_host_memory": False}
    return Gauge(**unknown | changes)


def read(nvml: FakeNvml) -> tuple[Gauge, ...]:
    return Gauges(nvml).read()


def test_a_card_tells_its_memory_load_heat_power_and_what_slows_it() -> None:
    assert read(FakeNvml([BUSY])) == (
        Gauge(BUSY.name, False, 20 * GIB, 16 * GIB, 0.97, 72, 312.4, 320.0, ("power limit",),  # type: ignore[arg-type]
              (Held(7, 12 * GIB), Held(8, GIB))),
    )  # fmt: skip


def test_a_card_that_answers_nothing_gives_nones() -> None:
    nvml = FakeNvml([BUSY], {name: pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN) for name in {*CALLS} - NEEDED})
    assert read(nvml) == (gauge_of(name="NVIDIA card of unknown name"),)


@pytest.mark.parametrize("name", CALLS)
def test_whatever_call_fails_in_whatever_way_nothing_raises(name: str) -> None:
    for code in CODES.values():
        assert len(read(failing([BUSY], name, code))) == (name not in NEEDED)


def test_a_driver_too_old_for_a_question_leaves_the_rest() -> None:
    asked = "nvmlDeviceGetComputeRunningProcesses"
    (gauge,) = read(FakeNvml([BUSY], {asked: pynvml.NVMLLibraryMismatchError("")}))
    assert gauge.processes == (Held(7, 12 * GIB), Held(8, GIB)), "those that draw are told"
    assert gauge.utilization == 0.97


def test_a_card_among_several_that_fails_is_left_out() -> None:
    class Lost(FakeNvml):
        def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:  # noqa: N802
            if index == 0:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
            return self.cards[index]

    assert [gauge.name for gauge in Gauges(Lost([SLICED, BUSY])).read()] == [BUSY.name]


def test_each_slice_is_a_card_with_memory_of_its_own_and_the_heat_of_the_whole() -> None:
    card = FakeCard("A100", "GPU-a", 80 * GIB, 9 * GIB, slices=[None, SLICE, SECOND_SLICE], celsius=61, milliwatts=9000)
    found = read(FakeNvml([card, BUSY]))
    assert [gauge.name for gauge in found] == [SLICE.name, SECOND_SLICE.name, BUSY.name]
    assert [gauge.memory_total_bytes for gauge in found] == [SLICE.total, SECOND_SLICE.total, BUSY.total]
    assert [(gauge.temperature_celsius, gauge.power_watts) for gauge in found[:2]] == [(61, 9.0)] * 2


@pytest.mark.parametrize(
    "nvml",
    [
        failing([FakeCard("GB10", "GPU-1", 0, 0)], "nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_NOT_SUPPORTED),
        FakeNvml([FakeCard("GB10", "GPU-1", 0, 0)]),
    ],
    ids=["not supported", "nothing"],
)
def test_a_card_without_memory_of_its_own_shares_the_hosts(nvml: FakeNvml) -> None:
    (gauge,) = read(nvml)
    assert gauge.shares_host_memory
    assert (gauge.memory_total_bytes, gauge.memory_used_bytes) == (None, None)


@pytest.mark.parametrize("bit", [1 << place for place in range(14)])
def test_what_slows_a_card_is_a_word_and_idling_is_nothing(bit: int) -> None:
    (gauge,) = read(FakeNvml([FakeCard("card", "GPU-1", GIB, GIB, reasons=bit)]))
    assert gauge.slowed_by == (() if bit == 1 else (REASONS.get(bit, f"reason {bit:#x}"),))
    assert (bit in REASONS) == bool(bit & pynvml.nvmlClocksThrottleReasonAll & ~1), "the bits are NVML's"


def test_what_never_changes_is_asked_once() -> None:
    nvml = FakeNvml([BUSY, SLICED])
    found = Gauges(nvml)
    found.read()
    nvml.calls.clear()
    found.read()
    assert not {*nvml.calls} & {"nvmlDeviceGetHandleByIndex", "nvmlDeviceGetName", "nvmlDeviceGetEnforcedPowerLimit"}
    found.close()
    found.close()
    assert nvml.open_count == 0
    assert found.read() == ()


@pytest.mark.parametrize(
    ("code", "note"),
    [(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, ""), (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "NVML: Driver Not Loaded")],
)
def test_a_driver_that_refuses_is_told_and_one_that_is_not_there_is_not(code: int, note: str) -> None:
    found = Gauges(failing([BUSY], "nvmlInit", code))
    assert (found.read(), found.note) == ((), note)


@given(st.dictionaries(st.integers(1, 9), st.integers(0, 10 * GIB)), st.sets(st.integers(1, 9), min_size=1))
def test_what_a_tree_of_processes_holds_is_the_sum_of_theirs_and_with_the_rest_all_that_is_told(
    sizes: dict[int, int], tree: set[int]
) -> None:
    told = tuple(Held(*item) for item in sizes.items())
    card, everyone = gauge_of(memory_used_bytes=sum(sizes.values()), processes=told), set(range(1, 10))
    ours, rest = card.held_by(tree, everyone), card.held_by(everyone - tree, everyone)
    assert ours == sum(size for process_id, size in sizes.items() if process_id in tree)
    assert rest == sum(sizes.values()) - ours


@pytest.mark.parametrize(
    ("told", "used", "held"),
    [
        (None, GIB, None),
        ((), 600 * 2**20, 0),  # the driver's own
        ((), 3 * GIB, None),  # somebody's, whom a container does not see
        ((Held(999, 3 * GIB),), 3 * GIB, None),  # by a number of another container
        ((Held(2, 3 * GIB),), 3 * GIB, 0),
        ((Held(1, None),), 3 * GIB, None),  # Windows
        ((Held(1, GIB), Held(999, GIB)), 3 * GIB, GIB),
    ],
)
def test_what_is_not_told_of_a_process_is_not_taken_for_nothing(
    told: tuple[Held, ...] | None, used: int, held: int | None
) -> None:
    assert gauge_of(memory_used_bytes=used, processes=told).held_by({1}, {1, 2}) == held
