"""Looks at the machine and at runs, again and again, and gives plain facts. Reads only; a look costs a millisecond.

What grows is read from where it was left; what is slow or hardly changes (folders, process trees) each ten seconds.
"""

from __future__ import annotations

import math
import shutil
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from autotune.gauges import Gauge, Gauges
from autotune.hardware import GroupLimit, read_control_group_limits
from autotune.plan import Plan
from autotune.process import held_bytes
from autotune.remaining import Left
from cli.history import Checkpoint, History, Metrics, find_holder, find_runs
from cli.monitor.curves import Curve
from cli.monitor.facts import (
    CardFacts,
    CheckpointFacts,
    DiskFacts,
    Glance,
    GroupFacts,
    LeftFacts,
    MachineFacts,
    MemoryFacts,
    NoticeFacts,
    RunFacts,
    SwapFacts,
)

SLOW_SECONDS = 10.0
"""Between looks at what is slow to read."""
MOST_RUNS = 4
"""That are shown where none was named."""
LOG_LINES = 20
MOST_CHARACTERS = 1000
"""Of a line of log."""
MOST_CHECKPOINTS = 5
ROUTINE = {
    *("started", "verified", "resumed", "rescheduled", "sampled", "checkpoint", "early_stopping", "plan_against_real"),
    *("finished", "stopped"),
}
"""Events that are as they should be; any other is shown."""
MOMENT_SECONDS = 0.2
"""Between two looks at the processor, at least: how busy it is is a difference."""
KEPT = ("step", "loss", "tokens", "seconds")
PROCESSES = Path("/proc")


