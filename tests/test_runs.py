"""The folder of a run: what it was given is written down, and nothing is written over."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import facts
import pytest

from autotune.errands import Resume
from autotune.errors import ConfigurationError, MachineError, RunExistsError
from cli.commands import train as train_room
from cli.lock import hold
from cli.planning import Remembering
from cli.runs import Resuming, RunPlace, check_disk, find_run, write_run
from profiles import resolve


def test_a_run_writes_every_value_in_force_and_where_it_came_from(tmp_path: Path) -> None:
    resolved = resolve({"epochs": 2.0}, None, "small")
    write_run(tmp_path, resolved, resolved.settings, facts.plan(), evidence=None, data=None)
    text = (tmp_path / "config.toml").read_text(encoding="utf-8")
    values = tomllib.loads(text)
    assert values["learning_rate"] == 1e-4
    assert values["precision"] == "bf16"
    assert not values.keys() & {"batch_size_per_gpu", "output_dir"}, "else it could not be given as --config"
    for line in ("epochs = 2.0  # command line", "seed = 42  # default", 'precision = "bf16"  # rule',
                 "learning_rate = 0.0001  # rule", "# batch_size_per_gpu = 20  # plan"):  # fmt: skip
        assert line in text.splitlines()
    assert not (tmp_path / "evidence.json").exists()


def place(folder: Path, *, resume: bool = False, **named: Any) -> RunPlace:
    resuming = Resuming(resume=resume, place=named.pop("place", None), weights_only=named.pop("weights_only", False))
    return find_run(resolve({"output_dir": str(folder)} | named).settings, resuming)


def test_a_folder_with_a_run_is_refused_unless_it_is_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert place(tmp_path).folder == tmp_path, "an empty file is what a run that did not begin leaves"
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(RunExistsError, match="already holds a run") as error:
        place(tmp_path)
    assert error.value.exit_code == 5
    assert place(tmp_path, resume=True) == RunPlace(tmp_path, None), "killed before the first checkpoint"
    (tmp_path / "model").mkdir()
    with pytest.raises(RunExistsError, match="holds a model and no checkpoint"):
        place(tmp_path, resume=True)
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    going_on = place(tmp_path, resume=True)
    assert going_on == RunPlace(tmp_path, Resume(place=str(tmp_path), weights_only=False))
    assert going_on.plan_file is None
    (tmp_path / "plan.json").touch()
    assert going_on.plan_file == tmp_path / "plan.json"


def test_a_run_that_was_left_as_its_folder_was_taken_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"output_dir": str(tmp_path)}

    @contextmanager
    def late(folder: Path) -> Iterator[int]:
        (tmp_path / "metrics.jsonl").write_text("{}")
        with hold(folder) as lock:
            yield lock

    monkeypatch.setattr(train_room, "hold", late)
    with pytest.raises(RunExistsError, match="already holds a run"):
        train_room.train_command(
            train_room.Asked(resolve(given), given, None, None, None, False, Remembering(cache=False, offline=True)),
            Resuming(False, None, False), show_config=False, rehearsing=False,
        )  # fmt: skip


def test_what_is_named_is_gone_on_from_in_its_own_folder_and_weights_alone_in_another(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (run / "plan.json").touch()
    settings = resolve({}).settings
    named = find_run(settings, Resuming(False, str(checkpoint), False))
    assert (named.folder, named.plan_file) == (run, run / "plan.json")
    folder = find_run(settings, Resuming(False, str(run / "checkpoints"), False))
    assert (folder.folder, folder.plan_file) == (run, run / "plan.json")
    (tmp_path / "taken" / "checkpoints" / "step-00000009").mkdir(parents=True)
    with pytest.raises(RunExistsError, match="taken already holds a run"):
        place(tmp_path / "taken", place=str(checkpoint))
    other = place(tmp_path / "other", place=str(checkpoint), weights_only=True)
    assert (other.folder, other.plan_file) == (tmp_path / "other", None)
    with pytest.raises(ConfigurationError, match="no such folder"):
        place(tmp_path / "new", place=str(tmp_path / "nothing"))
    with pytest.raises(ConfigurationError, match="not from what"):
        place(run, weights_only=True)


def test_without_a_folder_the_newest_run_of_the_model_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-20261124-101500", "tiny-20261125-090000", "tiny-t5-20261125-100000", "tiny-best"):
        (tmp_path / "runs" / name / "checkpoints" / "step-00000001").mkdir(parents=True)
    found = find_run(resolve({"model": "tiny"}).settings, Resuming(True, None, False))
    assert found.folder == Path("runs/tiny-20261125-090000")


def test_a_disk_without_room_for_the_checkpoints_is_told_before_anything_runs(tmp_path: Path) -> None:
    """Of 26 million parameters: three checkpoints that stay and one under way, the best's, and two models."""
    needed = (5 * 12 + 2 * 4) * 26_000_000 + 16 * 2**20
    check_disk(tmp_path, facts.workload(), 3, facts.hardware(disk_free_bytes=needed))
    with pytest.raises(MachineError, match=r"has 1,701 MiB for it, checkpoints and models take 1,702 MiB"):
        check_disk(tmp_path, facts.workload(), 3, facts.hardware(disk_free_bytes=needed - 2**20))
