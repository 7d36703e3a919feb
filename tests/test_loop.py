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
from transformers import AutoModelForCausalLM

from autotune.batching import reach
from autotune.errands import Preprocess, Train
from trainer import loop as loop_room
from trainer.data import Order, TokenStore, write_store
from trainer.encode import Sample
from trainer.loop import train
from trainer.preprocess import preprocess
from trainer.progress import Best


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
            cache_dir=str(tmp_path.parent / "cache"),  # tokenized once for all tests
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
        "tensorboard": False,
        "time_limit": None,
        "longest": None,
        "data_contents": done.data.contents,
        "saving": facts.saving(),
        "resume": None,
        "backend": None,
        "heartbeat_seconds": 60.0,
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
    rows = list(train(errand_of(tmp_path, recipe=recipe(learning_rate=1e30, warmup=0, epochs=1.4)), never))
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
    assert against["real_peak_bytes"] == max(row["peak_memory_bytes"] for row in rows if "peak_memory_bytes" in row)
    assert against["real_seconds"] == pytest.approx(sum(row.get("seconds", 0.0) for row in rows))
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


def test_rows_that_are_read_a_step_late_are_the_same_rows_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card, which computes a step while the next is laid out."""
    runs = []
    for name, waits in (("at once", ("cpu",)), ("late", ())):
        monkeypatch.setattr(loop_room, "WAITS", waits)
        errand = errand_of(tmp_path, recipe=recipe(epochs=2, eval_every=2), output_dir=str(tmp_path / name))
        runs.append([(row["kind"], row["step"], row.get("loss")) for row in train(errand, never)])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("asked", [1, 2, 3, 4, 5])
def test_a_run_that_is_stopped_loses_no_row_that_would_be_read_late(
    asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_room, "WAITS", ())
    calls: list[int] = []
    rows = list(train(errand_of(tmp_path, recipe=recipe(epochs=3)), lambda: calls.append(1) or len(calls) >= asked))
    assert rows[-1]["event"] == "stopped"
    assert [row["step"] for row in kinds(rows, "train")] == list(range(1, rows[-1]["step"] + 1))


def test_epochs_differ_in_their_order() -> None:
    assert Order(40, 42, 0)[:].tolist() != Order(40, 42, 1)[:].tolist()


def kinds(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.parametrize(
    ("eval_every", "epochs", "steps"), [(None, 2, [3, 6]), (2, 2, [2, 4, 6]), (4, 2, [4, 6]), (None, 1.4, [3, 5])]
)
def test_each_epoch_or_every_so_many_steps_is_evaluated_and_the_last_step_always(
    eval_every: int | None, epochs: float, steps: list[int], tmp_path: Path
) -> None:
    rows = list(train(errand_of(tmp_path, recipe=recipe(eval_every=eval_every, epochs=epochs)), never))
    assert [row["step"] for row in kinds(rows, "validation")] == steps
    assert [row["step"] for row in kinds(rows, "sample")] == steps
    assert all(row["samples"] == 40 for row in kinds(rows, "validation")), "the whole set"


@pytest.mark.parametrize(("eval_every", "steps"), [(None, [6]), (2, [2, 4, 6])])
def test_without_validation_data_prompts_are_answered_at_the_end_or_as_often_as_asked(
    eval_every: int | None, steps: list[int], tmp_path: Path
) -> None:
    how = recipe(eval_every=eval_every, epochs=2, prompts=("你好", "再见"))
    rows = list(train(errand_of(tmp_path, recipe=how, validation_store=None), never))
    assert [row["step"] for row in kinds(rows, "sample")] == [step for step in steps for _ in range(3)]
    assert [row["prompt"] for row in kinds(rows, "sample")][:2] == ["你好", "再见"]
    assert [row["step"] for row in rows if row.get("event") == "sampled"] == steps
    assert not kinds(rows, "validation")
    assert "best_step" not in rows[-1]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"checkpoints", "model"}


@pytest.mark.parametrize("model", ["tiny", "tiny-t5"])
def test_evaluation_changes_no_step_to_the_bit(model: str, tmp_path: Path) -> None:
    """Dropout is drawn from the same random numbers (T5 has some), and the model trains on as if nothing had been."""
    curves = []
    for name, changes in {
        "without": {"recipe": recipe(epochs=2, samples=0), "validation_store": None},
        "with": {"recipe": recipe(epochs=2, eval_every=1, bleu_rows=8, samples=2, prompts=("你好",))},
    }.items():
        rows = list(train(errand_of(tmp_path, model, output_dir=str(tmp_path / name), **changes), never))
        curves.append([(row["loss"].hex(), row["gradient_norm"].hex()) for row in kinds(rows, "train")])
    assert curves[0] == curves[1]


def overfitting(tmp_path: Path, **changes: Any) -> Train:
    """Trained on ten rows, evaluated on all: soon it learns the ten by heart, and the others are the worse for it."""
    errand = errand_of(tmp_path)
    few = tmp_path / "few"
    few.mkdir(exist_ok=True)
    store = TokenStore(Path(errand.store))
    samples = [Sample(store.tokens(i).tolist(), store.spans(i).tolist()) for i in range(10)]
    write_store(samples, few, "causal", 6400)
    how = {"epochs": 40, "eval_every": 2, "learning_rate": 3e-3, "samples": 0, "bleu_rows": 0, "schedule": "constant"}
    return errand.model_copy(update={"store": str(few), "recipe": recipe(**(how | changes))})


def test_early_stopping_ends_after_its_patience_and_the_best_model_is_kept(tmp_path: Path) -> None:
    errand = overfitting(tmp_path, early_stopping=2)
    rows = list(train(errand, never))
    losses = {row["step"]: row["loss"] for row in kinds(rows, "validation")}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 2 * 2 < 40, "two evaluations after the best, and before the end"
    (stopped,) = [row for row in rows if row.get("event") == "early_stopping"]
    assert (stopped["step"], stopped["best_step"], stopped["best_loss"]) == (best + 4, best, losses[best])
    finished = rows[-1]
    assert (finished["event"], finished["step"], finished["best_step"]) == ("finished", best + 4, best)
    assert finished["best_loss"] == losses[best]
    assert (finished["model"], finished["best_model"]) == (str(tmp_path / "run/model"), str(tmp_path / "run/best"))
    improved = [row["step"] for row in kinds(rows, "validation") if row["best"]]
    assert improved == [step for step in losses if losses[step] == min(v for s, v in losses.items() if s <= step)]
    assert plain_loss(finished["best_model"], errand) == pytest.approx(losses[best], rel=1e-5)
    assert plain_loss(finished["model"], errand) == pytest.approx(losses[max(losses)], rel=1e-5)


def plain_loss(folder: str, errand: Train) -> float:
    """The mean loss of the validation targets, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    store = TokenStore(Path(errand.validation_store or ""))
    total, count = 0.0, 0
    for i in range(len(store)):
        tokens = torch.as_tensor(store.tokens(i).astype("int64"))
        for start, end in store.spans(i).tolist():
            with torch.no_grad():
                logits = model(input_ids=tokens[None]).logits[0, start - 1 : end - 1]
            total += float(torch.nn.functional.cross_entropy(logits, tokens[start:end], reduction="sum"))
            count += end - start
    return total / count


