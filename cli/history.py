"""What the folder of a run tells, while it is written and after: rows, plan, settings, checkpoints. Writes nothing."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import stat
from array import array
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from autotune.errands import DataSummary
from autotune.errors import ConfigurationError
from autotune.plan import Fact, Layout, Plan
from autotune.remaining import Left, Pace, sane_count, sane_seconds
from cli.lock import LOCK

Metrics = dict[str, Any]
COLUMNS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "gradient_norm",
    "samples",
    "tokens",
    "padded_tokens",
    "micro_batches",
    "data_seconds",
    "seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "model_flops_utilization",
)
"""Of the rows of steps, what is kept: numbers alone, so that a run of a million steps has room."""
COUNTS = {
    *("step", "total_steps", "evaluates_every", "saves_every", "tokens", "target_tokens", "padded_tokens"),
    *("micro_batches", "bleu_rows", "rows", "rows_now", "best_step", "evaluations"),
}
"""Of any row, what is a whole number, and not below zero."""
MEASURES = {
    *("epoch", "loss", "mean_loss", "best_loss", "learning_rate", "gradient_norm", "model_flops_utilization"),
    *("perplexity", "accuracy", "bleu"),
}
"""What is a number of any kind."""
AMOUNTS = ("seconds", "bytes", "per_second")
"""How the name of what is not below zero ends: its unit."""
MOST_AMOUNT = 1e24
TAIL_BYTES = 64 * 2**10
BLOCK_BYTES = 2**20
"""That are read at a time: a file of a million rows has a few hundred of these."""
RECENT = 32
"""Steps whose rows are kept whole."""
ENDED = ("finished", "stopped")
CLOCK_ERROR_SECONDS = 60.0
"""Between when a process began, as the kernel has it, and when its file was written; a clock may be set in between."""


class RunData(Fact):
    """What a run is trained and evaluated on: its file `data.json`."""

    data: DataSummary
    validation: DataSummary | None
    padding: dict[Layout, float]
    """Share of it that each layout would have, in the steps of the run's plan."""


class Checkpoint(NamedTuple):
    """A checkpoint that lies there."""

    step: int
    bytes: int
    saved_at: float
    """Seconds since the epoch of the clock."""


class Holder(NamedTuple):
    """The process that has a run's folder, as it signed."""

    process_id: int
    here: bool
    """Whether it is on this machine."""


class Tail:
    """The whole lines that were added to a file of JSON lines since the last look.

    A run that goes on cuts its file first: that what was read last is still where it was tells whether it did.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.more = False
        """Whether the last look left lines for the next."""
        self._at, self._last = 0, b""

    def read(self) -> tuple[list[Metrics], bool]:
        """Return new rows, of a block at most, and whether the file was cut, so that those before hold no longer.

        What is no row is passed over.
        """
        self.more = False
        try:
            with self.path.open("rb") as file:
                file.seek(self._at - len(self._last))
                anew = file.read(len(self._last)) != self._last
                if anew:
                    file.seek(0)
                    self._at, self._last = 0, b""
                words = _block(file)
                self.more = bool(file.peek(1))
        except OSError:
            return [], False
        whole = words[: words.rfind(b"\n") + 1]
        self._at += len(whole)
        lines = whole.splitlines(keepends=True)
        self._last = lines[-1] if lines else self._last
        return [row for line in lines if (row := _row(line)) is not None], anew


def _block(file: BufferedReader) -> bytes:
    """Read on, until there is the end of a line or nothing is left."""
    words = file.read(BLOCK_BYTES)
    while b"\n" not in words and (more := file.read(BLOCK_BYTES)):
        words += more
    return words


def _row(line: bytes) -> Metrics | None:
    with suppress(ValueError, RecursionError):
        row = json.loads(line, parse_constant=_no_number)
        if isinstance(row, dict) and sane_count(row.get("step")) is not None:
            return {name: _sane(name, value) for name, value in row.items()}
    return None


def _no_number(_: str) -> None:
    """Take NaN and Infinity for what a run writes in their place."""


def _sane(name: str, value: Any) -> Any:
    """Return what a row says under a name: None where a number belongs and none is that can be."""
    if type(value) is str and name not in COUNTS and name not in MEASURES and not name.endswith(AMOUNTS):
        return value
    if name in COUNTS:
        return sane_count(value)
    if name.endswith("seconds"):
        return sane_seconds(value)
    if name.endswith(AMOUNTS):
        return value if _is_number(value) and 0 <= value <= MOST_AMOUNT else None
    if name in MEASURES:
        return value if _is_number(value) else None
    return _without_excess(value)


def _without_excess(value: Any) -> Any:
    """Return anything with None for each number in it that is too much for a float."""
    if isinstance(value, dict):
        return {name: _without_excess(under) for name, under in value.items()}
    if isinstance(value, list):
        return [_without_excess(one) for one in value]
    return None if isinstance(value, int | float) and not abs(value) < 1e300 else value


def _is_number(value: object) -> bool:
    """Whether it is one that counts: no infinity, and nothing that is too much for a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


