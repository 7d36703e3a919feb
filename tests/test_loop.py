"""The loop: schedule, steps and their rows, real data through to a model; a wish to stop leaves a model too."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import facts
import pytest
import torch
from facts import recipe

from autotune.batching import reach
from autotune.errands import Preprocess, Train
from trainer.data import Order, TokenStore
from trainer.loop import train
from trainer.preprocess import preprocess


def errand_of(tmp_path: Path, model: str = "tiny", **changes: Any) -> Train:
    """An errand on the demo's dialogues: 40 rows, effective batch 16, micro-batches of at most 5."""
    done = preprocess(
        Preprocess(
            model=model,
            tokenizer=None,
            dropout=None,
            freeze=(),
            data=(),
            validation=(),
            validation_split=None,
            stage=None,
            max_seq_len=64,
            max_target_len=64,
            limit=40,
            show=0,
            cache_dir=str(tmp_path / "cache"),
        ),
        lambda doing, rows: None,
    )
    assert done.data is not None
    assert done.ids is not None
    assert done.tokenizer_dir is not None
    plan = facts.plan()
    workload = plan.workload.model_copy(
        update={
            "model": model,
            "task": done.model.task,
            "vocabulary_size": done.model.vocabulary_size,
            "max_seq_len": 64,
            "max_target_len": 64 if done.model.task == "seq2seq" else 0,
            "precision": "fp32",
            "attention": "sdpa",
        }
    )
    hardware = plan.hardware.model_copy(update={"device": "cpu"})
    batching = reach(16, 1, 5, 5, "memory")
    values: dict[str, Any] = {
        "plan": plan.model_copy(update={"workload": workload, "hardware": hardware, "batching": batching}),
        "recipe": recipe(),
        "store": done.data.store,
        "validation_store": done.data.store,
        "tokenizer_dir": done.tokenizer_dir,
        "ids": done.ids,
        "output_dir": str(tmp_path / "run"),
    }
    return Train(**(values | changes))


def never() -> bool:
    return False


@pytest.mark.parametrize("model", ["tiny", "tiny-t5"])
def test_an_epoch_uses_every_sample_once_and_the_rows_add_up(model: str, tmp_path: Path) -> None:
    errand = errand_of(tmp_path, model)
    rows = list(train(errand, never))
    steps = [row for row in rows if row["kind"] == "train"]
    store = TokenStore(Path(errand.store))
    assert [row["samples"] for row in steps] == [16, 16, 8]
    assert [row["micro_batches"] for row in steps] == [4, 4, 2]
    assert sum(row["tokens"] for row in steps) == sum(len(store.tokens(i)) for i in range(40))
    assert all(row["padded_tokens"] >= row["tokens"] > row["target_tokens"] > 0 for row in steps)
    assert all(row["peak_memory_bytes"] > 0 for row in steps)
    assert [row["step"] for row in steps] == [1, 2, 3]
    validation = [row for row in rows if row["kind"] == "validation"]
    assert len(validation) == 1
    assert rows[-1]["event"] == "finished"
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_training_learns_and_the_same_seed_gives_the_same_numbers_to_the_bit(tmp_path: Path) -> None:
    losses = []
    for name in ("one", "two"):
        errand = errand_of(tmp_path, recipe=recipe(epochs=6), output_dir=str(tmp_path / name))
        losses.append([row["loss"].hex() for row in train(errand, never) if row["kind"] == "train"])
    assert losses[0] == losses[1]
    assert float.fromhex(losses[0][-1]) < 0.9 * float.fromhex(losses[0][0])


def test_the_micro_batch_does_not_change_the_losses(tmp_path: Path) -> None:
    curves = []
    for rows in (1, 5, 16):
        errand = errand_of(tmp_path, output_dir=str(tmp_path / str(rows)))
        plan = errand.plan.model_copy(update={"batching": reach(16, 1, rows, rows, "memory")})
        steps = train(errand.model_copy(update={"plan": plan}), never)
        curves.append([row["loss"] for row in steps if row["kind"] == "train"])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0] == pytest.approx(curves[2], rel=1e-5)


@pytest.mark.parametrize("model", ["tiny", "tiny-t5"])
def test_the_layout_does_not_change_the_losses_nor_the_samples(model: str, tmp_path: Path) -> None:
    curves, padded = {}, {}
    for layout in ("packed", "sorted", "fixed"):
        rows = list(train(with_layout(errand_of(tmp_path, model, output_dir=str(tmp_path / layout)), layout), never))
        steps = [row for row in rows if row["kind"] == "train"]
        curves[layout] = [row["loss"] for row in rows if "loss" in row]
        padded[layout] = sum(row["padded_tokens"] for row in steps)
        assert [row["samples"] for row in steps] == [16, 16, 8]
        (verified,) = [row for row in rows if row.get("event") == "verified"]
        assert (verified["layout"], verified["asked"]) == (layout, layout)
        assert max(verified["errors"].values()) < 1e-5
    assert curves["packed"] == pytest.approx(curves["fixed"], rel=1e-5)
    assert curves["sorted"] == pytest.approx(curves["fixed"], rel=1e-5)
    assert max(padded["packed"], padded["sorted"]) < padded["fixed"]


