"""Starts a worker, hands it its errand, streams its events, and knows how it ended; what it is asked is not its affair.

Every worker is started alike: same program, environment and threads, so that what is measured is what will run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

from autotune.errands import Errand
from autotune.errors import KINDS
from autotune.plan import CpuAllocator, Fact

Event = dict[str, Any]

COMMAND = (sys.executable, "-P", "-m", "trainer.worker")
"""-P: a file of the user's that is called trainer.py, in the folder he stands in, is not ours."""
LAUNCH = (*COMMAND[:-1], "trainer.launch")
"""The same for several ranks, of which each is such a worker."""
HOME = Path(__file__).resolve().parent.parent
"""Where our rooms lie: the worker runs the same code as we do."""

MIB = 2**20
HUGE_PAGES = {"GLIBC_TUNABLES": ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), "glibc.malloc.hugetlb=1")))}
"""glibc 2.35 and later asks for huge pages (madvise): fewer page faults, 5 to 10 % of a step, and no more memory."""
ALLOCATORS: dict[CpuAllocator, dict[str, str]] = {
    "fast": {
        "MALLOC_TOP_PAD_": str(256 * MIB),
        "MALLOC_MMAP_THRESHOLD_": str(1024 * MIB),
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        **HUGE_PAGES,
    },
    "tight": {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB), **HUGE_PAGES},
}
"""glibc's settings (mallopt(3)). `fast` keeps what it once had, so that pages are not faulted in again at each step;
`tight` gives every large tensor a mapping of its own, so that the peak is what is live."""

KERNEL_CACHES = {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
"""How many kernels torch (the first) and oneDNN itself keep on a processor, one for each shape that they met.

By default 1024 each, which made runs outgrow their plan: by 160 MiB of 400 in 120 steps of 8 rows of up to 128 tokens,
where it is 40 MiB now, and level. The first costs no time, the second 5 % of a tiny model's.
"""

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ
"""By torchrun, or what is built on it: which says one thread a rank, whatever cores there are."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "true"}
TAIL_BYTES = 4000
"""Of what a worker says on stderr, its last words: all else is read and let go, however much it is."""
MOST_LINES, MOST_LINE_BYTES = 1000, 64 * MIB
"""Events that wait to be read, and how long one may be: a library that shouts on our line fills no memory."""
POLL_SECONDS = 0.02
LEAVING_SECONDS = 10.0
"""That a worker has to end which has nothing more to say."""
GONE_SECONDS = 5.0
"""That a killed process has to give back what it held."""


class Worker:
    """One worker: give it its errand, iterate for its events, then ask how it ended. Leaving the context ends it.

    It starts at once, and imports what it needs while it waits for its errand. What it inherits are descriptors.
    Several ranks are one worker: errand and events go through the first, and `cores` are those of each.
    """

    def __init__(
        self,
        cores: int,
        allocator: CpuAllocator = "fast",
        log: IO[bytes] | None = None,
        inherits: tuple[int, ...] = (),
        ranks: int = 1,
    ) -> None:
        self.allocator = allocator
        self._processes = 1 if ranks == 1 else 1 + ranks
        self._process_ids: list[int] = []
        self._log, self._tail = log, b""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HOME), os.environ.get("PYTHONPATH")))),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as NVML, and so autotune.cards, counts
            **OFFLINE,
            **KERNEL_CACHES,
            **ALLOCATORS[allocator],
            "OMP_NUM_THREADS": str(cores) if LAUNCHED else os.environ.get("OMP_NUM_THREADS", str(cores)),
            "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
            # What compiles beside a worker holds memory that no plan counts.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "CHATLM_PARENT": str(os.getpid()),  # trainer.ties
        }
        self._heard = 0
        self._lines: queue.Queue[bytes | None] = queue.Queue(MOST_LINES)
        # A session (on Windows a group) of its own: Ctrl-C in the terminal reaches us alone, and we tell the worker.
        self._process = subprocess.Popen(
            COMMAND if ranks == 1 else (*LAUNCH, str(ranks)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if log is None else log,
            env=environment,
            start_new_session=True,
            pass_fds=inherits if os.name == "posix" else (),
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self._readers = [threading.Thread(target=self._read, daemon=True)]
        if log is None:
            self._readers.append(threading.Thread(target=self._keep_tail, daemon=True))
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Worker:
        return self

    def give(self, errand: Errand, *, more: bool = False) -> None:
        """Hand over what it was started for; `more` lines may follow."""
        self._began = time.monotonic()
        self.write(errand)
        if not more:
            with contextlib.suppress(BrokenPipeError):
                self._pipe(self._process.stdin).close()

    def write(self, line: Fact) -> None:
        """Hand over one line of what it waits for."""
        stdin = self._pipe(self._process.stdin)
        with contextlib.suppress(BrokenPipeError):  # it died; the exit code tells
            stdin.write(line.model_dump_json(by_alias=True).encode() + b"\n")
            stdin.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._process.wait()
        end = time.monotonic() + GONE_SECONDS
        while self._readers[0].is_alive() and time.monotonic() < end:  # with what nobody asked for any more
            with contextlib.suppress(queue.Empty):
                self._lines.get(timeout=POLL_SECONDS)
        for reader in self._readers:  # a process that it set free may hold a pipe
            reader.join(max(0.0, end - time.monotonic()))
        with contextlib.suppress(BrokenPipeError):
            self._pipe(self._process.stdin).close()

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe

    def _read(self) -> None:
        with self._pipe(self._process.stdout) as pipe:
            while line := pipe.readline(MOST_LINE_BYTES):
                self._heard += 1
                if line.endswith(b"\n"):  # a piece of one that is too long is let go: many of them would fill memory
                    self._lines.put(line)
            self._lines.put(None)

    def _keep_tail(self) -> None:
        with self._pipe(self._process.stderr) as pipe:
            while words := os.read(pipe.fileno(), 16 * TAIL_BYTES):
                self._tail = (self._tail + words)[-TAIL_BYTES:]

    def poll(self, patience: float | None = None) -> Iterator[Event | None]:
        """Yield each event as it comes, and None at every moment between; raises the user's own mistakes.

        Ends the worker, and raises WorkerCrashedError, where it uses no processor time and says nothing for so many
        seconds: it was stopped, or waits for what does not come.
        """
        told, pulse, ended = time.monotonic(), Pulse(), math.inf
        while True:
            if time.monotonic() - told > POLL_SECONDS:
                yield None
                told = time.monotonic()
                if patience is not None and pulse.stands_still(self._signs_of_life, patience):
                    self.kill()
                    raise WorkerCrashedError(f"the worker hangs: it used no processor time for {patience:g} s")
            try:
                line = self._lines.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self._process.poll() is not None:  # all that it wrote is read, and what it started holds the pipe
                    self._end_group()
                    ended = min(ended, time.monotonic())
                    if time.monotonic() - ended > GONE_SECONDS:  # what it set free does so for as long as it lives
                        return
                continue
            if line is None:
                try:
                    self._process.wait(LEAVING_SECONDS)
                except subprocess.TimeoutExpired:
                    self.kill()
                    raise WorkerCrashedError("the worker closed its line to us, and did not end") from None
                return
            event = _parsed(line)
            if event["event"] == "error" and event.get("type") in KINDS:
                raise KINDS[event["type"]](str(event.get("message")), str(event.get("hint", "")))
            yield event

    def events(self) -> Iterator[Event]:
        """Yield each event as it comes."""
        return (event for event in self.poll() if event is not None)

    @property
    def process_id(self) -> int:
        """The worker's process."""
        return self._process.pid

    def held_bytes(self) -> int:
        """Return the most that it, or any of its ranks, holds."""
        if len(self._process_ids) < self._processes:
            self._process_ids = [self._process.pid]
            if self._processes > 1:
                with contextlib.suppress(psutil.Error):
                    self._process_ids += [child.pid for child in psutil.Process(self._process.pid).children()]
        return max(map(held_bytes, self._process_ids))

    def _signs_of_life(self) -> float:
        return self._heard + self.cpu_seconds()

    def cpu_seconds(self) -> float:
        """Return the processor time that it, and all that it started, has used so far."""
        spent = 0.0
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._process.pid)
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    spent += sum(one.cpu_times()[:2])
        return spent

    @property
    def seconds(self) -> float:
        """Since it was given its errand."""
        return time.monotonic() - self._began

    @property
    def exit_code(self) -> int:
        """What it ended with; negative is a signal."""
        return self._process.wait()

    @property
    def was_killed(self) -> bool:
        """Whether it died by signal 9, which on Linux is what an out-of-memory killer sends."""
        return self.exit_code == -getattr(signal, "SIGKILL", 9)

    def interrupt(self) -> None:
        """Ask it to finish its step, save and leave."""
        # Windows has no other signal that a process of another group can take.
        self._process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT))

    def kill(self) -> None:
        """End it at once, with all that it started, and see them gone."""
        if self._process.poll() is not None:
            self._end_group()
            return
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self._process.pid).children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        self._end_group()
        self._process.kill()
        psutil.wait_procs(children, timeout=GONE_SECONDS)

    def _end_group(self) -> None:
        """End what it started, also where it has ended itself: it began a group of its own."""
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def last_words(self) -> str:
        """Return the end of what it wrote to stderr, once it has ended."""
        if self._log is None:
            self._process.wait()
            self._readers[-1].join(GONE_SECONDS)
            return self._tail.decode(errors="replace").strip()
        self._log.flush()
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - TAIL_BYTES))
        return self._log.read().decode(errors="replace").strip()


