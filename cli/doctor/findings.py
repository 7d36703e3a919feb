"""Facts -> what is wrong or worth knowing: a sentence with its numbers, and the command that mends it. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator

from autotune.plan import CardProcess
from cli.doctor.facts import SHARED_MEMORY, CardFacts, Facts, Finding, Place, Severity
from cli.render.units import gib, rate

GIB = 2**30
MIB = 2**20
FOREIGN_SHARE = 0.1
"""Of a card's memory, held by others, from which on it is told."""
LEAST_CARD_BYTES = GIB
"""Free on a card, below which hardly any step fits: the context alone takes half."""
LEAST_MEMORY_BYTES = GIB
"""Free on the host: a worker takes about a third of it before there is a model."""
SWAP_BYTES = 256 * MIB
LIMITED_SHARE = 0.5
LITTLE_DISK_BYTES = 5 * GIB
NO_DISK_BYTES = GIB
SHARED_BYTES = GIB
"""Of /dev/shm, below which several ranks may not find room in it; docker gives 64 MiB."""
SLOW_SHARE = 0.5
"""Of what our table says that a card does at its vendor's clock: one in order comes nearer on large products."""
HUGE_PAGES_GLIBC = (2, 35)
FIRST_DRIVERS = {11: 450, 12: 525, 13: 580}
"""Of each CUDA: any of its minor versions runs on them. docs.nvidia.com/deploy/cuda-compatibility."""
START = 'the command that pytorch.org, "Get started", gives'
REINSTALL = "pip install --force-reinstall torch"
NAMED = 3
DISPLAY_SERVERS = (
    *("xorg", "x11", "xwayland", "gnome-shell", "gnome-session", "kwin", "plasmashell", "mutter", "weston", "sway"),
    *("hyprland", "cinnamon", "xfwm", "lightdm", "gdm", "sddm", "dwm", "explorer", "csrss", "winlogon"),
)
"""How their names begin, in small letters: whoever ends one ends the session."""


def find(facts: Facts) -> tuple[Finding, ...]:
    """Return all findings, problems first."""
    found = [finding for rule in RULES for finding in rule(facts)]
    return tuple(sorted(found, key=lambda finding: finding.severity != "problem"))


def _problem(name: str, message: str, hint: str) -> Finding:
    return Finding(severity="problem", name=name, message=message, hint=hint)


def _note(name: str, message: str, hint: str) -> Finding:
    return Finding(severity="worth knowing", name=name, message=message, hint=hint)


# The card, its driver and torch: the first of these that holds explains the others.


def _no_driver(facts: Facts) -> Iterator[Finding]:
    if not (facts.driver.card_is_seen and _is_missing(facts.driver.trouble)):
        return
    hint = "install the driver: sudo ubuntu-drivers install, or from nvidia.com/drivers; then restart the machine"
    if facts.software.container:
        hint = "start the container with the card: docker run --gpus all ..."
    elif facts.software.wsl:
        hint = "install NVIDIA's driver in Windows, not in here, then: wsl --shutdown"
    yield _problem(
        "no-driver",
        f"an NVIDIA card is in this machine, and its driver cannot be asked ({facts.driver.trouble})",
        hint,
    )


def _driver_refuses(facts: Facts) -> Iterator[Finding]:
    """Tell of a library that is there and fails, as after an update without a restart."""
    trouble = facts.driver.trouble
    if trouble and not _is_missing(trouble):
        yield _problem(
            "driver-refuses",
            f"the NVIDIA driver cannot be asked for cards ({trouble})",
            "nvidia-smi says more; after an update of the driver, restart the machine: sudo reboot",
        )


def _is_missing(trouble: str) -> bool:
    return "Not Found" in trouble or "not installed" in trouble