def with_layout(errand: Train, layout: str) -> Train:
    workload = errand.plan.workload.model_copy(
        update={"layout": layout, "dropout": 0.0 if "t5" in errand.plan.workload.model else None}
    )
    return errand.model_copy(update={"plan": errand.plan.model_copy(update={"workload": workload})})


def test_a_layout_that_leaks_is_not_trained_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import forward

    monkeypatch.setattr(
        forward, "_mask", lambda model, of, to, causal: torch.zeros(len(of), 1, of.shape[1], to.shape[1])
    )
    rows = list(train(with_layout(errand_of(tmp_path), "packed"), never))
    (verified,) = [row for row in rows if row.get("event") == "verified"]
    assert (verified["asked"], verified["layout"]) == ("packed", "sorted")
    assert verified["errors"]["packed"] > 1e-2
    monkeypatch.undo()
    plain = list(train(errand_of(tmp_path, output_dir=str(tmp_path / "plain")), never))
    assert [row["loss"] for row in rows if row["kind"] == "train"] == pytest.approx(
        [row["loss"] for row in plain if row["kind"] == "train"], rel=1e-5
    )


def test_validation_is_the_mean_over_tokens_whatever_the_batch(tmp_path: Path) -> None:
    losses = []
    for rows in (1, 16):
        errand = errand_of(tmp_path, recipe=recipe(max_steps=3), output_dir=str(tmp_path / str(rows)))
        plan = errand.plan.model_copy(update={"batching": reach(16, 1, rows, rows, "memory")})
        torch.manual_seed(0)
        steps = train(errand.model_copy(update={"plan": plan}), never)
        losses += [row["loss"] for row in steps if row["kind"] == "validation"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_wish_to_stop_ends_after_the_step_with_a_model(tmp_path: Path) -> None:
    rows = list(train(errand_of(tmp_path), lambda: True))
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1]
    assert rows[-1]["event"] == "stopped"
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_a_gradient_that_is_not_finite_is_an_event_and_changes_no_weight(tmp_path: Path) -> None:
    rows = list(train(errand_of(tmp_path, recipe=recipe(learning_rate=1e30, warmup=0, epochs=2)), never))
    norms = {row["step"]: row["gradient_norm"] for row in rows if row["kind"] == "train"}
    skipped = [row["step"] for row in rows if row.get("event") == "skipped_step"]
    assert math.isfinite(norms[1])
    assert skipped == [step for step, norm in norms.items() if not math.isfinite(norm)]
    assert skipped
    losses = [row["loss"] for row in rows if row["kind"] == "validation"]
    assert repr(losses[0]) == repr(losses[1]), "all steps between the two were skipped"


def test_a_run_says_how_true_its_plan_was(tmp_path: Path) -> None:
    rows = list(train(errand_of(tmp_path), never))
    (against,) = [row for row in rows if row.get("event") == "plan_against_real"]
    assert against["real_peak_bytes"] == max(row["peak_memory_bytes"] for row in rows if row["kind"] != "event")
    assert against["real_seconds"] == pytest.approx(
        sum(row.get("seconds", 0.0) for row in rows if row["kind"] != "event")
    )
    plan = facts.plan()
    assert against["planned_peak_bytes"] == plan.memory.measured_peak_bytes
    assert plan.forecast is not None
    assert (plan.forecast.total_steps, against["step"]) == (200, 3)
    assert against["planned_seconds"] == pytest.approx(plan.forecast.total_seconds * 3 / 200)
    assert against["expected_peak_bytes"] == plan.memory.expected_peak_bytes
    tokens = sum(row.get("tokens", 0) for row in rows)
    assert tokens
    trained = sum(row["seconds"] for row in rows if row["kind"] == "train")
    assert against["real_tokens_per_second"] == pytest.approx(tokens / trained)
    assert against["planned_tokens_per_second"] == pytest.approx(tokens / (plan.forecast.seconds_per_epoch * 3 / 100))


def test_the_seconds_of_the_rows_come_to_those_of_the_loop(tmp_path: Path) -> None:
    """What the caller does with a row is part of the step after it: writing metrics is not for nothing."""
    began = time.perf_counter()
    rows = []
    for row in train(errand_of(tmp_path), never):
        rows.append(row)
        time.sleep(0.3)
    whole = time.perf_counter() - began
    timed = [row["seconds"] for row in rows if row["kind"] in ("train", "validation")]
    assert len(timed) == 4
    assert min(timed[1:]) > 0.3
    assert sum(timed) < whole


def test_epochs_differ_in_their_order() -> None:
    assert Order(40, 42, 0)[:].tolist() != Order(40, 42, 1)[:].tolist()
