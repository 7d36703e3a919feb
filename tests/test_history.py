"""What the folder of a run tells while it is written: each row once, none that was cut off, whoever holds it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import facts
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.errors import ConfigurationError
from cli.history import BLOCK_BYTES, History, Tail, find_holder, find_runs, is_run
from cli.lock import LOCK, hold


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": number, "loss": 1 / number, "seconds": 0.5, "peak_memory_bytes": number} | more


def event(name: str, number: int = 0, **more: Any) -> dict[str, Any]:
    return {"kind": "event", "event": name, "step": number} | more


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "metrics.jsonl").write_text(lines(*rows), encoding="utf-8")
    return folder


def append(folder: Path, text: str) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(text)


def steps_of(history: History) -> list[int]:
    return [int(number) for number in history.columns["step"]]


@given(st.lists(st.integers(0, 60), max_size=12))
def test_a_file_that_grows_by_any_pieces_gives_each_row_once(
    tmp_path_factory: pytest.TempPathFactory, ends: list[int]
) -> None:
    file = tmp_path_factory.mktemp("tail") / "metrics.jsonl"
    whole, got, tail = lines(*map(step, range(1, 9))).encode(), [], Tail(file)
    for end in sorted(end * len(whole) // 60 for end in [*ends, 60]):
        file.write_bytes(whole[:end])
        rows, anew = tail.read()
        got += rows
        assert not anew
    assert [row["step"] for row in got] == list(range(1, 9))


def test_what_is_no_row_is_passed_over(tmp_path: Path) -> None:
    junk = '\n{"step": 1\nnull\n[1]\n{"kind": "train"}\n{"step": true}\n{"step": NaN}\n'
    junk += '{"step": "1"}\n\x00\xff\n{"step": 1e999}\n'
    write(tmp_path, step(1))
    append(tmp_path, junk + "[" * 100_000 + "\n" + lines({"step": 10**400}, step(2)))
    history = History(tmp_path)
    assert steps_of(history) == [1, 2]
    assert (history.steps, history.taken, history.peak_memory_bytes) == (2, 2, 2)


def test_a_beginning_without_its_words_is_no_error(tmp_path: Path) -> None:
    history = History(write(tmp_path, event("started"), event("rescheduled"), {"kind": "event", "step": 1}, step(1)))
    assert (history.total_steps, history.left()) == (0, None)


def test_a_run_that_cuts_its_file_and_goes_on_has_no_row_twice(tmp_path: Path) -> None:
    history = History(write(tmp_path, event("started", total_steps=9), *map(step, (1, 2, 3, 4)), event("spike", 4)))
    write(tmp_path, event("started", total_steps=9), step(1), step(2))
    append(tmp_path, lines(event("resumed", 2), event("started", 2, total_steps=12), step(3, loss=7.0)))
    assert history.refresh()
    assert steps_of(history) == [1, 2, 3]
    assert history.columns["loss"][-1] == 7.0
    assert [row["event"] for row in history.events] == ["started", "resumed", "started"]
    assert (history.started, history.total_steps, history.cuts, history.peak_memory_bytes) == (2, 12, 1, 3)


def test_a_file_that_is_cut_and_grows_past_where_it_was_is_read_anew(tmp_path: Path) -> None:
    history = History(write(tmp_path, *map(step, (1, 2, 3))))
    write(tmp_path, step(1), *(step(number, loss=9.0) for number in range(2, 30)))
    assert history.refresh()
    assert steps_of(history) == list(range(1, 30))
    assert history.columns["loss"][1] == 9.0


def test_a_file_that_is_cut_to_nothing_is_a_change(tmp_path: Path) -> None:
    history = History(write(tmp_path, event("started", total_steps=3), step(1)))
    write(tmp_path)
    assert history.refresh()
    assert (history.steps, history.total_steps, history.taken, history.events) == (0, 0, 0, [])
    assert not history.refresh()


def test_a_file_of_many_blocks_is_read_to_its_end_at_once(tmp_path: Path) -> None:
    rows = [step(number, note="x" * (BLOCK_BYTES // 4)) for number in range(1, 14)]
    write(tmp_path, *rows[:5], step(6, note="y" * (2 * BLOCK_BYTES)), *rows[6:])
    append(tmp_path, '{"step": 14')
    tail = Tail(tmp_path / "metrics.jsonl")
    assert len(tail.read()[0]) < 13
    assert tail.more, "what is held at once has a bound"
    history = History(tmp_path)
    assert steps_of(history) == list(range(1, 14))
    append(tmp_path, ', "kind": "train"}\n')
    history.refresh()
    assert steps_of(history) == list(range(1, 15))


def test_columns_have_one_length_and_are_nan_where_a_row_says_no_number(tmp_path: Path) -> None:
    history = History(write(tmp_path, step(1), step(2, loss=None), step(3, tokens="many")))
    assert {len(column) for column in history.columns.values()} == {3}
    assert math.isnan(history.columns["loss"][1])
    assert math.isnan(history.columns["tokens"][2])
    few = History(tmp_path, ("step", "loss"))
    assert few.columns.keys() == {"step", "loss"}
    assert [row["step"] for row in few.recent] == [1, 2, 3]


@pytest.mark.parametrize(
    ("rows", "state"),
    [
        ([], "died"),
        ([event("started"), step(1)], "died"),
        ([event("started"), step(1), event("stopped", 1)], "stopped"),
        ([event("started"), event("finished", 1)], "finished"),
        ([event("stopped", 1), event("started", 1), step(2)], "died"),
    ],
)
def test_a_run_that_nobody_holds_is_what_its_last_event_says_else_it_died(
    tmp_path: Path, rows: list[dict[str, Any]], state: str
) -> None:
    write(tmp_path, *rows)
    assert History(tmp_path).state == state
    with hold(tmp_path):
        history = History(tmp_path)
        assert history.state == "running"
        assert history.holder is not None
        assert history.holder.process_id == os.getpid()
    assert history.refresh(), "that it is let go is a change"
    assert history.state == state


def sign(folder: Path, process_id: int, host: str = os.uname().nodename) -> None:
    (folder / LOCK).write_text(f"process {process_id} on {host} since 2026-11-28 08:18:08\n", encoding="utf-8")


def test_a_lock_whose_process_is_gone_or_is_another_or_a_zombie_holds_nothing(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    sign(tmp_path, child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and nobody has asked how
    assert find_holder(tmp_path) is None
    child.wait()
    assert find_holder(tmp_path) is None
    sign(tmp_path, os.getpid())
    assert find_holder(tmp_path) == (os.getpid(), True)
    os.utime(tmp_path / LOCK, (0, 0))
    assert find_holder(tmp_path) is None, "it was signed long before this process began"


@pytest.mark.parametrize(
    "words",
    ["", "nobody", "process x on y since z", "\udcff", f"process {'9' * 5000} on {os.uname().nodename} since z"],
)
def test_a_lock_that_says_nothing_holds_nothing(tmp_path: Path, words: str) -> None:
    (tmp_path / LOCK).write_bytes(words.encode(errors="surrogateescape"))
    assert find_holder(tmp_path) is None


def test_a_lock_of_another_machine_holds_as_long_as_it_lies_there(tmp_path: Path) -> None:
    sign(tmp_path, 1, "elsewhere")
    assert find_holder(tmp_path) == (1, False)


def test_checkpoints_are_those_that_were_committed_in_the_order_of_steps(tmp_path: Path) -> None:
    for name in ("step-00000020", "step-00000003", ".step-00000030.partial", "step-x", "step-00000040"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"12345")
    for name in ("step-00000020", "step-00000003", ".step-00000030.partial"):
        (tmp_path / "checkpoints" / name / "manifest.json").write_bytes(b"{}")
    found = History(tmp_path).checkpoints()
    assert [(checkpoint.step, checkpoint.bytes) for checkpoint in found] == [(3, 7), (20, 7)]


def test_a_log_gives_its_last_lines_whatever_its_bytes(tmp_path: Path) -> None:
    history = History(tmp_path)
    assert history.log_lines(3) == []
    (tmp_path / "log.txt").write_bytes(b"\xe4\xbd\xa0" * 50_000 + b"\nfirst\r50%\r100%\nlast \xff\n")
    assert history.log_lines(3) == ["50%", "100%", "last \ufffd"]


def test_a_plan_is_read_when_it_is_written_and_again_when_it_changed(tmp_path: Path) -> None:
    history = History(write(tmp_path, step(1)))
    assert history.plan is None
    (tmp_path / "plan.json").write_text("{", encoding="utf-8")
    assert not history.refresh()
    (tmp_path / "plan.json").write_text(facts.plan().to_json(), encoding="utf-8")
    os.utime(tmp_path / "plan.json", (1e9, 1e9))
    assert history.refresh()
    assert history.plan == facts.plan()
    assert not history.refresh()


def test_runs_are_found_the_newest_first_and_what_is_none_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_runs([]) == []
    for age, name in enumerate(("new", "old", "empty")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        if name != "empty":
            write(folder, step(1))
        os.utime(folder, (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "gone").symlink_to("nowhere")
    assert find_runs([]) == [Path("runs/new"), Path("runs/old")]
    assert find_runs(["runs/old"]) == [Path("runs/old")]
    assert not is_run(tmp_path)
    with pytest.raises(ConfigurationError, match="runs/empty: holds no run"):
        find_runs(["runs/empty"])
    with pytest.raises(ConfigurationError, match="no such folder"):
        find_runs(["runs/none"])


TOO_LONG = "x" * 300
"""A name that the system refuses to look up, whoever asks: as a folder that nobody may read."""


def test_a_folder_that_cannot_be_read_hides_no_other_and_is_told_where_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "good").mkdir(parents=True)
    write(Path("runs/good"), step(1))
    (tmp_path / "runs" / "bad").symlink_to(TOO_LONG)
    assert find_runs([]) == [Path("runs/good")]
    with pytest.raises(ConfigurationError, match=r"runs/bad: cannot be read \(File name too long\)"):
        find_runs(["runs/bad"])


def test_a_file_of_a_run_is_told_to_be_one_with_the_folder_that_was_meant(tmp_path: Path) -> None:
    file = write(tmp_path, step(1)) / "metrics.jsonl"
    with pytest.raises(ConfigurationError, match="is a file, and a run is a folder") as told:
        find_runs([str(file)])
    assert told.value.hint == f"give the folder of a run, such as {tmp_path}"


def test_a_run_that_has_two_names_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        write(Path("runs") / name, step(1))
    for name in ("0-latest", "latest"):
        (tmp_path / "runs" / name).symlink_to("b")
    assert sorted(find_runs([])) == [Path("runs/a"), Path("runs/b")]
    named = ["runs/latest", "runs/a", "runs/b/", "./runs/a"]
    assert find_runs(named) == [Path("runs/latest"), Path("runs/a")]


HUGE = 10**400


def test_what_is_no_number_where_one_belongs_is_none_and_all_else_is_as_it_was(tmp_path: Path) -> None:
    history = History(
        write(
            tmp_path,
            event("started", 0, total_steps=10, evaluates_every=0, note="0"),
            event("rescheduled", 1, total_steps="many"),
            event("rescheduled", 1, total_steps=10**18),
            step(2, seconds=HUGE, tokens="4", epoch=[1], loss=math.nan, peak_memory_bytes="7", best=True),
            {"kind": "validation", "step": 2, "loss": HUGE, "generation_seconds": -1, "event": [1]},
            event("plan_against_real", 2, real_tokens_per_second="fast", errors={"packed": HUGE, "sorted": 1e-7}),
            event("checkpoint", 2, bytes=True, checkpoint="c", seconds=0.5),
        )
    )
    assert (history.total_steps, history.peak_memory_bytes) == (10, 0)
    (last,) = history.recent
    assert {name: last[name] for name in ("seconds", "tokens", "epoch", "loss", "peak_memory_bytes", "best")} == {
        "seconds": None, "tokens": None, "epoch": None, "loss": None, "peak_memory_bytes": None, "best": True,
    }  # fmt: skip
    assert history.validations == [{"kind": "validation", "step": 2, "loss": None, "generation_seconds": None}]
    assert history.events[0]["note"] == "0"
    assert history.events[-2]["real_tokens_per_second"] is None
    assert history.events[-2]["errors"] == {"packed": None, "sorted": 1e-7}
    assert history.events[-1] == event("checkpoint", 2, bytes=None, checkpoint="c", seconds=0.5)
