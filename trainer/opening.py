"""What comes before the first step: the model, the proof of its layout, and the checkpoint that is gone on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autotune.errands import Train
from autotune.errors import MachineError
from autotune.plan import Layout
from trainer import manifest
from trainer.checkpoint import check_model, recover
from trainer.data import TokenStore, open_store
from trainer.evaluate import Metrics, special_tokens
from trainer.manifest import Found, Identity, check_identity
from trainer.model import build_for
from trainer.proof import TOLERANCE, first_samples, gradient_errors
from trainer.ranks import Ranks

SAFER: tuple[Layout, ...] = ("sorted", "fixed")
"""What is taken where rows of several samples are not exact."""


def identity_of(errand: Train, store: TokenStore) -> Identity:
    """Return what has to be the same for a checkpoint of this errand to be resumed."""
    return Identity(
        data=errand.data_contents,
        samples=len(store),
        tokenizer=errand.plan.workload.tokenizer_fingerprint,
        effective_batch_size=errand.plan.batching.effective_batch_size,
        seed=errand.recipe.seed,
        optimizer=errand.plan.workload.optimizer,
        frozen=errand.plan.workload.frozen,
    )


def prepare(errand: Train) -> tuple[Train, Any, TokenStore, Metrics]:
    """Build the model and prove the layout, or another, on it; return the errand with the one that holds."""
    torch.manual_seed(errand.recipe.seed)
    model = build_for(errand.plan.workload, errand.ids, torch.device(errand.plan.hardware.device))
    store = open_store(Path(errand.store), errand.longest)
    verified = _verify(errand, model, store)
    workload = errand.plan.workload.model_copy(update={"layout": verified["layout"]})
    plan = errand.plan.model_copy(update={"workload": workload})
    return errand.model_copy(update={"plan": plan}), model, store, verified


def _verify(errand: Train, model: Any, store: TokenStore) -> Metrics:
    """Prove the plan's layout on this model and its first samples, else the next that holds, and say so."""
    workload, special = errand.plan.workload, special_tokens(model, errand)
    ids = first_samples(store, errand.recipe.seed, workload)
    errors: dict[Layout, float] = {}
    for layout in dict.fromkeys((workload.layout, *SAFER)):
        errors |= gradient_errors(model, [layout], workload, store, ids, special)
        if errors[layout] <= TOLERANCE:
            break
    return {
        "kind": "event",
        "event": "verified" if errors[layout] <= TOLERANCE else "unverified",
        "step": 0,
        "layout": layout,
        "asked": workload.layout,
        "errors": errors,
    }


def find_resumed(errand: Train, store: TokenStore, model: Any, ranks: Ranks) -> Found | None:
    """Return the checkpoint that is to be gone on from, whole and of this run; None where there is none."""
    if errand.resume is None:
        return None
    if ranks.leads:
        recover(Path(errand.output_dir) / manifest.FOLDER)
    ranks.any(False)  # the others look when that is done
    found = manifest.find(Path(errand.resume.place))
    step = found.manifest.step if found else -1
    newest, negative_oldest = ranks.most(step, -step)
    if newest != -negative_oldest:
        raise MachineError(
            f"{errand.resume.place}: rank {ranks.rank} finds step {step}, another finds {newest:.0f}",
            "give a folder that all machines share",
        )
    if found is None:
        return None
    check_model(found.folder, model)
    if not errand.resume.weights_only:
        check_identity(found, identity_of(errand, store))
    return found
