"""Workers that misbehave, and planners that are killed: an answer in time that says what happened, nothing left."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
from micro import Command, make_home
from misbehaving import MIB, WAYS
from test_measure import errand
from test_planner import PROCESSOR
from tiers import FULL, some, trials

from autotune import measure, process
from autotune.errors import MachineError
from autotune.measure import trace_sizes, try_size
from autotune.process import WorkerCrashedError, ask
from cli import planning
from cli.planning import look_at_data
from profiles import resolve

HERE = Path(__file__).parent
LIMIT, PATIENCE = 6.0, 1.0
"""Seconds that a dry step may take here, and without any sign of life."""
ENDLESS = ("computes without end", "speaks without end")
"""What is taken for work where data is looked at, which may take hours, and be told of."""
FREED = "leaves a child that is free"
SAYS: dict[str, type | str] = {
    **dict.fromkeys(WAYS, WorkerCrashedError),
    **dict.fromkeys(("dies at once", "dies with its errand"), "killed"),
    **dict.fromkeys(ENDLESS, "timed_out"),
    **dict.fromkeys(("shouts on stderr", "shouts lines on stdout"), "completed"),
    "memory without a word": "out_of_memory",
    "an error without a word": MachineError,
}
"""What each has to be taken for."""


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    make_home(place)
    return place


@pytest.mark.parametrize("way", some([way for way in WAYS if way != FREED], 19))
def test_a_worker_that_misbehaves_is_taken_for_what_it_is(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell: Any
) -> None:
    """As a dry step, a trace, and where it looks at data; no process, descriptor or file is left of it."""
    monkeypatch.setattr(process, "COMMAND", (sys.executable, str(HERE / "misbehaving.py"), way))
    monkeypatch.setattr(measure, "SILENT_SECONDS", PATIENCE)
    monkeypatch.setattr(planning, "SILENT_SECONDS", PATIENCE)
    monkeypatch.setattr(measure, "TIME_LIMIT_SECONDS", limit_of(way) / 3)
    monkeypatch.setenv("MUCH", str(trials(50, 10 * 1024) * MIB if "shouts" in way else 0))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    gc.collect()
    before, held = descriptors(), peak_bytes(anew=True)
    errands = [dry_step, trace] if way in ENDLESS else [dry_step, trace, data]
    rounds = trials(1, 3)
    for one in errands * rounds:
        began = time.monotonic()
        one(way)
        assert time.monotonic() - began < limit_of(way) + 15
    assert peak_bytes() - held < 200 * MIB
    assert alive_with(str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []
    gc.collect()
    assert descriptors() <= before
    tell(len(errands) * rounds)


def test_what_a_worker_has_set_free_before_it_ended_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell: Any
) -> None:
    """It holds our pipes in a session of its own: nobody knows whose it was, and it stays."""
    monkeypatch.setattr(process, "COMMAND", (sys.executable, str(HERE / "misbehaving.py"), FREED))
    monkeypatch.setattr(process, "GONE_SECONDS", 0.5)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(WorkerCrashedError, match="exit code 0"):
        list(ask(errand(2), 1))
    assert time.monotonic() - began < 15
    (child,) = alive_with(str(tmp_path))
    child.kill()
    tell(1)


def dry_step(way: str) -> None:
    found, expected = outcome(way), SAYS[way]
    assert found == expected if isinstance(expected, str) else isinstance(found, expected), found


def trace(way: str) -> None:
    """None can be had; but a user's mistake is told."""
    with pytest.raises(MachineError) if SAYS[way] is MachineError else nullcontext():
        assert trace_sizes([errand(2).workload], PROCESSOR, (1,)) == []


def data(way: str) -> None:
    """No answer is one, not even a dry step's."""
    with pytest.raises((WorkerCrashedError, MachineError)):
        look_at_data(resolve({}, None, None).settings, 1, demo=False)


def limit_of(way: str) -> float:
    return 120.0 if "shouts" in way else LIMIT


def outcome(way: str) -> Any:
    try:
        return try_size(errand(2), PROCESSOR, time_limit_seconds=limit_of(way)).outcome
    except (WorkerCrashedError, MachineError) as error:
        return error


def peak_bytes(*, anew: bool = False) -> int:
    """The most that this process has held, perhaps from now on."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def alive_with(words: str) -> list[psutil.Process]:
    """Processes, but zombies, of whose command or environment one is these words."""
    found = []
    for one in psutil.process_iter():
        try:
            said = [*one.cmdline(), *one.environ().values()]
            if one.pid != os.getpid() and one.status() != psutil.STATUS_ZOMBIE and words in said:
                found.append(one)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.parametrize("way", some(["segfault", "garbage", "exit", "stop"], 1))
def test_where_dry_steps_cannot_be_taken_a_plan_says_that_it_is_an_estimate(
    way: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell: Any
) -> None:
    """And a training does not begin."""
    monkeypatch.setenv("PYTHONPATH", str(HERE / "struck"))
    monkeypatch.setenv("DRY_STEPS", way)
    command = Command(tmp_path, home)
    done = command("plan", "--no-cache")
    assert done.returncode == 0, done.stderr
    assert "so nothing was measured: this is an estimate" in done.stderr
    assert "Estimated by the trace alone" in done.stdout
    assert "Traceback" not in done.stderr.partition("so nothing was measured")[2]
    done = command("train", "--auto", "--no-cache", "--output-dir", "run")
    assert done.returncode == 70, done.stderr
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
    tell(2)


def test_a_planner_that_is_killed_leaves_no_process(home: Path, tmp_path: Path, tell: Any) -> None:
    """At any moment of a plan: as it imports, tokenizes, traces, takes dry steps; all are gone within 2 s."""
    random.seed(8)
    command, count = Command(tmp_path, home), trials(2, 50)
    began = time.monotonic()
    assert command("plan", "--no-cache").returncode == 0
    whole = time.monotonic() - began
    for trial in range(count):
        mark = f"planner-{os.getpid()}-{trial}"
        with subprocess.Popen(
            command.arguments("plan", "--no-cache", "--seed", trial), cwd=tmp_path,
            env=command.environment | {"MARK": mark},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as planner:  # fmt: skip
            time.sleep(random.random() * whole)
            planner.kill()
        end = time.monotonic() + 2
        while left := alive_with(mark):
            assert time.monotonic() < end, left
            time.sleep(0.05)
    tell(count)


def test_many_workers_leave_nothing(monkeypatch: pytest.MonkeyPatch, tell: Any) -> None:
    """Memory, threads and descriptors of the supervisor stay what they were."""
    monkeypatch.setattr(process, "COMMAND", (sys.executable, str(HERE / "misbehaving.py"), "segfaults"))
    me = psutil.Process()

    def one() -> None:
        with pytest.raises(WorkerCrashedError):
            list(ask(errand(2), 1))

    for _ in range(5):
        one()
    gc.collect()
    before = (descriptors(), me.num_threads(), me.memory_info().rss)
    count = 200 if FULL else 20
    for _ in range(count):
        one()
    gc.collect()
    assert descriptors() == before[0]
    assert me.num_threads() == before[1]
    assert me.memory_info().rss - before[2] < 8 * MIB
    tell(count)
