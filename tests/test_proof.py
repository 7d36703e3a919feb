"""The proof at the start: it holds for real models, and sees each way in which packed rows can go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MODELS, UnevenSamples, build, workload

from autotune.errors import ConfigurationError
from autotune.plan import Layout
from trainer import forward as forward_room
from trainer import loss as loss_room
from trainer.data import TokenStore, write_store
from trainer.encode import Sample
from trainer.microbatch import SpecialTokens
from trainer.proof import TOLERANCE, Short, first_samples, gradient_errors

LAYOUTS: tuple[Layout, ...] = ("packed", "sorted", "fixed")


@pytest.fixture
def store_of(tmp_path: Path) -> Any:
    def make(family: str) -> TokenStore:
        samples, task = UnevenSamples(family, 40), workload(family).task
        made = (Sample(samples.tokens(i).tolist(), [(int(s), int(e)) for s, e in samples.spans(i)]) for i in range(40))
        write_store(made, tmp_path, task, 97)
        return TokenStore(tmp_path)

    return make


def errors(model: Any, family: str, store: TokenStore, **changes: Any) -> dict[Layout, float]:
    work = workload(family, **changes)
    return gradient_errors(model, LAYOUTS, work, store, first_samples(store, 42, work), SpecialTokens(0, 0))


@pytest.mark.parametrize("family", MODELS)
def test_each_layout_is_proven_exact_and_the_model_left_as_it_was(family: str, store_of: Any) -> None:
    model = build(family).train()
    before, generator = [p.clone() for p in model.parameters()], torch.get_rng_state()
    found = errors(
        model, family, store_of(family), max_seq_len=64, max_target_len=64 if family in ("t5", "bart") else 0
    )
    assert found.keys() == set(LAYOUTS)
    assert max(found.values()) < 1e-5
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("family", MODELS)
def test_a_leak_between_samples_of_a_row_is_seen(family: str, store_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that know padding, and what lies to the right, but not where one sample ends."""
    honest = forward_room._mask

    def leaking(model: Any, of: Any, to: Any, *, causal: bool) -> Any:
        return honest(model, (of != 0).long(), (to != 0).long(), causal=causal)

    monkeypatch.setattr(forward_room, "_mask", leaking)
    found = errors(build(family), family, store_of(family), max_seq_len=64, max_target_len=64)
    assert found["packed"] > 10 * TOLERANCE
    assert max(found["sorted"], found["fixed"]) < TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_positions_that_go_on_counting_are_seen(family: str, store_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = build(family), store_of(family)
    if family == "gpt2":
        theirs = model.forward
        monkeypatch.setattr(model, "forward", lambda position_ids=None, **given: theirs(**given))
    else:
        monkeypatch.setattr(forward_room.nn, "Embedding", type("Other", (), {}))
    assert errors(model, family, store, max_seq_len=64, max_target_len=64)["packed"] > 10 * TOLERANCE


def test_samples_too_long_to_share_a_row_are_proven_one_by_one(tmp_path: Path) -> None:
    long = [Sample(list(range(2, 62)), [(1, 60)]) for _ in range(5)]
    write_store(long, tmp_path, "causal", 97)
    found = errors(build("llama"), "llama", TokenStore(tmp_path), max_seq_len=64)
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize("family", ["gemma2", "bart"])
def test_a_loss_head_that_leaves_out_what_the_model_does_to_its_logits_is_refused(
    family: str, store_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = build(family), store_of(family)
    if family == "bart":
        model.final_logits_bias.normal_()
    else:
        model.config.final_logit_softcapping = 0.5
    assert max(errors(model, family, store, loss_head="chunked").values()) < 1e-5
    monkeypatch.setattr(loss_room, "_tail", lambda model: model.get_output_embeddings())
    with pytest.raises(ConfigurationError, match="chunked loss head changes the gradient") as error:
        errors(model, family, store, loss_head="chunked")
    assert "--loss-head full" in str(error.value.hint)


def test_a_model_whose_gradient_is_no_number_is_refused(tmp_path: Path) -> None:
    write_store([Sample(list(range(2, 12)), [(1, 10)])] * 4, tmp_path, "causal", 97)
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ConfigurationError, match="not finite"):
        errors(model, "llama", TokenStore(tmp_path))


def test_data_that_begins_without_a_target_proves_nothing_and_is_no_error(tmp_path: Path) -> None:
    write_store([Sample([2, 3, 4], [])] * 300 + [Sample([2, 3, 4], [(1, 3)])], tmp_path, "causal", 97)
    found = errors(build("llama"), "llama", TokenStore(tmp_path))
    assert found.keys() == set(LAYOUTS)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_samples_it_is_proven_on_are_short_and_have_targets(family: str, store_of: Any) -> None:
    store, work = store_of(family), workload(family)
    short = Short(store, work)
    for i in range(len(store)):
        tokens, spans = short.tokens(i), short.spans(i)
        source = spans[0, 0] if family == "t5" else len(tokens)
        assert max(source, len(tokens) - source) <= 32 // 4
        assert all(0 < start < end <= len(tokens) for start, end in spans)
        ours = [t for start, end in spans for t in tokens[start:end].tolist()]
        theirs = [t for start, end in store.spans(i) for t in store.tokens(i)[start:end].tolist()]
        assert ours == (theirs[: len(ours)] if family == "t5" else theirs[len(theirs) - len(ours) :])