class Watched:
    """One run, with what is read of it less often than each second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history = History(folder, KEPT)
        self.processes: tuple[psutil.Process, ...] = ()
        self._curves, self._drawn, self._cuts = self._blank(), 0, 0
        self._checkpoints: list[Checkpoint] = []
        self._notice: NoticeFacts | None = None
        self._events_seen = 0
        self._log: tuple[str, ...] = ()
        self._log_seen = (0, 0.0)

    @staticmethod
    def _blank() -> dict[str, Curve]:
        return {name: Curve() for name in ("loss", "tokens_per_second")}

    def look_slowly(self) -> None:
        """Look for checkpoints, and for processes that came or went."""
        self._checkpoints = self.history.checkpoints()
        holder = self.history.holder
        self.processes = _tree(holder.process_id) if holder and holder.here else ()

    def refresh(self) -> None:
        """Take in what it wrote."""
        self.history.refresh()
        if self.history.holder is None:
            self.processes = ()
        if self._cuts != self.history.cuts:
            self._curves, self._drawn, self._cuts = self._blank(), 0, self.history.cuts
            self._notice, self._events_seen = None, 0
        columns = self.history.columns
        for i in range(self._drawn, len(columns["step"])):
            self._curves["loss"].add(columns["step"][i], columns["loss"][i])
            self._curves["tokens_per_second"].add(columns["step"][i], columns["tokens"][i], columns["seconds"][i])
        self._drawn = len(columns["step"])
        for row in self.history.events[self._events_seen :]:
            if row["event"] not in ROUTINE:
                count = self._notice.count + 1 if self._notice else 1
                self._notice = NoticeFacts(row["event"], int(row["step"]), str(row.get("message", "")), count)
        self._events_seen = len(self.history.events)
        self._read_log()

    def _read_log(self) -> None:
        try:
            there = (self.folder / "log.txt").stat()
        except OSError:
            return
        if self._log_seen != (there.st_size, there.st_mtime):
            self._log_seen = (there.st_size, there.st_mtime)
            told = [line[:MOST_CHARACTERS] for line in self.history.log_lines(2 * LOG_LINES) if line.strip()]
            self._log = tuple(told[-LOG_LINES:])

    def facts(self, now: float) -> RunFacts:
        """Say what is known of it at this moment."""
        history, plan = self.history, self.history.plan
        last: Metrics = history.recent[-1] if history.recent else {}
        checked: Metrics = history.validations[-1] if history.validations else {}
        state = "removed" if self._is_removed() else history.state
        memory = plan.memory if plan else None
        losses = [loss for row in history.validations if (loss := _number(row.get("loss"))) is not None]
        return RunFacts(
            name=history.name,
            folder=str(self.folder),
            state=state,
            process_id=history.holder.process_id if history.holder else None,
            silent_seconds=_age(now, self._written_at()),
            device=plan.hardware.device if plan else None,
            model=plan.workload.model if plan else None,
            step=history.steps,
            total_steps=history.total_steps or None,
            epoch=_number(last.get("epoch")),
            epochs=plan.forecast.epochs if plan and plan.forecast else None,
            left=_left(history.left()) if state == "running" else None,
            loss=_number(last.get("loss")),
            validation_loss=_number(checked.get("loss")),
            validation_step=checked.get("step"),
            best_validation_loss=min(losses, default=None),
            learning_rate=_number(last.get("learning_rate")),
            tokens_per_second=self._speed(),
            model_flops_utilization=self._utilization(),
            peak_memory_bytes=history.peak_memory_bytes or None,
            planned_peak_memory_bytes=(memory.measured_peak_bytes or memory.predicted_peak_bytes) if memory else None,
            memory_budget_bytes=memory.budget_bytes if memory else None,
            checkpoints=tuple(
                CheckpointFacts(found.step, found.bytes, max(0.0, now - found.saved_at))
                for found in reversed(self._checkpoints[-MOST_CHECKPOINTS:])
            ),
            notice=self._notice,
            log=self._log,
            loss_curve=self._curves["loss"].points(),
            tokens_per_second_curve=self._curves["tokens_per_second"].points(),
        )

    def _is_removed(self) -> bool:
        try:
            self.folder.stat()
        except OSError as error:
            return isinstance(error, FileNotFoundError | NotADirectoryError)
        return False

    def _written_at(self) -> float | None:
        for name in ("metrics.jsonl", "plan.json"):
            try:
                return (self.folder / name).stat().st_mtime
            except OSError:
                continue
        return None

    @property
    def ids(self) -> frozenset[int]:
        """Its processes, by number."""
        return frozenset(process.pid for process in self.processes)

    @property
    def plan(self) -> Plan | None:
        """Its plan, where it can be read."""
        return self.history.plan

    def _own_rows(self) -> list[Metrics]:
        """Return the last rows that its process wrote, without its first, which warms up."""
        own = self.history.taken - self.history.started
        rows = list(self.history.recent)[-own:] if own else []
        return rows[1:] if own == len(rows) > 1 else rows

    def _speed(self) -> float | None:
        rows = [
            row for row in self._own_rows() if _number(row.get("seconds")) and _number(row.get("tokens")) is not None
        ]
        return _number(sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)) if rows else None

    def _utilization(self) -> float | None:
        told = ((_number(row.get("model_flops_utilization")), _number(row.get("seconds"))) for row in self._own_rows())
        rows = [(share, seconds) for share, seconds in told if share is not None and seconds]
        taken = sum(seconds for _, seconds in rows)
        return _number(sum(share * seconds for share, seconds in rows) / taken) if rows else None


class Watch:
    """The machine and the runs that were named, else those that run, else the newest. `look` as often as one likes."""

    def __init__(
        self, named: list[str], nvml: Any = None, slow_seconds: float = SLOW_SECONDS, proc: Path = PROCESSES
    ) -> None:
        self._slow_seconds, self._proc = slow_seconds, proc
        self._named, self._gauges = find_runs(named) if named else [], Gauges(nvml)
        self._runs: dict[Path, Watched] = {}
        self._disks: tuple[DiskFacts, ...] = ()
        self._looked_slowly = -math.inf
        self._host, self._cores = socket.gethostname(), psutil.cpu_count() or 1
        psutil.cpu_percent()
        self._began = time.monotonic()
        self._choose()

    def close(self) -> None:
        """Let go of NVML."""
        self._gauges.close()

    def look(self) -> Glance:
        """Return what there is now."""
        slowly = time.monotonic() - self._looked_slowly >= self._slow_seconds
        if slowly:
            self._choose()
        for watched in self._runs.values():
            watched.refresh()
        if slowly:
            self._look_slowly()
            self._looked_slowly = time.monotonic()
        now = time.time()
        return Glance(now, self._machine(), tuple(watched.facts(now) for watched in self._runs.values()))

    def _choose(self) -> None:
        """Begin to watch runs that came; one that is watched stays, so that its end is seen."""
        folders = self._named
        if not folders:
            there = find_runs([])
            seen = [folder for folder in there if folder in self._runs or find_holder(folder) is not None]
            folders = (seen or there[:1])[:MOST_RUNS]
        self._runs = {folder: self._runs.get(folder) or Watched(folder) for folder in folders}

    def _look_slowly(self) -> None:
        for watched in self._runs.values():
            watched.look_slowly()
        self._disks = _disks(self._runs)

    def _machine(self) -> MachineFacts:
        local = [watched for watched in self._runs.values() if watched.processes]
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        processor = psutil.cpu_percent() / 100 if time.monotonic() - self._began >= MOMENT_SECONDS else None
        gauges = self._gauges.read()
        known = frozenset(psutil.pids()) if gauges else frozenset[int]()
        return MachineFacts(
            name=self._host,
            cores=self._cores,
            processor_utilization=processor,
            memory=_memory(memory.total, memory.available, local),
            groups=self._groups(local, memory.total),
            swap=SwapFacts(swap.total, swap.used),
            disks=self._disks,
            gpus=tuple(_card(gauge, local, known, alone=len(gauges) == 1) for gauge in gauges),
            gpu_note=self._gauges.note,
        )

    def _groups(self, local: list[Watched], total: int) -> tuple[GroupFacts, ...]:
        """Return the group that binds each run, once, with all the runs that it binds."""
        found: dict[str, tuple[GroupLimit, list[Watched]]] = {}
        for watched in local or (None,):
            process = self._proc / (str(watched.processes[0].pid) if watched else "self")
            limits = read_control_group_limits(process, seen_from=self._proc / "self")
            binding = [limit for limit in limits if limit.limit_bytes < total]
            if binding:
                tight = min(binding, key=lambda limit: limit.available_bytes)
                found.setdefault(tight.path, (tight, []))[1].extend([watched] if watched else [])
        return tuple(
            GroupFacts(path, _memory(limit.limit_bytes, limit.available_bytes, runs))
            for path, (limit, runs) in found.items()
        )


def _memory(total: int, available: int, runs: list[Watched]) -> MemoryFacts:
    """Divide the host's memory, or a group's, between these runs and others; each process counts once."""
    ids = frozenset[int]().union(*(watched.ids for watched in runs))
    budget = min((watched.plan.memory.host_budget_bytes for watched in runs if watched.plan), default=None)
    return MemoryFacts(total, available, sum(map(held_bytes, ids)) if runs else None, budget)


def _card(gauge: Gauge, local: list[Watched], known: frozenset[int], *, alone: bool) -> CardFacts:
    """Divide what a card holds between the runs and others; the budget is the plan's of the run that is on it.

    Where it is not told who is on it, a run is on the card that is `alone`, and on none of several.
    """
    held = gauge.held_by(frozenset[int]().union(*(watched.ids for watched in local)), known)
    used = gauge.memory_used_bytes
    plans = [
        watched.plan
        for watched in local
        if gauge.is_used_by(watched.ids) or (alone and gauge.held_by(watched.ids, known) is None)
    ]
    budgets = [plan.memory.budget_bytes for plan in plans if plan and plan.hardware.device == "cuda"]
    return CardFacts(
        name=gauge.name,
        shares_host_memory=gauge.shares_host_memory,
        memory_total_bytes=gauge.memory_total_bytes,
        memory_used_bytes=used,
        memory_of_runs_bytes=held,
        memory_of_others_bytes=None if held is None or used is None else max(0, used - held),
        memory_budget_bytes=min(budgets, default=None),
        utilization=gauge.utilization,
        temperature_celsius=gauge.temperature_celsius,
        power_watts=gauge.power_watts,
        power_limit_watts=gauge.power_limit_watts,
        slowed_by=gauge.slowed_by,
    )


def _tree(process_id: int) -> tuple[psutil.Process, ...]:
    """Return a process and all that it started; none where it is gone."""
    try:
        process = psutil.Process(process_id)
        return (process, *process.children(recursive=True))
    except psutil.Error:
        return ()


def _disks(folders: Iterable[Path]) -> tuple[DiskFacts, ...]:
    """Return the disks of runs, each once; that of this folder where there is no run."""
    found: dict[int, DiskFacts] = {}
    for folder in [*folders] or [Path()]:
        try:
            device, usage = folder.stat().st_dev, shutil.disk_usage(folder)
        except OSError:
            continue
        found.setdefault(device, DiskFacts(str(folder), usage.total, usage.free))
    return tuple(found.values())


def _left(left: Left | None) -> LeftFacts | None:
    return LeftFacts(*left) if left is not None and all(map(math.isfinite, left)) else None


def _age(now: float, then: float | None) -> float | None:
    return None if then is None else max(0.0, now - then)


def _number(value: object) -> float | None:
    """Return a number that is one; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
