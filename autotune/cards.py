"""Reads the card that is here, by NVML, and the table `cards.toml` of those that need not be.

No torch, and CUDA is never initialised, so that looking costs no device memory. Whatever NVML answers, the result is
a card, or none and the reason: docs/hardware.md has the table of what counts when something cannot be read.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from autotune.errors import ConfigurationError, MachineError
from autotune.plan import CardProcess, Precision, Rates

TABLE = Path(__file__).with_name("cards.toml")
USABLE_SHARE = 0.979
"""Of a card's memory, what a program finds free on one that does nothing else: 19.58 of 20 GiB on an RTX 3080."""
BF16_CAPABILITY = (8, 0)
OPERATOR_SECONDS = 8e-6
"""That eager mode takes to start an operator, the host's part of autograd included: 5 to 10 us are seen."""
NVIDIA_VENDOR, DISPLAY_CLASS = "0x10de", "0x03"
"""As /sys/bus/pci has them; the class is the beginning of one."""


class CardMemory(NamedTuple):
    """What a card has of its own, and has free."""

    total_bytes: int
    free_bytes: int


class Card(NamedTuple):
    """A card that would train; a slice of one (MIG) counts as a card."""

    name: str
    memory: CardMemory | None
    """None if it shares the host's."""
    compute_capability: tuple[int, int] | None
    """None if it is not known."""
    others: tuple[CardProcess, ...]

    @property
    def fast_bf16(self) -> bool:
        """Whether bf16 arithmetic is done by the hardware; not assumed of a card of unknown capability."""
        return self.compute_capability is not None and self.compute_capability >= BF16_CAPABILITY


class Look(NamedTuple):
    """What looking for a card found, and what people should know of it."""

    card: Card | None
    notes: tuple[str, ...]


class CardState(NamedTuple):
    """One card of the machine, whether CUDA is to see it or not; None is what NVML does not tell."""

    card: Card
    mig: bool
    """Whether it is cut in slices."""
    celsius: int | None
    clock_mhz: int | None
    """Of its multiprocessors, now."""
    most_clock_mhz: int | None
    slowed_by: tuple[str, ...]
    """Why its clock is held down, but for want of work."""


class Survey(NamedTuple):
    """All cards of the machine, and the driver that knows them."""

    driver: str
    """Empty where it is not known."""
    cuda: tuple[int, int] | None
    """The latest that the driver runs."""
    states: tuple[CardState, ...]
    hardware: bool
    """Whether an NVIDIA card is seen in `/dev` or on the PCI bus, whatever NVML says."""
    trouble: str
    """Why NVML cannot be asked; empty where it can."""


REASONS = {
    0x002: "a clock that was set",
    0x004: "power limit",
    0x008: "hardware slowdown",
    0x010: "waits for other cards (sync boost)",
    0x020: "heat",
    0x040: "heat (hardware)",
    0x080: "power brake",
    0x100: "clocks of the display",
    0x200: "board limit",
    0x400: "reliability limit",
}
"""docs.nvidia.com/deploy/nvml-api, "NvmlClocksEventReasons"; that it idles, 0x001, slows nothing."""
IDLE = 0x001


def slowdowns(reasons: int | None) -> tuple[str, ...] | None:
    """Say in words what NVML names by bits; None where it does not tell."""
    if reasons is None:
        return None
    known = tuple(word for bit, word in REASONS.items() if reasons & bit)
    unknown = reasons & ~sum(REASONS) & ~IDLE
    return (*known, f"reason {unknown:#x}") if unknown else known


def find_card(name: str) -> Card:
    """Find a card in the table by its name as people write it, with nothing on it.

    Raises ConfigurationError for a name that is not in the table.
    """
    cards = _read_table()
    named = _named(name, cards)
    if len(named) > 1:
        raise ConfigurationError(f"the {name} was made with several sizes of memory", f"say which: {', '.join(named)}")
    if not named:
        near = get_close_matches(name, cards, n=3, cutoff=0.4)
        raise ConfigurationError(f"no card {name!r} in the table", f"did you mean {', '.join(near or cards)}?")
    (known,) = named
    total = cards[known]["memory_mib"] * 2**20
    major, minor = cards[known]["capability"]
    return Card(known, CardMemory(total, round(USABLE_SHARE * total)), (major, minor), ())


def find_rates(name: str, precision: Precision) -> Rates | None:
    """Find what a card of the table does in a second at best, by its name there or as its driver has it.

    None for a card that is not in the table, or has no such precision.
    """
    cards = _read_table()
    named = _named(name, cards)
    if len(named) != 1:
        return None
    flops, moved = cards[named[0]][f"{precision}_tflops"], cards[named[0]]["bandwidth_gbps"]
    if not flops:
        return None
    return Rates(flops=1e12 * flops, bytes=1e9 * moved, operator_seconds=OPERATOR_SECONDS, overlaps=True)


