"""The part of pynvml that is called, on cards made by hand; any call can be made to fail. A card is its own handle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pynvml

GIB = 1024**3
CODES = {name: value for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_")}


@dataclass(eq=False)
class FakeCard:
    """A card or a slice of one; `slices` is None where there is no MIG mode, and has a None where an index is empty."""

    name: str | bytes
    uuid: str | bytes
    total: int
    free: int
    capability: tuple[int, int] = (8, 0)
    slices: list[FakeCard | None] | None = None
    computing: dict[int, int | None] = field(default_factory=dict)
    drawing: dict[int, int | None] = field(default_factory=dict)
    busy_percent: int | None = None
    """None, here and below, where it is not supported."""
    celsius: int | None = None
    milliwatts: int | None = None
    limit_milliwatts: int | None = None
    reasons: int | None = None


def call(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make it a call of NVML's: it is counted, and fails where it is to."""

    @wraps(method)
    def answer(nvml: FakeNvml, *about: Any) -> Any:
        nvml.calls.append(method.__name__)
        if method.__name__ in nvml.fails:
            raise nvml.fails[method.__name__]
        return method(nvml, *about)

    return answer


@dataclass
class FakeNvml:
    cards: list[FakeCard]
    fails: dict[str, Exception] = field(default_factory=dict)
    open_count: int = 0
    calls: list[str] = field(default_factory=list)
    NVMLError = pynvml.NVMLError
    NVMLLibraryMismatchError = pynvml.NVMLLibraryMismatchError
    NVML_ERROR_LIBRARY_NOT_FOUND = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    NVML_ERROR_NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
    NVML_DEVICE_MIG_ENABLE = pynvml.NVML_DEVICE_MIG_ENABLE

    @call
    def nvmlInit(self) -> None:  # noqa: N802, pynvml's name, as all below
        self.open_count += 1

    @call
    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open_count -= 1

    @call
    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    @call
    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:  # noqa: N802
        return pick(self.cards, index)

    @call
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeCard:  # noqa: N802
        slices = [part for card in self.cards for part in card.slices or () if part]
        return pick([card for card in (*self.cards, *slices) if card.uuid == uuid], 0)

    @call
    def nvmlDeviceGetUUID(self, card: FakeCard) -> str | bytes:  # noqa: N802
        return card.uuid

    @call
    def nvmlDeviceGetName(self, card: FakeCard) -> str | bytes:  # noqa: N802
        return card.name

    @call
    def nvmlDeviceGetCudaComputeCapability(self, card: FakeCard) -> tuple[int, int]:  # noqa: N802
        return card.capability

    @call
    def nvmlDeviceGetMemoryInfo(self, card: FakeCard) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=card.total, free=card.free, used=card.total - card.free)

    @call
    def nvmlDeviceGetMigMode(self, card: FakeCard) -> list[int]:  # noqa: N802
        if card.slices is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [pynvml.NVML_DEVICE_MIG_ENABLE, pynvml.NVML_DEVICE_MIG_ENABLE]

    @call
    def nvmlDeviceGetMaxMigDeviceCount(self, card: FakeCard) -> int:  # noqa: N802
        return len(card.slices or ())

    @call
    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: FakeCard, index: int) -> FakeCard:  # noqa: N802
        return pick(card.slices or [], index)

    @call
    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, part: FakeCard) -> FakeCard:  # noqa: N802
        return pick([card for card in self.cards if part in (card.slices or ())], 0)

    @call
    def nvmlDeviceGetComputeRunningProcesses(self, card: FakeCard) -> list[SimpleNamespace]:  # noqa: N802
        return processes(card.computing)

    @call
    def nvmlDeviceGetGraphicsRunningProcesses(self, card: FakeCard) -> list[SimpleNamespace]:  # noqa: N802
        return processes(card.drawing)

    @call
    def nvmlDeviceGetUtilizationRates(self, card: FakeCard) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=told(card.busy_percent), memory=0)

    @call
    def nvmlDeviceGetTemperature(self, card: FakeCard, sensor: int) -> int:  # noqa: N802
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return told(card.celsius)

    @call
    def nvmlDeviceGetPowerUsage(self, card: FakeCard) -> int:  # noqa: N802
        return told(card.milliwatts)

    @call
    def nvmlDeviceGetEnforcedPowerLimit(self, card: FakeCard) -> int:  # noqa: N802
        return told(card.limit_milliwatts)

    @call
    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: FakeCard) -> int:  # noqa: N802
        return told(card.reasons)


CALLS = [name for name in vars(FakeNvml) if name.startswith("nvml")]
OF_GAUGES = {
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetTemperature",
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetEnforcedPowerLimit",
    "nvmlDeviceGetCurrentClocksThrottleReasons",
}
"""Those that only they make: what a card has is read without."""


def failing(cards: list[FakeCard], name: str, code: int) -> FakeNvml:
    """Make one where one call always answers with an error."""
    return FakeNvml(cards, {name: pynvml.NVMLError(code)})


def pick(found: list[Any], index: int) -> FakeCard:
    if index >= len(found) or found[index] is None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    assert isinstance(found[index], FakeCard)
    return found[index]  # type: ignore[no-any-return]


def told(value: int | None) -> int:
    if value is None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    return value


def processes(sizes: dict[int, int | None]) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in sizes.items()]


LARGE = FakeCard("NVIDIA GeForce RTX 3080", "GPU-8932f937-d72c-4106", 20 * GIB, 19 * GIB, (8, 6))
SMALL = FakeCard(b"Tesla T4", b"GPU-89aa0000-1111-2222", 15 * GIB, 14 * GIB, (7, 5))
# What is asked of a slice alone is told apart by its capability, which is none of a card's.
SLICE = FakeCard("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "MIG-1c4f-77", 9 * GIB, 8 * GIB, (0, 0))
SECOND_SLICE = FakeCard("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "MIG-5e20-12", 39 * GIB, 38 * GIB, (0, 0))
SLICED = FakeCard("NVIDIA A100-SXM4-80GB", "GPU-a100", 80 * GIB, 70 * GIB, (8, 0), [None, SLICE, SECOND_SLICE])