def _hidden(facts: Facts) -> Iterator[Finding]:
    visible = facts.visible
    if not facts.cards or facts.hardware.device == "cuda" or visible is None:
        return
    said = f"CUDA_VISIBLE_DEVICES={visible} hides {_cards(facts)}: the processor trains"
    if visible.split(",")[0].strip() in ("", "-1"):
        yield _note("hidden", said, "unset CUDA_VISIBLE_DEVICES, unless that is meant")
    else:
        yield _problem(
            "hidden", f"CUDA_VISIBLE_DEVICES={visible} names none of {_cards(facts)}: the processor trains",
            "export CUDA_VISIBLE_DEVICES=0, or unset it; nvidia-smi -L lists what there is",
        )  # fmt: skip


def _cards(facts: Facts) -> str:
    return f"the {len(facts.cards)} cards here" if len(facts.cards) > 1 else f"the card here, {facts.cards[0].name}"


def _not_usable(facts: Facts) -> Iterator[Finding]:
    if facts.cards and facts.hardware.device == "cpu" and facts.visible is None:
        for note in facts.hardware.notes:
            yield _problem("card-not-used", note, "nvidia-smi says more; a card in MIG mode needs a slice of its own")


def _torch_missing(facts: Facts) -> Iterator[Finding]:
    if not facts.software.versions["torch"]:
        yield _problem("no-torch", "torch is not installed for this Python", f"pip install torch, or {START}")


def _torch_without_cuda(facts: Facts) -> Iterator[Finding]:
    version, driver = facts.software.versions["torch"], facts.driver
    if not version or facts.software.torch_cuda or not (facts.cards or driver.card_is_seen):
        return
    which = f" {_dotted(driver.cuda)} or older" if driver.cuda else ""
    yield _problem(
        "torch-without-cuda",
        f"torch {version} is built without CUDA and cannot use {_cards(facts) if facts.cards else 'the card here'}",
        f"pip uninstall torch, then {START} for CUDA{which}: pip install torch ...",
    )


def _driver_too_old(facts: Facts) -> Iterator[Finding]:
    built, driver = facts.software.torch_cuda, facts.driver
    if not built or driver.cuda is None or int(built.split(".")[0]) <= driver.cuda[0]:
        return
    first = FIRST_DRIVERS.get(int(built.split(".")[0]))
    update = f"update the driver{' in Windows' * facts.software.wsl}{f' to {first} or later' if first else ''}"
    yield _problem(
        "driver-too-old",
        f"the driver, {driver.version}, runs CUDA up to {_dotted(driver.cuda)}, and torch "
        f"{facts.software.versions['torch']} is built for CUDA {built}",
        f"{update}, or pip uninstall torch, then {START} for CUDA {driver.cuda[0]}: pip install torch ...",
    )


def _torch_sees_none(facts: Facts) -> Iterator[Finding]:
    measured = facts.measured
    explained = any(True for rule in (_torch_without_cuda, _driver_too_old) for _ in rule(facts))
    if facts.hardware.device == "cpu" or measured is None or measured.sees_card or explained:
        return
    why = f": {measured.why_not}" if measured.why_not else ""
    yield _problem(
        "torch-sees-no-card",
        f"the driver shows {facts.hardware.device_name}, and torch {facts.software.versions['torch']} sees no card"
        f"{why}",
        'python -c "import torch; torch.cuda.init()" says it alone; restart the machine, or ' + REINSTALL,
    )