def test_where_the_last_model_is_the_best_there_are_not_two_of_it(tmp_path: Path) -> None:
    errand = errand_of(tmp_path, recipe=recipe(epochs=2, samples=0, bleu_rows=0))
    rows = list(train(errand, never))
    first, last = kinds(rows, "validation")
    assert (first["best"], last["best"]) == (True, True)
    assert rows[-1]["best_model"] == rows[-1]["model"] == str(tmp_path / "run" / "model")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"checkpoints", "model"}
    assert plain_loss(rows[-1]["model"], errand) == pytest.approx(last["loss"], rel=1e-5)


def test_a_run_that_is_stopped_keeps_the_best_beside_the_last(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    steps = train(errand_of(tmp_path, recipe=recipe(epochs=9, samples=0, bleu_rows=0)), lambda: len(rows) > 7)
    for row in steps:
        rows.append(row)  # noqa: PERF402 # the wish to stop looks at them
    assert rows[-1]["event"] == "stopped"
    assert (rows[-1]["best_step"], rows[-1]["step"]) == (3, 5)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"best", "checkpoints", "model"}


def test_losses_that_are_no_number_are_never_the_best_and_stop_a_run_early(tmp_path: Path) -> None:
    best = Best()
    assert not best.take(1, math.nan)
    assert (best.told(), best.without) == ({}, 1)
    assert best.take(2, 5.0)
    assert not best.take(3, 5.0), "as good is not better"
    assert (best.step, best.loss, best.without) == (2, 5.0, 1)
