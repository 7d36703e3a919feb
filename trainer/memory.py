"""What this process holds, at its peak, by /proc or the CUDA allocator; and giving back what its heap merely keeps.

On a CPU the peak is anonymous plus shared memory, what a control group cannot take back: the kernel's high-water mark
of resident memory, which also counts files, less the file pages there were when the mark was set down.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import psutil
import torch

from autotune.plan import CpuAllocator

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
MEMORY_ERRORS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA out of memory",
    "NVML_SUCCESS == r INTERNAL ASSERT",
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN, whose errors tell no more
)
"""What an allocator or a library that could not get its memory writes, when it is no torch.OutOfMemoryError."""


class PeakMeter:
    """Measures the peak since its last reset, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._used_before = _device_used() if device.type == "cuda" else 0
        self._context_peak_bytes = 0
        self._file_bytes = 0
        self.reset()

    def reset(self) -> None:
        """Start a new peak at what is held now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        # Where this is not Linux, or not permitted, the mark only rises, which errs to the safe side.
        with contextlib.suppress(OSError):
            CLEAR_REFS.write_text("5")  # proc(5): resets VmHWM
        self._file_bytes = _status().get("RssFile", 0)

    def peak_bytes(self) -> int:
        """Return the peak on the device: reserved by the allocator plus the context on CUDA, host memory on a CPU."""
        if self.device.type != "cuda":
            return self.host_peak_bytes()
        return int(torch.cuda.max_memory_reserved()) + self._context_bytes()

    def allocated_peak_bytes(self) -> int:
        """Return the peak of what was live: on CUDA less than `peak_bytes`, whose allocator keeps what was freed."""
        if self.device.type != "cuda":
            return self.host_peak_bytes()
        return int(torch.cuda.max_memory_allocated()) + self._context_bytes()

    def host_peak_bytes(self) -> int:
        """Return the peak of anonymous and shared memory of this process."""
        status = _status()
        if not {"VmHWM", "RssAnon", "RssShmem"} <= status.keys():
            return _peak_resident_bytes()
        now = status["RssAnon"] + status["RssShmem"]
        return max(now, status["VmHWM"] - self._file_bytes)

    def held_bytes(self) -> int:
        """Return what is held now, counted as the peak is."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated()) + self._context_bytes()
        status = _status()
        if not {"RssAnon", "RssShmem"} <= status.keys():
            return int(psutil.Process().memory_info().rss)
        return status["RssAnon"] + status["RssShmem"]

    def _context_bytes(self) -> int:
        """What our process takes on the device beyond the allocator: driver context, libraries' workspaces.

        A difference of readings of the whole device, so that other programs move it: the largest counts.
        """
        now = _device_used() - self._used_before - int(torch.cuda.memory_reserved())
        self._context_peak_bytes = max(self._context_peak_bytes, now)
        return self._context_peak_bytes


def trim_heap() -> None:
    """Give the system what was freed but kept by glibc's heap; nothing where there is another."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl
            ctypes.CDLL(None).malloc_trim(0)


def tighten_heap() -> None:
    """Set glibc to the tight setting of `autotune.process` in a process that was started with another. mallopt(3)."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl
            mallopt = ctypes.CDLL(None).mallopt
            for parameter, size in ((M_MMAP_THRESHOLD, 2**20), (M_TRIM_THRESHOLD, 2**20), (M_TOP_PAD, 2**17)):
                mallopt(parameter, size)


def prepare_heap(device: torch.device, allocator: CpuAllocator) -> None:
    """Have a step on a processor begin as small as it can, under glibc's tight setting.

    What is below that setting's threshold stays with the heap when it is freed, because something small lies above: up
    to a fifth of the peak where micro-batches are of many lengths, on which the tensors of a long one would then come.
    """
    if device.type == "cpu" and allocator == "tight":
        trim_heap()


def _peak_resident_bytes() -> int:
    """Return the most that was ever resident, files included: macOS and Windows say no more."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_used() -> int:
    """Return the bytes in use on the device by everyone; NVML's reading, which needs no context of ours."""
    try:
        return int(torch.cuda.device_memory_used())
    except Exception:  # noqa: BLE001 # pynvml missing, or its errors, which share no base class with torch's
        return 0


def _status() -> dict[str, int]:
    """Return the sizes of /proc/self/status in bytes, by name; empty where there is no such file."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return {}
    return {
        name: int(value.split()[0]) * 1024
        for name, _, value in (line.partition(":") for line in lines)
        if value.endswith(" kB")
    }


def is_memory_error(error: BaseException) -> bool:
    """Say whether an error is that of an allocator, or of a library, that could not get its memory."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(m in text for m in MEMORY_ERRORS)


def first_line(error: BaseException) -> str:
    """Return what an error says, on a line."""
    return (str(error) or type(error).__name__).splitlines()[0]