def _read_table() -> dict[str, dict[str, Any]]:
    cards: dict[str, dict[str, Any]] = tomllib.loads(TABLE.read_text(encoding="utf-8"))["cards"]
    return cards


def _named(name: str, cards: Iterable[str]) -> list[str]:
    """Return the table's cards of this name; without its memory a name may be that of several."""
    exact = [known for known in cards if _plain(known) == _plain(name)]
    return exact or [known for known in cards if re.fullmatch(re.escape(_plain(name)) + r"\d+gb", _plain(known))]


def read_card(visible: str | None, nvml: Any = None, root: Path = Path("/")) -> Look:
    """Read the first card that CUDA would see.

    `visible` is the value of CUDA_VISIBLE_DEVICES, None if it is not set; if it hides all cards, nothing is read.
    `nvml` has the interface of the module pynvml, which is the default. `root` is where `dev` and `sys` are.
    """
    entry = "0" if visible is None else visible.split(",")[0].strip()
    if entry in ("", "-1"):
        return Look(None, ())
    nvml = nvml or import_nvml()
    if nvml is None:
        return _look_without_nvml(root)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return _look_without_nvml(root)
        return _refuse("the NVIDIA driver cannot be asked for cards", _name_error(error))
    return _read_entry(nvml, entry)


def survey_cards(nvml: Any = None, root: Path = Path("/")) -> Survey:
    """Read every card there is, whatever CUDA_VISIBLE_DEVICES says; arguments as of `read_card`."""
    nvml, hardware = nvml or import_nvml(), _has_nvidia_hardware(root)
    if nvml is None:
        return Survey("", None, (), hardware, "the module pynvml is not installed")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Survey("", None, (), hardware, _name_error(error))
    try:
        cuda = ask(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
        handles = [
            ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
            for index in range(ask(nvml, nvml.nvmlDeviceGetCount) or 0)
        ]
        return Survey(
            driver=decode(ask(nvml, nvml.nvmlSystemGetDriverVersion)),
            cuda=(cuda // 1000, cuda % 1000 // 10) if cuda else None,
            states=tuple(_read_state(nvml, handle) for handle in handles if handle is not None),
            hardware=hardware,
            trouble="",
        )
    finally:
        ask(nvml, nvml.nvmlShutdown)


def free_card_bytes() -> int | None:
    """Return what is free on the first card that CUDA would see; None where that is not told."""
    card = read_card(os.environ.get("CUDA_VISIBLE_DEVICES")).card
    return card.memory.free_bytes if card and card.memory else None


def _plain(name: str) -> str:
    """Return a card's name as people mean it: case, spaces and the maker's words do not matter."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def _read_entry(nvml: Any, entry: str) -> Look:
    """Read the device that an entry of CUDA_VISIBLE_DEVICES names, and close NVML."""
    try:
        return _read_device(nvml, _find_device(nvml, entry))
    except nvml.NVMLError as error:
        return _refuse(f"card {entry} cannot be used", _name_error(error))
    except MachineError as error:
        return _refuse(f"card {entry} cannot be used", error.message)
    finally:
        ask(nvml, nvml.nvmlShutdown)


def import_nvml() -> Any:
    """Return the module pynvml; None where it is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def _look_without_nvml(root: Path) -> Look:
    """Tell of it only where a card is: most machines without NVML have none."""
    if _has_nvidia_hardware(root):
        return _refuse("an NVIDIA card is in this machine but cannot be used", "no driver library, NVML, is found")
    return Look(None, ())


def _has_nvidia_hardware(root: Path) -> bool:
    """Say whether there are device files of NVIDIA's, or a display controller of theirs on the PCI bus."""
    files = (*root.glob("dev/nvidia[0-9]*"), *root.glob("dev/nvhost-gpu"))
    return bool(files) or any(_is_nvidia_display(device) for device in root.glob("sys/bus/pci/devices/*"))


def _is_nvidia_display(device: Path) -> bool:
    try:
        vendor, kind = ((device / name).read_text() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor.strip() == NVIDIA_VENDOR and kind.startswith(DISPLAY_CLASS)


def _refuse(what: str, reason: str) -> Look:
    return Look(None, (f"{what} ({reason}): the processor is used",))


def _name_error(error: Exception) -> str:
    return f"NVML: {str(error).rstrip('.')}"


def ask(nvml: Any, question: Callable[..., Any], *about: Any) -> Any:
    """Return NVML's answer; None for any error, for words that are none, and of a driver too old for the question."""
    try:
        return question(*about)
    except (nvml.NVMLError, nvml.NVMLLibraryMismatchError, UnicodeDecodeError):
        return None


def _find_device(nvml: Any, entry: str) -> Any:
    """Find the device that an entry of CUDA_VISIBLE_DEVICES names.

    A number is an index in the order of PCI bus ids, NVML's and, under CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA's. `MIG-...`
    is the UUID of a slice. All else is the beginning of one card's UUID.
    docs.nvidia.com/cuda/cuda-c-programming-guide, "CUDA Environment Variables".
    """
    if entry.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(entry)
    count = nvml.nvmlDeviceGetCount()
    if not entry.isdecimal():
        return _take_slice(nvml, _find_by_uuid(nvml, entry, count))
    if int(entry) >= count:
        raise MachineError(f"cards here: {count}")
    return _take_slice(nvml, nvml.nvmlDeviceGetHandleByIndex(int(entry)))


def _find_by_uuid(nvml: Any, beginning: str, count: int) -> Any:
    """Find the one card whose UUID begins so; one that does not answer is another."""
    cards = [ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index) for index in range(count)]
    named = [card for card in cards if card is not None and _read_uuid(nvml, card).startswith(beginning)]
    if len(named) != 1:
        raise MachineError(f"cards whose UUID begins so: {len(named)}")
    return named[0]


def _take_slice(nvml: Any, card: Any) -> Any:
    """Return the first slice of a card in MIG mode, which is all that CUDA uses of it; any other card itself.

    docs.nvidia.com/datacenter/tesla/mig-user-guide, "CUDA Device Enumeration".
    """
    mode = ask(nvml, nvml.nvmlDeviceGetMigMode, card)
    if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return card
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card)):
        # The indices of slices that were removed, or are another container's, stay empty.
        found = ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, card, index)
        if found is not None:
            return found
    raise MachineError("it is in MIG mode, and no slice of it is ours")


