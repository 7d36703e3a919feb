"""Disks that fill, refuse, or are not what they were taken for: under the real command, and under the rows of a run."""

from __future__ import annotations

import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any
from unittest.mock import patch

import facts
import pytest
import torch
from injected import not_a_number
from micro import Command, losses, make_home, refused
from power import Disk, recorded
from small_runs import going_on, small_errand
from tiers import FULL, some, trials
from traced import FAILED, each_call, inject, needs_strace, strace
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from autotune.errands import Train
from autotune.errors import MachineError, RunExistsError
from cli.lock import hold
from cli.runs import write_run
from profiles import resolve
from trainer import worker
from trainer.model import save_model
from trainer.rows import RowFile
from trainer.ties import ERRAND_FILE

CHINESE = "目录"
NAMES = {
    "what a screen would show as something else": ":fire: [bold]a\tb\rc\x08\x0b",
    "blanks and quotes": 'it\'s a "run" of  mine',
    "what a shell would run": "$(touch ran) `touch ran`; touch ran & #",
    "a line break": "one\ntwo",
    "like an option": "-rf",
    "Chinese": CHINESE * 20,
    "255 bytes": "n" * 255,
    "255 bytes of Chinese": CHINESE * 42 + "abc",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    make_home(place)
    return place


@pytest.fixture
def command(tmp_path: Path, home: Path) -> Command:
    return Command(tmp_path, home)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield place
    subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("name", some(list(NAMES), 1))
def test_a_folder_may_be_called_anything(name: str, command: Command, tmp_path: Path, tell: Any) -> None:
    """And the command that goes on, run by a shell, is that of this folder and runs nothing else."""
    folder = NAMES[name]
    with command.begun("train", "--epochs", 100_000, run=tmp_path / folder, steps=2) as process:
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    again = err[err.index("go on with:") :].partition(":")[2].strip() + " --epochs 60"
    done = subprocess.run(
        ["bash", "-c", again.replace("chatlm", shlex.quote(command.path), 1)],
        cwd=tmp_path, env=command.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "finished after 240 steps" in done.stdout
    assert (tmp_path / folder / "model" / "model.safetensors").exists()
    assert {p.name for p in tmp_path.iterdir()} == {folder}
    tell(1)


def test_folders_that_cannot_be_are_refused(command: Command, disk: Path, tmp_path: Path, tell: Any) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "away")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    steps = ("train", "--max-steps", 1, "--output-dir")
    refused(command(*steps, "file"), 4, "file: ", "--output-dir")
    refused(command(*steps, "file/run"), 4, "Not a directory")
    refused(command(*steps, "n" * 256), 4, "File name too long")
    refused(command(*steps, disk / "run"), 4, "Read-only file system")
    refused(command(*steps, "nowhere"), 4, "nowhere: ")
    refused(command(*steps, "run", XDG_CACHE_HOME=disk / "cache"), 4, "Read-only file system", "XDG_CACHE_HOME")
    refused(command(*steps, "run", XDG_CACHE_HOME=tmp_path / "file"), 4, "XDG_CACHE_HOME")
    assert (tmp_path / "file").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"file", "nowhere", "disk"}
    tell(7)


def test_a_disk_without_room_is_refused_before_a_model_is_loaded(command: Command, disk: Path, tell: Any) -> None:
    for free in range(trials(2, 5)):
        (disk / "fill").write_bytes(bytes(shutil.disk_usage(disk).free - free * 4 * 2**20))
        done = command("train", "--max-steps", 1, "--output-dir", disk / "run")
        refused(done, 4, f"{disk / 'run'} has {free * 4}", "MiB")
        (disk / "fill").unlink()
    tell(trials(2, 5))


