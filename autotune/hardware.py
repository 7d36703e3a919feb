"""Reads what the machine has and has free: its card by `cards`, the host by psutil, control groups, limits, and disk.

No torch. What cannot be read is no limit: without a card the device is the CPU, without /proc or resource limits
the system's own figures count.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import psutil

from autotune.cards import Look, find_card, read_card
from autotune.errors import MachineError
from autotune.plan import Hardware

PROCESS = Path("/proc/self")
NO_LIMIT_BYTES = 2**62
"""Version 1 of the control groups says "no limit" with a number of about 2**63."""


class GroupLimit(NamedTuple):
    """A memory limit that a control group sets, and what it leaves."""

    path: str
    """The group's directory, where people can look."""
    available_bytes: int
    limit_bytes: int


class HostMemory(NamedTuple):
    """What the host has, what one more process may take of it, and which limit says so."""

    total_bytes: int
    available_bytes: int
    limited_by: str


def read_hardware(
    output_dir: Path, world_size: int = 1, nvml: Any = None, environ: Mapping[str, str] = os.environ
) -> Hardware:
    """Read the visible CUDA device, else the CPU, and the host's memory, cores and disk, all in bytes.

    So many ranks take a device each: what is read is the one with the least memory free, and each has its share of the
    cores, and of the memory where all have that of the host. `nvml` has the interface of the module pynvml, which is
    the default. Raises `MachineError` if there is no disk to write `output_dir` to, or too few cards for the ranks.
    """
    hardware = _tie(_weakest(environ.get("CUDA_VISIBLE_DEVICES"), world_size, nvml), world_size, output_dir)
    share = {"cores": max(1, hardware.cores // world_size)}
    if hardware.device == "cpu":
        share["device_memory_free_bytes"] = hardware.device_memory_free_bytes // world_size
    return hardware.model_copy(update=share)


def _weakest(visible: str | None, world_size: int, nvml: Any) -> Look:
    """Look at the first visible cards, one for each rank; return the one with the least memory free."""
    if world_size == 1:
        return read_card(visible, nvml)
    entries = [str(i) for i in range(world_size)] if visible is None else visible.split(",")
    looks = [read_card(entry, nvml) for entry in entries[:world_size]]
    cards = [look for look in looks if look.card is not None]
    if cards and len(cards) < world_size:
        why = next((look.notes[0] for look in looks if look.card is None and look.notes), "no other is visible")
        raise MachineError(
            f"{world_size} ranks take {world_size} cards, {len(cards)} can be used: {why}",
            f"give --ranks {len(cards)}, or see CUDA_VISIBLE_DEVICES",
        )
    return min(cards, key=_free_bytes) if cards else looks[0]


def _free_bytes(look: Look) -> int:
    assert look.card is not None
    return look.card.memory.free_bytes if look.card.memory else sys.maxsize


def imagine_hardware(card: str, world_size: int, output_dir: Path) -> Hardware:
    """Return this host with so many of a card that need not be there, by the name in `cards.toml`, nothing on it.

    Raises ConfigurationError for a name that is not in the table.
    """
    return _tie(Look(find_card(card), ()), world_size, output_dir)


def read_host_memory(process: Path = PROCESS) -> HostMemory:
    """Read what the system, the control groups above us and our resource limits leave; the least counts.

    Swap counts as nothing. `process` is our directory under /proc.
    """
    system = psutil.virtual_memory()
    groups = [group for group in read_control_group_limits(process) if group.limit_bytes < system.total]
    rooms = [(system.available, "free memory")]
    rooms += [(group.available_bytes, f"control group {group.path}") for group in groups]
    rooms += _read_resource_limits(process)
    available, limited_by = min(rooms, key=itemgetter(0))
    total = min([system.total, *(group.limit_bytes for group in groups)])
    return HostMemory(total, available, limited_by)


def read_control_group_limits(process: Path = PROCESS, seen_from: Path | None = None) -> list[GroupLimit]:
    """Read the memory limits of our control groups, from our own upwards; a group without one is left out.

    Of another process they are read where `seen_from`, which is ours, has them mounted: its own mounts may be another
    container's.

    Available is the limit less what the group holds and the kernel could not drop. What lies above the mount
    point, as outside a container, is not seen.
    docs.kernel.org/admin-guide/cgroup-v2.html, docs.kernel.org/admin-guide/cgroup-v1/memory.html.
    """
    limits = (_read_group_limit(directory) for directory in _find_groups("memory", process, seen_from or process))
    return [limit for limit in limits if limit]


def count_memory_kills(process: Path = PROCESS) -> int:
    """Count the processes that the kernel has killed for memory in our control group; 0 where it does not tell."""
    for directory in _find_groups("memory", process):
        for name in ("memory.events", "memory.oom_control"):  # of version 2, and of version 1
            if found := re.search(r"^oom_kill (\d+)$", _read_text(directory / name), re.MULTILINE):
                return int(found[1])
    return 0


def count_cores(process: Path = PROCESS) -> int:
    """Count the processor cores that affinity and the tightest control group let us use; at least 1.

    A quota is rounded down. Where affinity cannot be read, all cores of the machine count.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = (_read_core_quota(directory) for directory in _find_groups("cpu", process))
    return max(1, min([allowed or 1, *(quota for quota in quotas if quota is not None)]))


def name_processor(cpuinfo: str) -> str:
    """Return the model name in the text of /proc/cpuinfo, else what the platform knows, else "CPU"."""
    found = re.search(r"^model name\s*:\s*(\S.*)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or "CPU"


def multiplies_bf16(cpuinfo: str) -> bool:
    """Say whether the processor of that /proc/cpuinfo has bf16 arithmetic; not if it is empty."""
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    return found is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(found[1].split())


def _tie(look: Look, world_size: int, output_dir: Path) -> Hardware:
    """Make one of the card, or else the processor, and its host, with whom it may share its memory."""
    host, cpuinfo, card = read_host_memory(), _read_text(Path("/proc/cpuinfo")), look.card
    own = card.memory if card else None
    return Hardware(
        device="cuda" if card else "cpu",
        device_name=card.name if card else name_processor(cpuinfo),
        world_size=world_size,
        local_world_size=world_size,
        device_memory_total_bytes=own.total_bytes if own else host.total_bytes,
        device_memory_free_bytes=own.free_bytes if own else host.available_bytes,
        host_memory_total_bytes=host.total_bytes,
        host_memory_available_bytes=host.available_bytes,
        host_memory_limited_by=host.limited_by,
        disk_free_bytes=_read_free_disk(output_dir),
        cores=count_cores(),
        compute_capability=card.compute_capability if card else None,
        fast_bf16=card.fast_bf16 if card else multiplies_bf16(cpuinfo),
        others=card.others if card else (),
        notes=look.notes,
    )


def _read_free_disk(output_dir: Path) -> int:
    """Read the bytes that we may write to the disk of the nearest parent that exists."""
    path = output_dir.absolute()
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    raise MachineError(f"no disk holds {path}", "choose another output directory")


def _read_resource_limits(process: Path) -> list[tuple[int, str]]:
    """Read what our own resource limits leave one process: of addresses and of data. getrlimit(2)."""
    if sys.platform == "win32":
        return []
    import resource

    status = _read_text(process / "status")
    rooms = []
    for limit, field, name in (("RLIMIT_AS", "VmSize", "ulimit -v"), ("RLIMIT_DATA", "VmData", "ulimit -d")):
        soft, _ = resource.getrlimit(getattr(resource, limit))
        if soft != resource.RLIM_INFINITY:
            rooms.append((max(0, soft - _find_kilobytes(status, field)), name))
    return rooms


def _find_kilobytes(status: str, field: str) -> int:
    """Find a size, in bytes, in the text of /proc/self/status; 0 where there is none, as on macOS."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _read_group_limit(directory: Path) -> GroupLimit | None:
    """Read the limit of one group of either version; a file that is not there sets none."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    sizes = [size for name in names if (size := _read_size(directory / name)) is not None]
    limit = min(sizes, default=NO_LIMIT_BYTES)
    if limit >= NO_LIMIT_BYTES:
        return None
    return GroupLimit(str(directory), max(0, limit - _read_held(directory)), limit)


def _read_held(directory: Path) -> int:
    """Read the bytes that a group of either version and its children hold, less inactive page cache."""
    usage = _read_size(directory / "memory.current") or _read_size(directory / "memory.usage_in_bytes") or 0
    stat = dict(line.split(" ", 1) for line in _read_text(directory / "memory.stat").splitlines())
    # In version 1 the plain figure leaves out the children, in version 2 there is no other.
    reclaimable = stat.get("total_inactive_file", stat.get("inactive_file", "0"))
    return max(0, usage - int(reclaimable))


def _read_core_quota(directory: Path) -> int | None:
    """Read the whole cores that a group of either version may use; None without a quota."""
    names = ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")  # only one version's are there
    fields = " ".join(_read_text(directory / name) for name in names).split()
    if len(fields) < 2 or fields[0] in ("max", "-1"):
        return None
    return int(fields[0]) // int(fields[1])


def _find_groups(controller: str, process: Path, seen_from: Path | None = None) -> Iterator[Path]:
    """Find the directories of our groups, of either version, each followed by its ancestors."""
    for line in _read_text(process / "cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        # The line of version 2 names no controller.
        for hierarchy in {controller, ""}.intersection(controllers.split(",")):
            yield from _walk_up(PurePosixPath(group), list(_find_mounts(hierarchy, seen_from or process)))


def _find_mounts(hierarchy: str, process: Path) -> Iterator[tuple[PurePosixPath, Path]]:
    """Find the mounts of a hierarchy, version 2 having no name: the group at its root, and the mount point.

    proc_pid_mountinfo(5).
    """
    for line in _read_text(process / "mountinfo").splitlines():
        where, _, what = line.partition(" - ")
        root, point = (_unescape(field) for field in where.split(" ")[3:5])
        kind, *_, options = what.split(" ")
        names = {"cgroup": options.split(","), "cgroup2": [""]}.get(kind, [])
        if hierarchy in names:
            yield PurePosixPath(root), Path(point)


def _walk_up(group: PurePosixPath, mounts: list[tuple[PurePosixPath, Path]]) -> list[Path]:
    """Return the directories of a group and its ancestors, up to the mount that shows the most of them.

    A group beneath none, as when a namespace hides where it is, is read as the first mount point itself.
    """
    above = [mount for mount in mounts if _lies_beneath(group, mount[0])]
    if not above:
        return [point for _, point in mounts[:1]]
    root, point = min(above, key=lambda mount: len(mount[0].parts))
    inner = group.relative_to(root)
    return [point / step for step in (inner, *inner.parents)]


def _lies_beneath(group: PurePosixPath, root: PurePosixPath) -> bool:
    # "/../other" is how the kernel shows a group outside our namespace.
    return group.is_relative_to(root) and ".." not in group.relative_to(root).parts


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _read_size(path: Path) -> int | None:
    """Read a number; None if it is "max" or cannot be read."""
    text = _read_text(path).strip()
    return int(text) if text.isdecimal() else None


def _read_text(path: Path) -> str:
    """Read a file of the kernel's; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
