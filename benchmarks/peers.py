"""Our planner beside what people use otherwise: each on the same model, under the same memory limit.

    make bench                             sets up the peers' environment, and runs all cases; about half an hour
    python benchmarks/peers.py llama       those cases whose name begins so; peers are run by .venv-peers/bin/python

Each finder runs in a fresh process, with worst-case rows and AdamW, wants an effective batch of 64, and trains five
steps with what it found. The limit is a memory control group, where an overshoot is a kill; or `ulimit -d`, where it is
an exception, from which the peers can learn. The truth, by doubling and bisection: the most rows with which a plain
training loop lived through five steps under that limit. Prints one table, and writes benchmarks/results/peers-cpu.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plan import CASES, RESULTS, Case, save_model, worst_samples
from rich.console import Console
from rich.table import Table

from autotune.hardware import read_hardware
from trainer.data import write_store

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
GIB = 2**30
EFFECTIVE, STEPS = 64, 5
TIME_LIMIT_SECONDS = 600
NO_CARD = {"CUDA_VISIBLE_DEVICES": ""}
OURS, PLAIN = "chatlm", "plain"
FINDERS = (
    "accelerate, from its 128", "accelerate, from 64", "Lightning power", "Lightning binsearch",
    "Trainer auto_find, from 64", OURS,
)  # fmt: skip

SETTINGS = (
    ("gpt2-256", "control group", 0.9),
    ("llama-512", "control group", 1.0),
    ("llama-256", "control group", 3.0),
    ("llama-256-fp32", "ulimit -d", 1.25),
)
"""Case, what sets the limit, GiB. In the third memory is ample: all 64 rows fit."""


@dataclass
class Row:
    """What came of a finder."""

    case: str
    limit_by: str
    limit_bytes: int
    finder: str
    ended: str
    sizes_tried: list[int]
    steps: int
    """Optimizer steps, whether to search or to train."""
    out_of_memory: int
    """Exceptions for lack of memory that it saw."""
    deaths: int
    found: int | None
    truly_largest: int
    """64 where more would have fitted."""
    effective_asked: int
    effective_got: int | None
    found_seconds: float | None
    seconds: float


class NoLimitError(Exception):
    """No memory limit can be set here."""


@contextmanager
def control_group(limit_bytes: int) -> Iterator[tuple[list[str], Path]]:
    """Make a memory control group, of the version that there is; yield what enters it, and where it is."""
    root = Path("/sys/fs/cgroup")
    second = (root / "cgroup.controllers").exists()
    group = (root if second else root / "memory") / f"chatlm-peers-{os.getpid()}"
    limit, swap = ("memory.max", "memory.swap.max") if second else ("memory.limit_in_bytes", "memory.swappiness")
    try:
        if second:
            (root / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
        (group / limit).write_text(str(limit_bytes))
        if (group / swap).exists():
            (group / swap).write_text("0")
    except OSError as error:
        raise NoLimitError(f"no memory control group can be made here, which takes Linux and root: {error}") from error
    try:
        yield ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")], group
    finally:
        remove(group)


def remove(group: Path) -> None:
    """Remove a group once its last process is gone."""
    end = time.monotonic() + 30
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def count_kills(group: Path) -> int:
    """Count how often the kernel's out-of-memory killer struck in a group."""
    counts = next(file for name in ("memory.events", "memory.oom_control") if (file := group / name).exists())
    return int(dict(line.split() for line in counts.read_text().splitlines())["oom_kill"])


@dataclass
class Ending:
    """What is known of a process that is over."""

    events: list[dict[str, Any]]
    how: str
    deaths: int
    began: float
    seconds: float

    def values(self, event: str) -> list[int]:
        return [e["value"] for e in self.events if e["event"] == event]