@dataclass
class History:
    """One run, as far as its folder tells; `refresh` takes in what is new."""

    folder: Path
    kept: tuple[str, ...] = COLUMNS
    """Which columns to keep: a million steps are 8 MB each."""
    plan: Plan | None = None
    """None where there is none, or none that can be read."""
    columns: dict[str, array[float]] = field(init=False)
    """Of the steps, by name, all of one length; nan where a row does not say, or said that it is no number."""
    recent: deque[Metrics] = field(default_factory=lambda: deque(maxlen=RECENT))
    """The last rows of steps."""
    validations: list[Metrics] = field(default_factory=list)
    events: list[Metrics] = field(default_factory=list)
    steps: int = 0
    """The last step that was taken."""
    total_steps: int = 0
    """Steps of the whole run, as its last beginning said, or a change since; 0 where nothing is known."""
    peak_memory_bytes: int = 0
    """The most that any row told of."""
    started: int = 0
    """Rows of steps that were written before the process began that wrote the last ones."""
    taken: int = 0
    """Rows of steps."""
    cuts: int = 0
    """How often the file was cut, so that all began anew."""
    holder: Holder | None = None
    """Who had the folder when it was looked at last."""

    def __post_init__(self) -> None:
        self.columns = {name: array("d") for name in self.kept}
        self._tail = Tail(self.folder / "metrics.jsonl")
        self._pace = Pace()
        self._plan_written = 0.0
        self.refresh()

    @property
    def name(self) -> str:
        """What people call it: the folder's name."""
        return self.folder.resolve().name

    def refresh(self) -> bool:
        """Take in what was written since; return whether there was anything."""
        # Who holds it is asked first: a run that ends in between has written its last row when that is read.
        held, self.holder = self.holder, find_holder(self.folder)
        changed = held != self.holder
        while True:
            rows, anew = self._tail.read()
            if anew:
                self._forget()
            for row in rows:
                self._take(row)
            changed |= anew or bool(rows)
            if not self._tail.more:
                return self._read_plan() or changed

    def left(self) -> Left | None:
        """Return what is left of the run's time, by what its own process took; None before its first steps."""
        return self._pace.left(self.plan)

    def _forget(self) -> None:
        for column in self.columns.values():
            del column[:]
        for rows in (self.recent, self.validations, self.events):
            rows.clear()
        self.steps = self.total_steps = self.peak_memory_bytes = self.started = self.taken = 0
        self.cuts, self._pace = self.cuts + 1, Pace()

    def _take(self, row: Metrics) -> None:
        self._pace.add(row)
        self.total_steps = row.get("total_steps") or self.total_steps
        self.peak_memory_bytes = max(self.peak_memory_bytes, int(row.get("peak_memory_bytes") or 0))
        if row.get("kind") == "train":
            for name, column in self.columns.items():
                column.append(float(row[name]) if _is_number(row.get(name)) else math.nan)
            self.recent.append(row)
            self.steps, self.taken = row["step"], self.taken + 1
        elif row.get("kind") == "validation":
            row.pop("event", None)
            self.validations.append(row)
        elif row.get("kind") == "event" and isinstance(row.get("event"), str):
            if row["event"] == "started":
                self.started = self.taken
            self.events.append(row)

    def _read_plan(self) -> bool:
        file = self.folder / "plan.json"
        with suppress(OSError, ValueError):
            written = file.stat().st_mtime
            if written != self._plan_written:
                self._plan_written = written
                self.plan = Plan.from_json(file.read_text(encoding="utf-8"))
                return True
        return False

    @property
    def state(self) -> str:
        """`running`, `finished`, `stopped`, or `died` where it is none of these and nobody holds its folder."""
        if self.holder is not None:
            return "running"
        last = self.events[-1]["event"] if self.events else ""
        return last if last in ENDED else "died"

    def checkpoints(self) -> list[Checkpoint]:
        """Return those that lie there, the oldest first."""
        found = []
        with suppress(OSError):
            for folder in (self.folder / "checkpoints").glob("step-*"):
                with suppress(OSError, ValueError):
                    held = sum(file.stat().st_size for file in folder.iterdir())
                    saved = (folder / "manifest.json").stat().st_mtime
                    found.append(Checkpoint(int(folder.name.removeprefix("step-")), held, saved))
        return sorted(found)

    def log_lines(self, most: int) -> list[str]:
        """Return the last lines of what the worker said."""
        try:
            with (self.folder / "log.txt").open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
                return file.read().decode(errors="replace").splitlines()[-most:]
        except OSError:
            return []

    def samples(self) -> list[Metrics]:
        """Return how fixed prompts were answered, in the order of steps."""
        try:
            lines = (self.folder / "samples.jsonl").read_bytes().splitlines()
        except OSError:
            return []
        return [row for line in lines if (row := _row(line)) is not None]

    def data(self) -> RunData | None:
        """Return what the run is trained on; None where it does not say."""
        with suppress(OSError, ValueError):
            return RunData.model_validate_json((self.folder / "data.json").read_bytes())
        return None

    def settings(self) -> list[tuple[str, str, str]]:
        """Return what the run was given: name, value as TOML, origin."""
        try:
            lines = (self.folder / "config.toml").read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return []
        found = (re.fullmatch(r"(?:# )?(\w+) = (.*)  # (.*)", line) for line in lines)
        return [(match[1], match[2], match[3]) for match in found if match]