def test_a_disk_that_fills_as_a_run_goes_on_loses_nothing(
    command: Command, disk: Path, tmp_path: Path, tell: Any
) -> None:
    """While it is full saves fail and rows wait; full to the end, the run ends with exit code 4; freed, it goes on."""
    steps = ("train", "--epochs", 200, "--max-steps", 120, "--save-every", 4)
    assert command(*steps, "--output-dir", "whole").returncode == 0
    with command.begun(*steps, run=disk / "run", steps=5) as process:
        while free := shutil.disk_usage(disk).free:  # a checkpoint may go in between
            with (disk / "fill").open("ab") as fill, suppress(OSError):
                fill.write(bytes(free))
        _, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    assert "Traceback" not in err
    assert "could not be saved" in err
    (disk / "fill").unlink()
    done = command(*steps, "--output-dir", disk / "run", "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(disk / "run") == losses(tmp_path / "whole")
    names = ("model/model.safetensors", "model/tokenizer.json")
    assert all((disk / "run" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)
    tell(1)


GIVEN = ("config.toml", "plan.json", "evidence.json", "data.json")


def given_in(folder: Path) -> dict[str, str]:
    """What a run was given, as it stands there."""
    return {name: (folder / name).read_text(encoding="utf-8") for name in GIVEN}


def give(folder: Path, epochs: float) -> str:
    """Write what a run is given; returns what was refused, if it was."""
    folder.mkdir(exist_ok=True)
    resolved, plan = resolve({"epochs": epochs}), facts.plan(workload=facts.workload(dropout=epochs / 10))
    try:
        write_run(folder, resolved, resolved.settings, plan, evidence=f"{epochs}", data=f"{epochs}")
    except OSError as error:
        return str(error.strerror)
    return ""


@needs_strace
def test_what_a_run_was_given_is_as_it_was_or_as_it_shall_be(tmp_path: Path, tell: Any) -> None:
    """As it goes on it is written again: killed, refused, or without power, at each call and after each."""
    random.seed(6)
    folder = tmp_path / "run"
    give(folder, 2.0)
    new = given_in(folder)
    give(folder, 1.0)
    old = given_in(folder)
    assert all(new[name] != old[name] for name in GIVEN)

    def again() -> None:
        assert give(folder, 1.0) == ""

    def held() -> bool:
        now = given_in(folder)
        return all(now[name] in (old[name], new[name]) for name in GIVEN)

    calls = strace(lambda: give(folder, 2.0), ["-e", "trace=openat,write,fsync,rename"], tmp_path).calls
    count = 0
    for call, place in each_call(calls):
        again()
        killed = strace(lambda: give(folder, 2.0), inject(call, "signal=KILL", place), tmp_path)
        assert killed.code == -signal.SIGKILL
        assert held(), (call, place)
        again()
        strace(lambda: give(folder, 2.0), inject(call, "error=EDQUOT", place, onwards=True), tmp_path)
        assert held(), (call, place)
        count += 2
    again()
    before = Disk(folder)
    operations = recorded(lambda: give(folder, 2.0), folder, tmp_path)
    states = {s for n in range(len(operations) + 1) for s in before.states(operations[:n], trials(10, 200))}
    after = set(before.states(operations, trials(10, 200)))
    for state in states | after:
        shutil.rmtree(folder)
        state.lay_out(folder)
        assert held()
        assert state not in after or given_in(folder) == new, "it was written"
    tell(count + len(states | after))


@needs_strace
@pytest.mark.skipif(not FULL, reason="of the full tier")
def test_killed_as_it_writes_its_plan_again_a_run_goes_on_under_its_plan(
    command: Command, tmp_path: Path, tell: Any
) -> None:
    """A resume for more epochs, whose supervisor dies, and with it the worker, which saves."""
    run = tmp_path / "run"
    steps = ("train", "--output-dir", run, "--epochs")
    assert command(*steps, 1).returncode == 0
    files = [option for name in ("plan.json", ".plan.json.partial") for option in ("-P", run / name)]
    calls = ("write", "fsync", "rename")
    plan = run / "plan.json"
    for epochs, call in enumerate(calls, 2):
        plan.write_text(plan.read_text() + "\n")  # else it is the same, and is not written
        killed = subprocess.run(
            ["strace", "-o", "calls", *files, *inject(call, "signal=KILL", 1),
             *command.arguments(*map(str, steps), epochs, "--resume")],
            cwd=tmp_path, env=command.environment, capture_output=True, text=True,
        )  # fmt: skip
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert "planning anew" not in killed.stderr
        wait_until_free(run)
    done = command(*steps, 5, "--resume")
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert "planning anew" not in done.stderr
    assert [step for step, _ in losses(run)] == list(range(1, 21))
    tell(len(calls))


def wait_until_free(folder: Path) -> None:
    """A worker whose supervisor was killed saves first, and holds the folder as long."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with suppress(RunExistsError), hold(folder):
            return
        time.sleep(0.1)
    raise AssertionError(f"{folder} is still held")


@needs_strace
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EDQUOT", "EROFS"])
def test_rows_that_a_disk_refuses_wait_and_are_written_once(error: str, tmp_path: Path, tell: Any) -> None:
    """At any write or sync, once, for a while, or to the end: then it is told."""
    written = [{"step": step, "text": "你好" * step} for step in range(30)]

    def write() -> str:
        file, said = tmp_path / "metrics.jsonl", []
        file.unlink(missing_ok=True)
        try:
            with RowFile(file, 0) as rows:
                said = [rows.write(row, sync=row["step"] % 5 == 0) for row in written]
        except MachineError as refused:
            return f"{sum(map(bool, said))} told; {refused.message}"
        return f"{sum(map(bool, said))} told"

    count = 0
    for call, calls in (("write", 30), ("fsync", 6)):
        for place in range(1, calls - 2, trials(7, 1)):
            once = strace(write, inject(call, f"error={error}", place), tmp_path)
            while_full = strace(write, inject(call, f"error={error}", place, until=place + 2), tmp_path)
            for ended in (once, while_full):
                assert ended.struck
                refusals = 3 if call == "fsync" and ended is while_full else 1  # rows between two syncs are written
                assert ended.said == f"{refusals} told"
                lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
                assert [json.loads(line) for line in lines] == written
            count += 2
    for place in range(1, 31, trials(10, 1)):
        said = strace(write, inject("write", f"error={error}", place, onwards=True), tmp_path).said
        assert f"1 told; {tmp_path / 'metrics.jsonl'}: " in said
        assert f"its last {31 - place} rows could not be written" in said
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == written[: place - 1]
        count += 1
    tell(count)


@dataclass(frozen=True)
class Left:
    """How a worker left: its exit code, and the last word to its supervisor."""

    code: int
    events: list[dict[str, Any]]

    @property
    def told(self) -> str:
        return next((f"{e['event']}: {e['message']}" for e in self.events if "message" in e), "")


def work(errand: Train, folder: Path, condition: AbstractContextManager[object]) -> Left:
    """Be a worker whose log is on a disk that is full, in a child."""
    (folder / "errand.json").write_text(errand.model_dump_json(by_alias=True))
    with (folder / "events").open("w+b") as events, Path("/dev/full").open("wb") as full:
        child = os.fork()
        if child == 0:
            try:
                os.dup2(events.fileno(), 1)
                os.dup2(full.fileno(), 2)
                os.environ[ERRAND_FILE] = str(folder / "errand.json")
                sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
                with condition:
                    worker.main()
            finally:
                os._exit(FAILED)
        _, status = os.waitpid(child, 0)
        events.seek(0)
        return Left(os.waitstatus_to_exitcode(status), [json.loads(line) for line in events])


def raised(error: Exception) -> AbstractContextManager[object]:
    return patch.object(worker, "train", side_effect=error)


@contextmanager
def small_files() -> Iterator[None]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    yield


IN_THE_WAY = {
    "nothing": (nullcontext(), 0, ""),
    "an error of the disk": (raised(OSError(ENOSPC, "No space left on device", "x")), 4, "error: x: No space left"),
    "no memory": (raised(torch.OutOfMemoryError("CUDA out of memory")), 9, "out_of_memory: CUDA out of memory"),
    "a bug": (raised(LookupError("odd")), 1, ""),
    "rows that cannot be cut": (small_files(), 4, "metrics.jsonl: File too large: its rows past step"),
    "numbers that are none": (not_a_number(1, "loss", [], until=99), 1, "could not be written to"),
}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_worker_whose_log_has_no_room_says_what_is_wrong(tmp_path: Path, tell: Any) -> None:
    """Its stderr is a file of the run, which may be what is full."""
    errand = small_errand(tmp_path, "llama", epochs=2)
    for name, (condition, code, words) in IN_THE_WAY.items():
        run = Path(errand.output_dir)
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        if name == "numbers that are none":
            (run / "not-finite.json").mkdir()
        if name == "rows that cannot be cut":
            assert work(errand, tmp_path, nullcontext()).code == 0
            whole = (run / "metrics.jsonl").read_bytes()
            left = work(going_on(errand), tmp_path, condition)
            assert (run / "metrics.jsonl").read_bytes() == whole
        else:
            left = work(errand, tmp_path, condition)
        assert left.code == code, (name, left)
        assert words in left.told, name
    tell(len(IN_THE_WAY))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_curves_end_where_a_disk_fills_and_the_run_does_not(disk: Path, tmp_path: Path, tell: Any) -> None:
    """Full as it begins; once that is told there is room again."""
    pytest.importorskip("tensorboard")
    errand = small_errand(tmp_path, "llama", epochs=2, output_dir=str(disk / "run"), tensorboard=True)
    (disk / "run").mkdir()
    fill = disk / "fill"
    fill.write_bytes(bytes(shutil.disk_usage(disk).free))
    send = worker.Events.send

    def freed(self: worker.Events, event: str, **fields: Any) -> None:
        send(self, event, **fields)
        if fields.get("row", {}).get("event") == "curves_end":
            fill.unlink()

    left = work(errand, tmp_path, patch.object(worker.Events, "send", freed))
    assert left.code == 0, left
    rows = [event["row"] for event in left.events]
    (told,) = [row["message"] for row in rows if row.get("event") == "curves_end"]
    assert told == f"{disk / 'run'}: No space left on device"
    written = [json.loads(line) for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    tell(1)


@dataclass(frozen=True)
class Models:
    """A folder `model` with an older model, and a newer one to be saved there."""

    place: Path
    older: Any
    newer: Any
    tokenizer: Path

    @property
    def folder(self) -> Path:
        return self.place / "model"

    def save(self) -> str:
        """Save the newer one; returns the sentence of a save that failed."""
        try:
            save_model(self.newer, self.tokenizer, self.folder)
        except MachineError as error:
            return error.message
        return ""

    def begin(self) -> None:
        """Have the older one there, and nothing else."""
        shutil.rmtree(self.place, ignore_errors=True)
        save_model(self.older, self.tokenizer, self.folder)


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}


@pytest.fixture
def models(tmp_path: Path, home: Path) -> Iterator[Models]:
    """Saved without a bar, whose writes are none of the disk's, and whose lock a child that is struck would keep."""
    older, newer = (LlamaForCausalLM.from_pretrained(home / "model") for _ in range(2))
    with torch.no_grad():
        newer.model.norm.weight.add_(1.0)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(home / "model" / name, tokenizer / name)
    disable_progress_bar()
    yield Models(tmp_path / "run", older, newer, tokenizer)
    enable_progress_bar()


CHANGING = "mkdir,openat,write,ftruncate,fsync,rename,unlinkat,rmdir"


@needs_strace
@pytest.mark.parametrize("error", some(["ENOSPC", "EIO", "EDQUOT", "EROFS"], 1))
def test_a_model_that_cannot_be_saved_leaves_the_one_before(
    error: str, models: Models, tmp_path: Path, tell: Any
) -> None:
    """Refused at any call, once or from then on, and killed there: the next save succeeds, and leaves nothing else."""
    models.begin()
    older = files_in(models.folder)
    seen = strace(models.save, ["-e", f"trace={CHANGING}"], tmp_path).calls
    newer = files_in(models.folder)
    assert older != newer
    names = [call for call, _ in each_call(seen)]
    strikes = [(call, place) for call in sorted(set(names)) for place in range(1, names.count(call) + 1)]
    count = 0
    for call, place in strikes if FULL else [(c, p) for c, p in strikes if c in ("rename", "fsync")]:
        for onwards in (False, True):
            models.begin()
            ended = strace(models.save, inject(call, f"error={error}", place, onwards=onwards), tmp_path)
            assert ended.struck
            if ended.said:
                assert ended.said.startswith(f"{models.folder} could not be saved: ")
            lost = onwards and call == "rename"  # it has no name any more: the next save gives it back
            there = files_in(models.place / ".model.old" if lost and not models.folder.exists() else models.folder)
            assert there == (older if ended.said else newer), (call, place, onwards)
            check_next_save(models, newer)
        count += 2
        if error == "ENOSPC":
            models.begin()
            assert strace(models.save, inject(call, "signal=KILL", place), tmp_path).code == -signal.SIGKILL
            there = files_in(models.folder) or files_in(models.place / ".model.old")
            assert there in (older, newer), (call, place)
            check_next_save(models, newer)
            count += 1
    tell(count)


def check_next_save(models: Models, newer: dict[str, bytes]) -> None:
    assert models.save() == ""
    assert files_in(models.folder) == newer
    assert [p.name for p in models.place.iterdir()] == ["model"]


@needs_strace
def test_power_that_is_lost_as_a_model_is_saved_leaves_one_that_is_whole(
    models: Models, tmp_path: Path, tell: Any
) -> None:
    random.seed(7)
    models.begin()
    older, before = files_in(models.folder), Disk(models.place)
    operations = recorded(models.save, models.place, tmp_path)
    newer = files_in(models.folder)
    states = {s for n in range(len(operations) + 1) for s in before.states(operations[:n], trials(3, 100))}
    after = set(before.states(operations, trials(10, 200)))
    for state in states | after:
        shutil.rmtree(models.place)
        state.lay_out(models.place)
        there = files_in(models.folder) or files_in(models.place / ".model.old")
        assert there == newer or (there == older and state not in after)
    tell(len(states | after))


def test_a_disk_takes_a_part_of_a_row_then_no_more_then_the_rest(disk: Path, tell: Any) -> None:
    """The kernel's own short writes: each time room is made for a few more bytes."""
    subprocess.run(["mount", "-o", "remount,size=64k", str(disk)], check=True)
    row = {"step": 1, "text": "x" * 5000}
    with RowFile(disk / "metrics.jsonl", 0) as rows:
        fill = disk / "fill"
        fill.write_bytes(bytes(shutil.disk_usage(disk).free))
        told = [rows.write(row) for _ in range(6)]
        assert [bool(said) for said in told] == [True] + [False] * 5
        assert "No space left on device" in told[0]
        for left in (48, 40, 32, 24, 0):
            os.truncate(fill, left * 1024)
            rows.write({"step": 2})
    lines = [json.loads(line) for line in (disk / "metrics.jsonl").read_text().splitlines()]
    assert lines == [row] * 6 + [{"step": 2}] * 5
    tell(1)