def _no_kernels(facts: Facts) -> Iterator[Finding]:
    """Tell of a card that is older than all that torch was built for: every operation on it fails."""
    measured, capability = facts.measured, facts.hardware.compute_capability
    if measured is None or not measured.sees_card or capability is None or not measured.architectures:
        return
    if not any(_runs(architecture, capability) for architecture in measured.architectures):
        yield _problem(
            "no-kernels",
            f"{facts.hardware.device_name} has compute capability {_dotted(capability)}, and torch "
            f"{facts.software.versions['torch']} is built for {', '.join(measured.architectures)}",
            f"pip uninstall torch, then {START} for an older CUDA: pip install torch ...",
        )


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Say whether kernels run on a card: of the same major version, or compiled anew for any later."""
    kind, _, number = architecture.rstrip("af").partition("_")
    if not number.isdecimal():
        return True  # of a kind that we do not know
    built = divmod(int(number), 10)
    return built <= capability and (kind == "compute" or built[0] == capability[0])


def _worker_failed(facts: Facts) -> Iterator[Finding]:
    if facts.worker_failed and facts.software.versions["torch"]:
        yield _problem(
            "worker-failed",
            f"the worker, which loads torch, came to grief: {facts.worker_failed}",
            f'python -c "import torch" shows whether torch is broken; {REINSTALL} mends that',
        )


def _not_measured(facts: Facts) -> Iterator[Finding]:
    if facts.measured is not None and facts.measured.failed:
        yield _problem(
            "not-measured",
            f"{facts.hardware.device_name} could not be measured: {facts.measured.failed}",
            "close other programs that use it, and run chatlm doctor again",
        )


# What is on the card, and how it does.


def _foreign(facts: Facts) -> Iterator[Finding]:
    card = facts.used
    if card is None or not card.memory_total_bytes or card.memory_free_bytes is None:
        return
    held = card.memory_total_bytes - card.memory_free_bytes
    little = card.memory_free_bytes < LEAST_CARD_BYTES
    if held <= FOREIGN_SHARE * card.memory_total_bytes and not little:
        return
    severity: Severity = "problem" if little else "worth knowing"
    ends = [process.process_id for process in card.others[:NAMED] if _may_end(process, card)]
    yield Finding(
        severity=severity,
        name="foreign-processes",
        message=f"other programs hold {gib(held)} of the {gib(card.memory_total_bytes)} of {card.name} "
        f"({held / card.memory_total_bytes:.0%}): {_others(card)}",
        hint=f"close them, or: kill {' '.join(map(str, ends))}"
        if ends
        else "nvidia-smi shows who it is; close what is not needed",
    )


def _may_end(process: CardProcess, card: CardFacts) -> bool:
    """Say whether a process may be ended: the user's, known by name, and not what draws the screen."""
    name = process.name.lower().removesuffix(".exe")
    return bool(name) and process.process_id in card.own_process_ids and not name.startswith(DISPLAY_SERVERS)


def _others(card: CardFacts) -> str:
    named = [_process(process) for process in card.others[:NAMED]]
    more = len(card.others) - len(named)
    return ", ".join(named + [f"{more} more"] * (more > 0)) or "the driver names none of them"


def _process(process: CardProcess) -> str:
    held = f", {gib(process.bytes)}" if process.bytes is not None else ""
    return f"{process.name or 'process'} (pid {process.process_id}{held})"


def _slowed(facts: Facts) -> Iterator[Finding]:
    for card in facts.cards:
        if not card.slowed_by:
            continue
        clock = f" at {card.clock_mhz} of {card.most_clock_mhz} MHz" if card.clock_mhz and card.most_clock_mhz else ""
        heat = f", {card.celsius} degrees Celsius" if card.celsius is not None else ""
        yield _note(
            "slowed",
            f"{card.name} is held down by {', '.join(card.slowed_by)}{clock}{heat}",
            "nvidia-smi -q -d PERFORMANCE,CLOCK,TEMPERATURE,POWER says more; see to its cooling and its power limit",
        )


def _slow_card(facts: Facts) -> Iterator[Finding]:
    if facts.measured is None or facts.table is None:
        return
    precision = facts.precision
    measured, best = facts.measured.matrix_flops.get(precision), facts.table.flops.get(precision)
    if measured and best and measured < SLOW_SHARE * best:
        yield _note(
            "slow-card",
            f"{facts.hardware.device_name} multiplied {precision} matrices at {rate(measured, 'FLOP/s')}, "
            f"{measured / best:.0%} of the {rate(best, 'FLOP/s')} that it can do",
            "is it in use, hot, or limited? nvidia-smi -q -d PERFORMANCE,CLOCK,TEMPERATURE,POWER",
        )


def _slower_precision(facts: Facts) -> Iterator[Finding]:
    rates = facts.measured.matrix_flops if facts.measured else {}
    own, full = rates.get(facts.precision), rates.get("fp32")
    if own is not None and full is not None and own < full:
        yield _note(
            "slower-precision",
            f"{facts.precision}, which the rule takes here, was measured at {rate(own, 'FLOP/s')}, fp32 at "
            f"{rate(full, 'FLOP/s')}",
            "chatlm train --precision fp32 ... is faster, and takes more memory",
        )


