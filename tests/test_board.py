"""TensorBoard shows the numbers of a run by step, and nothing that is no number."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.board import Board


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_written_is_what_tensorboard_reads(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Board(tmp_path) as board:
        board.add({"kind": "train", "step": 1, "loss": 2.5, "gradient_norm": None})
        board.add({"kind": "train", "step": 2, "loss": 2.0, "gradient_norm": 1.5})
        board.add({"kind": "validation", "step": 2, "loss": 2.25, "best": True, "bleu_signature": "x"})
        board.add({"kind": "event", "event": "finished", "step": 2})
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/gradient_norm", "validation/loss"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.5), (2, 2.0)]


def test_where_a_disk_refuses_curves_end_once_and_nothing_else_does(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    with Board(tmp_path / "file" / "run") as board:
        told = [board.add({"kind": "train", "step": step, "loss": 2.5}) for step in (1, 2, 3)]
    assert told == [f"{tmp_path / 'file' / 'run'}: Not a directory", "", ""]
