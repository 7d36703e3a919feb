"""Reads what every card does now, by NVML: memory and who holds it, how busy and hot it is, its power, what slows it.

No torch, and no CUDA. What a card does not tell is None, never an error: one that fails is shown with what is left.
A slice of a card (MIG) counts as a card; one that shares the host's memory (GB10, Jetson) has none of its own.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, NamedTuple

from autotune.cards import ask, decode, import_nvml, slowdowns

TEMPERATURE_OF_CHIP = 0
"""NVML_TEMPERATURE_GPU."""
UNTOLD_BYTES = 2**30
"""That a card holds for no process at all: the driver's own. What is more is somebody's who is not told."""


class Held(NamedTuple):
    """What a process holds of a card."""

    process_id: int
    bytes: int | None
    """None where NVML does not tell, as on Windows."""


class Gauge(NamedTuple):
    """What a card does now; None stands for what it does not tell."""

    name: str
    shares_host_memory: bool
    memory_total_bytes: int | None
    memory_used_bytes: int | None
    utilization: float | None
    """Share of the last moment in which a kernel ran."""
    temperature_celsius: float | None
    power_watts: float | None
    power_limit_watts: float | None
    slowed_by: tuple[str, ...] | None
    """Why its clocks are lower than they could be, in words."""
    processes: tuple[Held, ...] | None

    def is_used_by(self, process_ids: Set[int]) -> bool:
        """Say whether one of these processes is told to be on it."""
        return any(held.process_id in process_ids for held in self.processes or ())

    def held_by(self, process_ids: Set[int], known: Set[int]) -> int | None:
        """Return the bytes that processes hold; None where that cannot be told.

        `known` are all the processes that can be seen here: in a container NVML counts those outside too, or none.
        """
        if self.processes is None:
            return None
        ours = [held.bytes for held in self.processes if held.process_id in process_ids]
        if ours:
            return None if None in ours else sum(size for size in ours if size is not None)
        strangers = any(held.process_id not in known for held in self.processes)
        told = sum(held.bytes or 0 for held in self.processes)
        untold = (self.memory_used_bytes or 0) - told > UNTOLD_BYTES
        return None if strangers or (not self.processes and untold) else 0


class Gauges:
    """Every card of the machine, or slice of one, found once and read many times.

    `nvml` has the interface of the module pynvml, which is the default.
    """

    def __init__(self, nvml: Any = None) -> None:
        self._nvml = nvml or import_nvml()
        self.note = ""
        """Why there are none, where a driver is here and refuses."""
        self._dials: list[_Dial] = []
        self._open = self._start()
        if self._open:
            self._dials = [_Dial(self._nvml, device, whole) for device, whole in _devices(self._nvml)]

    def _start(self) -> bool:
        if self._nvml is None:
            return False
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            if error.value != self._nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
                self.note = f"NVML: {str(error).rstrip('.')}"
            return False
        return True

    def read(self) -> tuple[Gauge, ...]:
        """Read all cards, in NVML's order."""
        return tuple(dial.read() for dial in self._dials)

    def close(self) -> None:
        """Let go of NVML."""
        if self._open:
            ask(self._nvml, self._nvml.nvmlShutdown)
            self._open, self._dials = False, []


def _devices(nvml: Any) -> list[tuple[Any, Any]]:
    """Return handles: of each card or slice, and of the whole card, which knows heat and power. One that fails is left.

    A card in MIG mode without a slice of ours is shown whole.
    """
    wholes = [ask(nvml, nvml.nvmlDeviceGetHandleByIndex, i) for i in range(ask(nvml, nvml.nvmlDeviceGetCount) or 0)]
    found: list[tuple[Any, Any]] = []
    for whole in wholes:
        if whole is not None:
            found += [(part, whole) for part in _slices(nvml, whole)] or [(whole, whole)]
    return found


def _slices(nvml: Any, card: Any) -> list[Any]:
    mode = ask(nvml, nvml.nvmlDeviceGetMigMode, card)
    if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return []
    most = ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, card) or 0
    parts = [ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, card, index) for index in range(most)]
    return [part for part in parts if part is not None]


class _Dial:
    """One card: what never changes is asked once."""

    def __init__(self, nvml: Any, device: Any, whole: Any) -> None:
        self._nvml, self._device, self._whole = nvml, device, whole
        self._name = decode(ask(nvml, nvml.nvmlDeviceGetName, device)) or "NVIDIA card of unknown name"
        self._power_limit = self._milliwatts(nvml.nvmlDeviceGetEnforcedPowerLimit)

    def read(self) -> Gauge:
        nvml = self._nvml
        shares, total, used = self._memory()
        rates = ask(nvml, nvml.nvmlDeviceGetUtilizationRates, self._device)
        return Gauge(
            name=self._name,
            shares_host_memory=shares,
            memory_total_bytes=total,
            memory_used_bytes=used,
            utilization=None if rates is None else rates.gpu / 100,
            temperature_celsius=ask(nvml, nvml.nvmlDeviceGetTemperature, self._whole, TEMPERATURE_OF_CHIP),
            power_watts=self._milliwatts(nvml.nvmlDeviceGetPowerUsage),
            power_limit_watts=self._power_limit,
            slowed_by=slowdowns(ask(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, self._whole)),
            processes=self._processes(),
        )

    def _memory(self) -> tuple[bool, int | None, int | None]:
        """Return whether it shares the host's, else all it has, and what of it is not free."""
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._device)
        except self._nvml.NVMLError as error:
            return error.value == self._nvml.NVML_ERROR_NOT_SUPPORTED, None, None
        return (False, memory.total, memory.total - memory.free) if memory.total else (True, None, None)

    def _milliwatts(self, question: Any) -> float | None:
        told = ask(self._nvml, question, self._whole)
        return None if told is None else told / 1000

    def _processes(self) -> tuple[Held, ...] | None:
        """Read who is on it; a process of both kinds counts once. None where neither kind is told."""
        nvml = self._nvml
        kinds = (nvml.nvmlDeviceGetGraphicsRunningProcesses, nvml.nvmlDeviceGetComputeRunningProcesses)
        told = [ask(nvml, kind, self._device) for kind in kinds]
        if told == [None, None]:
            return None
        found = {process.pid: process.usedGpuMemory for kind in told for process in kind or ()}
        return tuple(Held(process_id, size) for process_id, size in sorted(found.items()))