def end_of(command: list[str], limit_by: str, limit_bytes: int) -> Ending:
    """Run a command under the limit to its end, whichever that is."""
    if limit_by == "control group":
        with control_group(limit_bytes) as (enter, group):
            ending = watch([*enter, *command])
            ending.deaths = count_kills(group)
            return ending
    return watch(["sh", "-c", 'ulimit -d "$0" && exec "$@"', str(limit_bytes // 1024), *command])


def watch(command: list[str]) -> Ending:
    began = time.time()
    environment = {**os.environ, **NO_CARD, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with subprocess.Popen(command, stdout=out, stderr=err, env=environment) as process:
            try:
                code = process.wait(TIME_LIMIT_SECONDS)
                how = {0: "finished", -9: "killed by signal 9"}.get(code, "failed")
            except subprocess.TimeoutExpired:
                process.kill()
                how = "not done in time"
        seconds = time.time() - began
        out.seek(0)
        err.seek(0)
        if how == "failed":
            how = "failed: " + err.read().decode(errors="replace").strip().splitlines()[-1]
        events = [json.loads(line) for line in out.read().splitlines()]
    return Ending(events, how, int(how == "killed by signal 9"), began, seconds)


def command_of(finder: str, errand: dict[str, Any]) -> list[str]:
    if finder == OURS:
        return [sys.executable, str(HERE / "ours.py"), json.dumps(errand)]
    return [str(PEERS), str(HERE / "finders.py"), finder, json.dumps(errand)]


def prepare(case: Case, folder: Path) -> dict[str, Any]:
    """Write the model, and for us a store of worst-case rows; return what every finder is told."""
    work = save_model(case, folder / "model")
    for name in ("store", "tokenizer", "run"):
        (folder / name).mkdir()
    write_store(worst_samples(work, [1.0] * (STEPS * EFFECTIVE)), folder / "store", work.task, work.vocabulary_size)
    return {
        "model": work.model, "workload": work.model_dump(), "max_seq_len": work.max_seq_len,
        "vocabulary_size": work.vocabulary_size, "precision": work.precision, "folder": str(folder),
        "effective_batch_size": EFFECTIVE, "steps": STEPS,
    }  # fmt: skip


def truly_largest(errand: dict[str, Any], limit_by: str, limit_bytes: int) -> int:
    """Double from four rows until a plain loop does not live, then halve the bracket; at most the effective batch."""

    def lives(rows: int) -> bool:
        return end_of(command_of(PLAIN, {**errand, "size": rows}), limit_by, limit_bytes).how == "finished"

    low, high = 0, 4
    while high <= EFFECTIVE and lives(high):
        low, high = high, 2 * high
    high = min(high, EFFECTIVE + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if lives(middle) else (low, middle)
    return low


def run(case: Case, limit_by: str, limit_bytes: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as temporary:
        errand = prepare(case, Path(temporary))
        truth = truly_largest(errand, limit_by, limit_bytes)
        for finder in FINDERS:
            ending = end_of(command_of(finder, errand), limit_by, limit_bytes)
            yield row_of(ending, case.name, limit_by, limit_bytes, finder, truth)


def row_of(ending: Ending, case: str, limit_by: str, limit_bytes: int, finder: str, truth: int) -> Row:
    found = [event for event in ending.events if event["event"] == "found"]
    searched = ending.events[: ending.events.index(found[0])] if found else ending.events
    rows = [event["value"] for event in searched if event["event"] == "forward"]
    effective = set(ending.values("effective"))
    assert len(effective) <= 1, f"steps of different sizes: {effective}"
    return Row(
        case=case,
        limit_by=limit_by,
        limit_bytes=limit_bytes,
        finder=finder,
        ended=ending.how,
        sizes_tried=[size for i, size in enumerate(rows) if i == 0 or size != rows[i - 1]],
        steps=len(ending.values("step")),
        out_of_memory=len(ending.values("out_of_memory")),
        deaths=ending.deaths,
        found=found[0]["value"] if found else None,
        truly_largest=truth,
        effective_asked=EFFECTIVE,
        effective_got=effective.pop() if effective else None,
        found_seconds=found[0]["at"] - ending.began if found else None,
        seconds=ending.seconds,
    )


def print_table(rows: list[Row]) -> None:
    table = Table()
    for name in ("case", "limit", "finder", "ended", "tried", "steps", "oom", "deaths", "found", "truly", "batch",
                 "found s", "all s"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("case", "limit", "finder", "ended", "tried") else "right")
    for r in rows:
        table.add_row(
            r.case, f"{r.limit_bytes / GIB:.2f} {r.limit_by}", r.finder, r.ended, " ".join(map(str, r.sizes_tried)),
            str(r.steps), str(r.out_of_memory), str(r.deaths), str(r.found or "none"), str(r.truly_largest),
            f"{r.effective_asked} -> {r.effective_got or 'none'}",
            "" if r.found_seconds is None else f"{r.found_seconds:.0f}", f"{r.seconds:.0f}",
        )  # fmt: skip
    Console(width=180).print(table)


def write(rows: list[Row]) -> None:
    """Write what there is, after each case: a run that is cut short leaves something."""
    hardware = read_hardware(Path(), environ=NO_CARD)
    libraries = ("torch", "transformers", "accelerate", "lightning")
    asked = f"from importlib.metadata import version; print(*map(version, {libraries}))"
    versions = subprocess.run([PEERS, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    RESULTS.mkdir(exist_ok=True)
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{hardware.device_name}, {hardware.cores} cores, {platform.system()} {platform.machine()}",
        "versions": dict(zip(libraries, versions, strict=True)),
        "rows": [asdict(r) for r in rows],
    }
    (RESULTS / "peers-cpu.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    wanted = tuple(sys.argv[1:])
    if not PEERS.exists():
        sys.exit(f"{PEERS} is not there: make bench sets it up")
    cases = {case.name: case for case in CASES}
    rows: list[Row] = []
    try:
        for name, limit_by, gib in SETTINGS:
            if not wanted or name.startswith(wanted):
                for row in run(cases[name], limit_by, round(gib * GIB)):
                    rows.append(row)
                    print_table(rows[-1:])
                write(rows)
    except NoLimitError as error:
        sys.exit(str(error))
    print_table(rows)


if __name__ == "__main__":
    main()
