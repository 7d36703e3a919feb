"""What is known of a machine before anything is said of it: frozen facts, each with where it was read."""

from __future__ import annotations

from typing import Literal

from autotune.errands import Probed
from autotune.plan import CardProcess, Fact, Hardware, Precision

SCHEMA = "chatlm.doctor/1"
SHARED_MEMORY = "/dev/shm"  # noqa: S108 # a place that is looked at, and not written to
Severity = Literal["problem", "worth knowing"]


class Software(Fact):
    """What is installed."""

    versions: dict[str, str]
    """Of packages and Python, by name; empty where one is not installed."""
    torch_cuda: str | None
    """The CUDA that torch was built for; None for a build that knows the processor alone."""
    system: str
    glibc: str | None
    wsl: bool
    """Whether this Linux runs inside Windows."""
    windows: bool
    container: str
    """The kind; empty outside one."""
    compiler: bool
    """Whether there is a C++ compiler."""


class Limit(Fact):
    """What a control group sets."""

    path: str
    limit_bytes: int
    available_bytes: int


class Place(Fact):
    """A folder that is written to, or its nearest parent that exists."""

    what: Literal["current folder", "cache folder"]
    path: str
    disk: str
    """Where its disk is mounted; empty where that cannot be told."""
    free_bytes: int | None
    """None where it is no disk that could be full, such as /proc, or does not tell."""
    refused: str
    """Why it cannot be written; empty where it can."""


class Host(Fact):
    """The machine around the card."""

    processor: str
    features: tuple[str, ...]
    """Of the processor, those that decide precision and speed."""
    machine_cores: int
    affinity_cores: int
    memory_total_bytes: int
    memory_available_bytes: int
    """What the system says, whatever limits us."""
    limits: tuple[Limit, ...]
    """Of control groups, those under the machine's memory."""
    swap_total_bytes: int
    swap_used_bytes: int
    shared_memory_bytes: int | None
    """Of /dev/shm; None where there is none."""
    places: tuple[Place, ...]


class CardFacts(Fact):
    """A card of the machine, whether CUDA is to see it or not."""

    name: str
    memory_total_bytes: int | None
    """None, as the next, where it is not told, or the card shares the host's."""
    memory_free_bytes: int | None
    compute_capability: tuple[int, int] | None
    fast_bf16: bool
    mig: bool
    celsius: int | None
    clock_mhz: int | None
    most_clock_mhz: int | None
    slowed_by: tuple[str, ...]
    others: tuple[CardProcess, ...]
    """Who is on it, the largest first."""
    own_process_ids: tuple[int, ...]
    """Of these, the user's."""


class Driver(Fact):
    """NVIDIA's driver, by its management library."""

    version: str
    """Empty where it cannot be asked."""
    cuda: tuple[int, int] | None
    """The latest that it runs."""
    card_is_seen: bool
    """Whether one is in /dev or on the PCI bus, whatever the library says."""
    trouble: str
    """Why it cannot be asked."""


class TableRates(Fact):
    """What the card of that name does at best, by our table."""

    flops: dict[Precision, float]
    bytes_per_second: float


class Facts(Fact):
    """All of it."""

    made: str
    """The day."""
    software: Software
    host: Host
    driver: Driver
    cards: tuple[CardFacts, ...]
    visible: str | None
    """CUDA_VISIBLE_DEVICES; None where it is not set."""
    hardware: Hardware
    """What a plan would take of all this."""
    precision: Precision
    """That the rule takes here."""
    t5_precision: Precision
    table: TableRates | None
    environment: dict[str, str]
    """Variables that change what we do, without secrets."""
    measured: Probed | None
    """None where the worker that measures came to grief."""
    worker_failed: str
    """How."""
    sources: dict[str, str]
    """Where facts come from, by their names."""

    @property
    def used(self) -> CardFacts | None:
        """The card that would train, where it is known which; a slice of one is not listed."""
        if self.hardware.device == "cpu":
            return None
        return next((card for card in self.cards if card.name == self.hardware.device_name and not card.mig), None)


class Finding(Fact):
    """Something that is wrong, or worth knowing: a sentence with its numbers, and what to do."""

    severity: Severity
    name: str
    message: str
    hint: str
