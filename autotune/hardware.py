"""Reads what the machine has and has free: NVML, psutil, control groups, disk.

No torch, and CUDA is never initialised, so that reading costs no device memory. What cannot be read is no
limit: without NVML the device is the CPU, without /proc or resource limits the system's own figures count.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import psutil

from autotune.errors import ConfigurationError, MachineError
from autotune.plan import Device, Hardware

PROCESS = Path("/proc/self")
CARDS = Path(__file__).with_name("cards.toml")
USABLE_SHARE = 0.979
"""Of a card's memory, what a program finds free on one that does nothing else: 19.58 of 20 GiB on an RTX 3080."""
BF16_CAPABILITY = (8, 0)
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


class DeviceFacts(NamedTuple):
    """The device that would train."""

    kind: Device
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None
    fast_bf16: bool


def read_hardware(
    output_dir: Path, world_size: int = 1, nvml: Any = None, environ: Mapping[str, str] = os.environ
) -> Hardware:
    """Read the first visible CUDA device, else the CPU, and the host's memory, cores and disk, all in bytes.

    `nvml` has the interface of the module pynvml, which is the default. `world_size` is only recorded: the
    device is the first rank's. Raises `MachineError` if there is no disk to write `output_dir` to.
    """
    host = read_host_memory()
    device = _read_cuda_device(nvml, environ.get("CUDA_VISIBLE_DEVICES")) or _read_cpu(host)
    return Hardware(
        device=device.kind,
        device_name=device.name,
        world_size=world_size,
        device_memory_total_bytes=device.total_bytes,
        device_memory_free_bytes=device.free_bytes,
        host_memory_total_bytes=host.total_bytes,
        host_memory_available_bytes=host.available_bytes,
        host_memory_limited_by=host.limited_by,
        disk_free_bytes=_read_free_disk(output_dir),
        cores=count_cores(),
        compute_capability=device.compute_capability,
        fast_bf16=device.fast_bf16,
    )


def imagine_hardware(card: str, world_size: int, output_dir: Path) -> Hardware:
    """Return this host with so many of a card that need not be there, by the name in `cards.toml`, nothing on it.

    Raises ConfigurationError for a name that is not in the table.
    """
    cards = tomllib.loads(CARDS.read_text(encoding="utf-8"))["cards"]
    name = next((known for known in cards if _plain(known) == _plain(card)), None)
    if name is None:
        near = get_close_matches(card, cards, n=3, cutoff=0.4)
        raise ConfigurationError(f"no card {card!r} in the table", f"did you mean {', '.join(near or cards)}?")
    host, total = read_host_memory(), cards[name]["memory_mib"] * 2**20
    major, minor = cards[name]["capability"]
    return Hardware(
        device="cuda",
        device_name=name,
        world_size=world_size,
        device_memory_total_bytes=total,
        device_memory_free_bytes=round(USABLE_SHARE * total),
        host_memory_total_bytes=host.total_bytes,
        host_memory_available_bytes=host.available_bytes,
        host_memory_limited_by=host.limited_by,
        disk_free_bytes=_read_free_disk(output_dir),
        cores=count_cores(),
        compute_capability=(major, minor),
        fast_bf16=(major, minor) >= BF16_CAPABILITY,
    )


def _plain(name: str) -> str:
    """Return a card's name as people mean it: case, spaces and the maker's words do not matter."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


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


def read_control_group_limits(process: Path = PROCESS) -> list[GroupLimit]:
    """Read the memory limits of our control groups, from our own upwards; a group without one is left out.

    Available is the limit less what the group holds and the kernel could not drop. What lies above the mount
    point, as outside a container, is not seen.
    docs.kernel.org/admin-guide/cgroup-v2.html, docs.kernel.org/admin-guide/cgroup-v1/memory.html.
    """
    limits = (_read_group_limit(directory) for directory in _find_groups("memory", process))
    return [limit for limit in limits if limit]


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


def _read_cpu(host: HostMemory) -> DeviceFacts:
    cpuinfo = _read_text(Path("/proc/cpuinfo"))
    return DeviceFacts(
        "cpu",
        name_processor(cpuinfo),
        host.total_bytes,
        host.available_bytes,
        None,
        multiplies_bf16(cpuinfo),
    )


def _read_cuda_device(nvml: Any, visible: str | None) -> DeviceFacts | None:
    """Read the first device visible to CUDA; None if there is none, or NVML is missing or fails."""
    entry = "0" if visible is None else visible.split(",")[0].strip()
    if entry in ("", "-1") or (nvml := nvml or _import_nvml()) is None:
        return None
    try:
        nvml.nvmlInit()
        try:
            handle = _find_device(nvml, entry)
            return None if handle is None else _read_device(nvml, handle)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:
        return None


def _import_nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def _find_device(nvml: Any, entry: str) -> Any:
    """Find the device that an entry of CUDA_VISIBLE_DEVICES names, None if it names none.

    A number is an index in the order of PCI bus ids, NVML's and, under CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA's.
    All else is the beginning of one device's UUID. Slices of a card (`MIG-...`) are not looked for.
    docs.nvidia.com/cuda/cuda-c-programming-guide, "CUDA Environment Variables".
    """
    if entry.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(entry))
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    named = [handle for handle in handles if _decode(nvml.nvmlDeviceGetUUID(handle)).startswith(entry)]
    return named[0] if len(named) == 1 else None


def _read_device(nvml: Any, handle: Any) -> DeviceFacts:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    name = _decode(nvml.nvmlDeviceGetName(handle))
    return DeviceFacts("cuda", name, memory.total, memory.free, (major, minor), (major, minor) >= BF16_CAPABILITY)


def _decode(text: str | bytes) -> str:
    """Return the text, which older NVML bindings give as bytes."""
    return text.decode() if isinstance(text, bytes) else text


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


def _find_groups(controller: str, process: Path) -> Iterator[Path]:
    """Find the directories of our groups, of either version, each followed by its ancestors."""
    for line in _read_text(process / "cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        # The line of version 2 names no controller.
        for hierarchy in {controller, ""}.intersection(controllers.split(",")):
            yield from _walk_up(PurePosixPath(group), list(_find_mounts(hierarchy, process)))


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