class Pulse:
    """Whether something still moves, looked at once a second at most."""

    def __init__(self) -> None:
        self._value = 0.0
        self._moved = self._looked = time.monotonic()

    def stands_still(self, read: Callable[[], float], patience: float) -> bool:
        """Say whether what is read has not changed for so many seconds: it falls where one of several ends."""
        now = time.monotonic()
        if now - self._looked < min(1.0, patience / 2):
            return False
        self._looked = now
        if (value := read()) != self._value:
            self._value, self._moved = value, now
        return now - self._moved > patience


class WorkerCrashedError(Exception):
    """A worker ended in a way that no user's mistake explains: a bug, with its last words."""


def ask(
    errand: Errand, cores: int, patience: float | None = None, time_limit_seconds: float = math.inf
) -> Iterator[Event]:
    """Run an errand that ends in a `result` event; yields its events.

    Raises WorkerCrashedError if it ends or hangs without one, or takes longer than it may.
    """
    with Worker(cores) as worker:
        worker.give(errand)
        answered = False
        for event in worker.poll(patience):
            if event is not None:
                answered |= event["event"] == "result"
                yield event
            elif worker.seconds > time_limit_seconds:
                raise WorkerCrashedError(f"the worker was not done after {time_limit_seconds:g} s")
        if not answered:
            raise WorkerCrashedError(f"the worker ended with exit code {worker.exit_code}:\n{worker.last_words()}")


def held_bytes(process_id: int) -> int:
    """Return the anonymous and shared memory that a process holds, 0 where the system does not say."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    sizes = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon", "RssShmem")))
    return sum(int(size.split()[0]) * 1024 for size in sizes.values())


def _parsed(line: bytes) -> Event:
    """Read one line; what is no event of ours (a library that writes to our pipe) is an event of no kind."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {"event": ""}
    return event if isinstance(event, dict) and "event" in event else {"event": ""}