def find_holder(folder: Path) -> Holder | None:
    """Return the process that holds a run's folder, as it signed; None where it is gone.

    One on another machine cannot be asked: it is taken to be there as long as its lock file is.
    """
    try:
        lock = folder / LOCK
        signed = re.match(r"process (\d{1,10}) on (\S+) since", lock.read_text(encoding="utf-8"))
        signed_at = lock.stat().st_mtime
    except (OSError, UnicodeDecodeError):
        return None
    if signed is None:
        return None
    holder = Holder(int(signed[1]), signed[2] == socket.gethostname())
    return holder if not holder.here or _lives(holder.process_id, signed_at) else None


def _lives(process_id: int, signed_at: float) -> bool:
    """Say whether a process is there, and is the one that signed: a later one may have its number."""
    try:
        process = psutil.Process(process_id)
        ended = process.status() == psutil.STATUS_ZOMBIE
        return not ended and process.create_time() <= signed_at + CLOCK_ERROR_SECONDS
    except psutil.AccessDenied:
        return True
    except (psutil.Error, OverflowError):
        return False


def is_run(folder: Path) -> bool:
    """Whether a run lies in a folder, as far as it can be read."""
    try:
        return _holds_run(folder)
    except OSError:
        return False


def _holds_run(folder: Path) -> bool:
    """Say whether a run lies there; raises OSError where that cannot be read."""
    return any(stat.S_ISREG(_mode(folder / name)) for name in ("metrics.jsonl", "plan.json"))


def _mode(path: Path) -> int:
    """Return what kind of file it is, 0 where there is none; raises OSError where that cannot be read."""
    try:
        return os.stat(path).st_mode  # noqa: PTH116 # as `is_file` was: later Pythons take what cannot be read for none
    except (FileNotFoundError, NotADirectoryError):
        return 0


def find_runs(named: list[str]) -> list[Path]:
    """Return the folders that were named, or the runs under `runs/`, the newest first; each once, links resolved.

    Raises ConfigurationError for a name that is no run.
    """
    if not named:
        found = [folder for folder in Path("runs").glob("*") if is_run(folder)]
        return sorted(_once(sorted(found, key=Path.is_symlink)), key=_changed_at, reverse=True)
    for name in named:
        _check_run(name)
    return _once([Path(name) for name in named])


def _once(folders: list[Path]) -> list[Path]:
    """Return of folders that are the same one the first."""
    found: dict[Path, Path] = {}
    for folder in folders:
        found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _check_run(name: str) -> None:
    folder, hint = Path(name), "give the folder of a run, such as runs/NAME"
    try:
        if _holds_run(folder):
            return
        mode = _mode(folder)
    except OSError as error:
        raise ConfigurationError(
            f"{name}: cannot be read ({error.strerror})", "see to its permissions, or give another run"
        ) from None
    if stat.S_ISDIR(mode):
        raise ConfigurationError(f"{name}: holds no run", hint)
    if mode:
        inside = f", such as {folder.parent}" if is_run(folder.parent) else ", such as runs/NAME"
        raise ConfigurationError(f"{name}: is a file, and a run is a folder", f"give the folder of a run{inside}")
    raise ConfigurationError(f"{name}: no such folder", hint)


def _changed_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # it went as we looked
        return 0.0