def _spills(facts: Facts) -> Iterator[Finding]:
    if facts.cards and (facts.software.wsl or facts.software.windows):
        where = "this Linux runs in Windows (WSL)" if facts.software.wsl else "this is Windows"
        yield _note(
            "spills",
            f"{where}: when the card is full, its driver goes on in main memory, and steps take 10 to 100 times as "
            "long instead of failing",
            'NVIDIA Control Panel, Manage 3D settings: set "CUDA - Sysmem Fallback Policy" to '
            '"Prefer No Sysmem Fallback"',
        )


# The host.


def _little_memory(facts: Facts) -> Iterator[Finding]:
    free = facts.hardware.host_memory_available_bytes
    if free < LEAST_MEMORY_BYTES:
        yield _problem(
            "little-memory",
            f"{gib(free)} of main memory may be used ({facts.hardware.host_memory_limited_by}), a worker alone takes "
            "about 0.3 GiB",
            "close other programs, or give the container or job more memory",
        )


def _swap(facts: Facts) -> Iterator[Finding]:
    host = facts.host
    if host.swap_used_bytes >= SWAP_BYTES:
        yield _note(
            "swap",
            f"{gib(host.swap_used_bytes)} of swap is in use beside {gib(host.memory_total_bytes)} of memory, of which "
            f"{gib(host.memory_available_bytes)} is free: what is swapped in again makes steps slow",
            "close other programs; the largest: ps aux --sort=-rss | head",
        )


def _limited(facts: Facts) -> Iterator[Finding]:
    host = facts.host
    tightest = min(host.limits, key=lambda limit: limit.limit_bytes, default=None)
    if tightest is not None and tightest.limit_bytes < LIMITED_SHARE * host.memory_total_bytes:
        more = int(0.9 * host.memory_total_bytes / GIB)
        yield _note(
            "limited",
            f"a control group allows {gib(tightest.limit_bytes)} of the {gib(host.memory_total_bytes)} of memory: "
            f"{tightest.path}",
            f"if more is meant: docker run --memory {more}g ..., sbatch --mem={more}G ..., or systemd's MemoryMax=",
        )
    limited_by = facts.hardware.host_memory_limited_by
    if limited_by.startswith("ulimit"):
        yield _note(
            "limited",
            f"{limited_by} leaves a process {gib(facts.hardware.host_memory_available_bytes)} of "
            f"{gib(host.memory_available_bytes)} of free memory",
            f"{limited_by} unlimited",
        )


ELSEWHERE = {
    "current folder": "cd to another, or give --output-dir DIR to train",
    "cache folder": "export XDG_CACHE_HOME=DIR, on another disk",
}


def _not_writable(facts: Facts) -> Iterator[Finding]:
    for place in facts.host.places:
        if place.refused:
            yield _problem(
                "not-writable",
                f"the {place.what}, {place.path}, cannot be written ({place.refused})",
                ELSEWHERE[place.what],
            )


def _disk(facts: Facts) -> Iterator[Finding]:
    """Tell of each disk once, whatever is on it."""
    disks: dict[str, list[Place]] = {}
    for place in facts.host.places:
        if place.free_bytes is not None and place.free_bytes < LITTLE_DISK_BYTES:
            disks.setdefault(place.disk or place.path, []).append(place)
    for disk, places in disks.items():
        free = min(place.free_bytes or 0 for place in places)
        severity: Severity = "problem" if free < NO_DISK_BYTES else "worth knowing"
        where = " and ".join(f"the {place.what}, {place.path}," for place in places)
        elsewhere = "; and ".join(ELSEWHERE[place.what] for place in places)
        yield Finding(
            severity=severity,
            name="little-disk",
            message=f"the disk of {where} has {gib(free)} free",
            hint=f"free some: du -xh --max-depth=2 {shlex.quote(disk)} | sort -h | tail; or {elsewhere}",
        )


