"""The folder of a run: what it was given is written down, and nothing is written over."""

from __future__ import annotations

import tomllib
from pathlib import Path

import facts
import pytest

from autotune.errors import MachineError, RunExistsError
from cli.runs import make_folder, run_folder, write_run
from profiles import resolve


def test_a_run_writes_every_value_in_force_and_where_it_came_from(tmp_path: Path) -> None:
    resolved = resolve({"epochs": 2.0}, None, "small")
    write_run(tmp_path, resolved, resolved.settings, facts.plan(), evidence=None)
    text = (tmp_path / "config.toml").read_text(encoding="utf-8")
    values = tomllib.loads(text)
    assert values["learning_rate"] == 1e-4
    assert values["precision"] == "bf16"
    assert not values.keys() & {"batch_size_per_gpu", "output_dir"}, "else it could not be given as --config"
    for line in ("epochs = 2.0  # command line", "seed = 42  # default", 'precision = "bf16"  # rule',
                 "learning_rate = 0.0001  # rule", "# batch_size_per_gpu = 20  # plan"):  # fmt: skip
        assert line in text.splitlines()
    assert not (tmp_path / "evidence.json").exists()


def test_a_folder_with_a_run_is_refused_and_one_that_cannot_be_made_too(tmp_path: Path) -> None:
    taken = resolve({"output_dir": str(tmp_path)}).settings
    (tmp_path / "metrics.jsonl").touch()
    assert run_folder(taken) == tmp_path, "an empty file is what a run that did not begin leaves"
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(RunExistsError) as error:
        run_folder(taken)
    assert error.value.exit_code == 5
    model = facts.preprocessed().model.model_copy(update={"parameters": 10**6})
    with pytest.raises(MachineError, match=r"Not a directory|File exists"):
        make_folder(tmp_path / "metrics.jsonl" / "run", model, facts.hardware())
    with pytest.raises(MachineError, match="has 5 MiB free, saving the model takes 24 MiB"):
        make_folder(tmp_path / "run", model, facts.hardware(disk_free_bytes=5 * 2**20))
    assert not (tmp_path / "run").exists()
