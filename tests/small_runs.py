"""Whole trainings of models of two layers on uneven samples, in a few milliseconds a step: for laws over many runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import facts
from tiny_models import SEQ2SEQ, UnevenSamples, build, workload

from autotune.batching import reach
from autotune.errands import Resume, TokenIds, Train
from trainer.data import contents_of, write_store
from trainer.encode import Sample
from trainer.loop import train
from trainer.model import make_deterministic
from trainer.ranks import ALONE, Ranks

DEVICE = os.environ.get("CHATLM_TEST_DEVICE", "cpu")
"""`cuda` for the same laws on a card, by kernels that add in one order alone."""
if DEVICE == "cuda":
    make_deterministic()
Rows = list[dict[str, Any]]
VOCABULARY = 97


def small_errand(folder: Path, family: str, **changes: Any) -> Train:
    """Four epochs of 23 samples, 8 a step (the last of an epoch 7), in micro-batches of 3; dropout where there is any.

    `micro_batch_size`, `effective_batch_size`, `samples` and fields of the workload, the recipe and the errand change.
    """
    samples = changes.pop("samples", 23)
    store = _store(folder, family, samples)
    effective = changes.pop("effective_batch_size", 8)
    batching = reach(effective, changes.pop("world_size", 1), changes.pop("micro_batch_size", 3), 3, "memory")
    work = workload(family, model=str(_model(folder, family)), dropout=0.1, attention="sdpa")
    work = work.model_copy(
        update={name: changes.pop(name) for name in list(changes) if name in type(work).model_fields}
    )
    recipe = facts.recipe(epochs=4, samples=0, bleu_rows=0)
    named = {name: changes.pop(name) for name in list(changes) if name in type(recipe).model_fields}
    plan = facts.plan()
    plan = plan.model_copy(
        update={
            "workload": work,
            "batching": batching,
            "hardware": plan.hardware.model_copy(update={"device": DEVICE}),
        }
    )
    values: dict[str, Any] = {
        "plan": plan,
        "recipe": recipe.model_copy(update=named),
        "store": str(store),
        "validation_store": str(store),
        "tokenizer_dir": str(folder / "tokenizer"),
        "ids": TokenIds(pad=0, eos=1, bos=None),
        "output_dir": str(folder / "run"),
        "data_contents": contents_of(store),
        "saving": facts.saving(),
        "resume": None,
        "backend": None,
        "heartbeat_seconds": 60.0,
        "tensorboard": False,
        "time_limit": None,
        "longest": None,
    }
    Path(values["tokenizer_dir"]).mkdir(exist_ok=True)
    return Train(**(values | changes))


def going_on(errand: Train, **changes: Any) -> Train:
    """The same errand, from the newest checkpoint of its folder."""
    resume = Resume(place=changes.pop("place", errand.output_dir), weights_only=changes.pop("weights_only", False))
    return errand.model_copy(update={"resume": resume} | changes)


def run(errand: Train, stop: Callable[[Rows], bool] = lambda rows: False, ranks: Ranks = ALONE) -> Rows:
    """Train; `stop` sees the rows that there are."""
    Path(errand.output_dir).mkdir(exist_ok=True, parents=True)
    rows: Rows = []
    for row in train(errand, lambda: stop(rows), ranks):
        rows.append(row)  # the wish to stop looks at them
    return rows


def stopping_at(step: int) -> Any:
    """A wish that is there when this step is done, or while the one before is evaluated."""
    return lambda rows: len(of_kind(rows, "train")) + len(of_kind(rows, "resumed")) * rows[0]["step"] >= step - 1


def of_kind(rows: Rows, kind: str) -> Rows:
    return [row for row in rows if kind in (row["kind"], row.get("event"))]


def losses(rows: Rows) -> list[tuple[int, str, str]]:
    """Step, loss and gradient norm of each step, to the bit."""
    return [(row["step"], row["loss"].hex(), row["gradient_norm"].hex()) for row in of_kind(rows, "train")]


def evaluations(rows: Rows) -> list[tuple[int, str]]:
    return [(row["step"], row["loss"].hex()) for row in of_kind(rows, "validation")]


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def _store(folder: Path, family: str, count: int) -> Path:
    store = folder / f"store-{family}-{count}"
    if not store.exists():
        store.mkdir(parents=True)
        uneven = UnevenSamples(family, count)
        samples = [Sample(uneven.tokens(i).tolist(), uneven.spans(i).tolist()) for i in range(count)]
        write_store(samples, store, "seq2seq" if family in SEQ2SEQ else "causal", VOCABULARY)
    return store


def _model(folder: Path, family: str) -> Path:
    model = folder / f"model-{family}"
    if not model.exists():
        build(family).save_pretrained(model)
    return model