def _read_device(nvml: Any, device: Any) -> Look:
    name = decode(ask(nvml, nvml.nvmlDeviceGetName, device)) or "NVIDIA card of unknown name"
    memory = _read_memory(nvml, device)
    # Only a slice lies on another card.
    whole = ask(nvml, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, device)
    capability = ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, device if whole is None else whole)
    notes = []
    if memory is None:
        notes.append(f"{name} has no memory of its own: what the host has and has free counts")
    if capability is None:
        notes.append(f"the compute capability of {name} cannot be read: bf16 is not assumed")
    return Look(Card(name, memory, capability, _read_others(nvml, device)), tuple(notes))


def _read_state(nvml: Any, device: Any) -> CardState:
    """Read a card whole, as its driver has it."""
    card = Card(
        name=decode(ask(nvml, nvml.nvmlDeviceGetName, device)) or "NVIDIA card of unknown name",
        memory=ask(nvml, _read_memory, nvml, device),
        compute_capability=ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, device),
        others=_read_others(nvml, device),
    )
    mode = ask(nvml, nvml.nvmlDeviceGetMigMode, device)
    reasons = ask(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, device)
    return CardState(
        card=card,
        mig=mode is not None and mode[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        celsius=ask(nvml, nvml.nvmlDeviceGetTemperature, device, nvml.NVML_TEMPERATURE_GPU),
        clock_mhz=ask(nvml, nvml.nvmlDeviceGetClockInfo, device, nvml.NVML_CLOCK_SM),
        most_clock_mhz=ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, device, nvml.NVML_CLOCK_SM),
        slowed_by=slowdowns(reasons) or (),
    )


def _read_memory(nvml: Any, device: Any) -> CardMemory | None:
    """Read the memory of a device; None where it shares the host's, as GB10 and Jetson do.

    docs.nvidia.com/dgx/dgx-spark/known-issues.html, "nvidia-smi reports memory usage not supported".
    """
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(device)
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_NOT_SUPPORTED:
            return None
        raise
    return CardMemory(memory.total, memory.free) if memory.total else None


def _read_others(nvml: Any, device: Any) -> tuple[CardProcess, ...]:
    """Read who else is on the device, the largest first; a process of both kinds counts once."""
    kinds = (nvml.nvmlDeviceGetGraphicsRunningProcesses, nvml.nvmlDeviceGetComputeRunningProcesses)
    found = {process.pid: process.usedGpuMemory for kind in kinds for process in ask(nvml, kind, device) or ()}
    found.pop(os.getpid(), None)
    processes = (CardProcess(process_id=pid, name=_name_process(pid), bytes=size) for pid, size in found.items())
    return tuple(sorted(processes, key=lambda process: (-(process.bytes or 0), process.process_id)))


def _name_process(process_id: int) -> str:
    """Return a process's name; empty if it is not ours to know, as of one outside our container."""
    try:
        return psutil.Process(process_id).name()
    except psutil.Error:
        return ""


def _read_uuid(nvml: Any, card: Any) -> str:
    return decode(ask(nvml, nvml.nvmlDeviceGetUUID, card))


def decode(text: str | bytes | None) -> str:
    """Return the text, which older NVML bindings give as bytes; empty for none."""
    return text.decode() if isinstance(text, bytes) else text or ""