def _shared_memory(facts: Facts) -> Iterator[Finding]:
    shared = facts.host.shared_memory_bytes
    if shared is not None and shared < SHARED_BYTES and len(facts.cards) > 1:
        yield _note(
            "shared-memory",
            f"{SHARED_MEMORY} has {shared / MIB:,.0f} MiB, which several ranks ({len(facts.cards)} cards are here) may "
            "find too small",
            f"docker run --shm-size=1g ..., or: sudo mount -o remount,size=1G {SHARED_MEMORY}",
        )


def _threads(facts: Facts) -> Iterator[Finding]:
    asked, cores = facts.environment.get("OMP_NUM_THREADS", ""), facts.hardware.cores
    if asked.isdecimal() and 0 < int(asked) < cores:
        yield _note(
            "threads",
            f"OMP_NUM_THREADS={asked} keeps torch to {asked} of the {cores} cores that it may use",
            f"unset OMP_NUM_THREADS, or: export OMP_NUM_THREADS={cores}",
        )


HARMFUL: dict[str, tuple[Callable[[str], bool], str]] = {
    "CUDA_LAUNCH_BLOCKING": (lambda v: v not in ("", "0"), "makes the host wait for each kernel: far slower steps"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (lambda v: v not in ("", "0"), "has tensors allocated anew: far slower steps"),
    "TORCHDYNAMO_DISABLE": (lambda v: v not in ("", "0"), "keeps torch.compile from being used"),
    "TORCH_COMPILE_DISABLE": (lambda v: v not in ("", "0"), "keeps torch.compile from being used"),
    "NVIDIA_TF32_OVERRIDE": (lambda v: v != "", "changes how fp32 matrices are multiplied: other numbers in a run"),
    "ATEN_CPU_CAPABILITY": (lambda v: v != "", "keeps torch from the processor's best instructions"),
    "ONEDNN_MAX_CPU_ISA": (lambda v: v not in ("", "ALL", "DEFAULT"), "keeps the processor's best instructions unused"),
    "LD_PRELOAD": (
        lambda v: any(name in v for name in ("malloc", "hoard")),
        "brings an allocator of its own: chatlm's settings of glibc's have no effect, and peaks may pass the plan",
    ),
    "MALLOC_ARENA_MAX": (lambda v: v != "", "changes what a process holds: plan and train with the same value"),
}  # fmt: skip
"""Variables, when they matter, and what they do."""


def _environment(facts: Facts) -> Iterator[Finding]:
    for name, (matters, does) in HARMFUL.items():
        value = facts.environment.get(name, "")
        if matters(value):
            yield _note("environment", f"{name}={value} {does}", f"unset {name}, unless that is meant")


def _compiler(facts: Facts) -> Iterator[Finding]:
    if facts.software.compiler:
        return
    hint = "sudo apt install g++, or your system's own"
    if facts.software.windows:
        hint = 'winget install Microsoft.VisualStudio.2022.BuildTools, with "Desktop development with C++"'
    yield _note("no-compiler", "there is no C++ compiler, so layers are not compiled where that would be faster", hint)


def _glibc(facts: Facts) -> Iterator[Finding]:
    version = facts.software.glibc
    numbers = tuple(int(part) for part in version.split(".") if part.isdecimal()) if version else ()
    if numbers and numbers < HUGE_PAGES_GLIBC and facts.hardware.device == "cpu":
        yield _note(
            "glibc",
            f"glibc {version} is older than 2.35, so huge pages are not used: steps on the processor take 5 to 10 % "
            "longer",
            "a newer system has it: Ubuntu 22.04, Debian 12, or later",
        )


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    *(_no_driver, _driver_refuses, _torch_missing, _torch_without_cuda, _driver_too_old, _torch_sees_none, _no_kernels),
    *(_hidden, _not_usable, _worker_failed, _not_measured, _foreign, _slowed, _slow_card, _slower_precision, _spills),
    *(_little_memory, _swap, _limited, _not_writable, _disk, _shared_memory, _threads, _environment, _compiler, _glibc),
)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
