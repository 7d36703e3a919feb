"""One step: the same gradient however it is cut, the update asked for, and no harm from numbers that are none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import MODELS, UnevenSamples, build, workload
from torch import Tensor

from autotune.batching import share_of
from autotune.plan import Layout, LossHead, Precision, Workload
from trainer import loss as loss_room
from trainer.microbatch import MicroBatch, SpecialTokens, lay_out, target_count
from trainer.step import TrainState, accumulate, start, train_step, update

EFFECTIVE = 31
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


FP32, FP16 = workload("llama"), workload("llama", precision="fp16")
"""Of a workload, a step knows the precision and the loss head alone."""


def new_state(family: str, dtype: torch.dtype = torch.float32, work: Workload = FP32) -> TrainState:
    return start(build(family, dtype), work, weight_decay=0.1)


def gradient_of(state: TrainState) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in state.model.named_parameters() if p.grad is not None}


def cut(family: str, samples: UnevenSamples, ids: range, rows: int, layout: Layout = "fixed") -> list[MicroBatch]:
    return lay_out(ids, rows, samples, workload(family, layout=layout), SpecialTokens(0, 0))


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    difference = torch.stack([(one[name] - other[name]).double().norm() for name in other]).norm()
    return float(difference / torch.stack([g.double().norm() for g in other.values()]).norm())


# Gemma's attention is computed in fp32 whatever the model is.
FAMILIES = [(family, torch.float32) for family in ("llama", "t5", "gemma2")]
FAMILIES += [(family, torch.float64) for family in MODELS if family != "gemma2"]
CUTS = [(1, 1), (1, 7), (1, 16), (1, 31), (2, 3), (2, 16), (3, 2), (3, 7)]
"""Ranks, and rows of a micro-batch: shares that rows go into evenly and unevenly, and those that one holds whole."""


@pytest.mark.parametrize(
    ("layout", "loss_head"),
    [("packed", "full"), ("sorted", "full"), ("fixed", "full"), ("packed", "chunked"), ("fixed", "chunked")],
)
@pytest.mark.parametrize(("family", "dtype"), FAMILIES)
def test_any_layout_loss_head_rows_and_ranks_give_the_gradient_of_the_whole_batch(
    family: str, dtype: torch.dtype, layout: Layout, loss_head: LossHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_room, "LEAST_CHUNK", 16)
    monkeypatch.setattr(loss_room, "LOGITS", 0)
    samples, ids = UnevenSamples(family, EFFECTIVE), range(EFFECTIVE)
    targets = target_count(ids, samples)
    state, work = new_state(family, dtype), workload(family, loss_head=loss_head)
    whole_loss = accumulate(state, cut(family, samples, ids, EFFECTIVE), targets, FP32)
    whole = gradient_of(state)
    for world_size, rows in CUTS:
        state.optimizer.zero_grad()
        loss, first = torch.zeros(()), 0
        for rank in range(world_size):
            # What ranks would add up by an all-reduce is added up here: each holds its share's gradient.
            share = ids[first : (first := first + share_of(EFFECTIVE, world_size, rank))]
            loss = loss + accumulate(state, cut(family, samples, share, rows, layout), targets, work)
        assert first == EFFECTIVE
        assert distance(gradient_of(state), whole) <= TOLERANCE[dtype], (world_size, rows)
        assert loss.item() == pytest.approx(whole_loss.item(), rel=TOLERANCE[dtype])


def one_step(state: TrainState, family: str, work: Workload = FP32, **changes: float) -> tuple[Tensor, Tensor]:
    samples, ids = UnevenSamples(family, 4), range(4)
    options = {"learning_rate": 1e-2, "clip": 1.0} | changes
    return train_step(state, cut(family, samples, ids, 2), target_count(ids, samples), work, **options)


def weights(state: TrainState) -> list[Tensor]:
    return [p.detach().clone() for p in state.model.parameters()]


def test_the_update_is_that_of_plain_adamw_on_the_clipped_gradient() -> None:
    ours, plain = new_state("llama"), build("llama")
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=False)
    samples, ids = UnevenSamples("llama", 4), range(4)
    scratch = start(plain, FP32, 0.1)
    for _ in range(3):
        _, norm = one_step(ours, "llama", clip=0.05)
        accumulate(scratch, cut("llama", samples, ids, 4), target_count(ids, samples), FP32)
        theirs = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        assert norm.item() == pytest.approx(theirs.item(), rel=1e-4)
        assert norm.item() > 0.05
    for mine, reference in zip(weights(ours), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, reference.detach(), rtol=1e-4, atol=1e-5)


def test_without_clipping_the_norm_is_told_and_the_gradient_left_alone() -> None:
    clipped, free = new_state("llama"), new_state("llama")
    one_step(clipped, "llama", clip=1e9)
    _, norm = one_step(free, "llama", clip=0.0)
    assert norm > 0
    assert all(torch.equal(a, b) for a, b in zip(weights(clipped), weights(free), strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_no_weight_and_no_moment(poison: float) -> None:
    state = new_state("llama")
    one_step(state, "llama")
    before = weights(state)
    moments = [s["exp_avg"].clone() for s in state.optimizer.state.values()]
    steps = [s["step"].item() for s in state.optimizer.state.values()]
    samples, ids = UnevenSamples("llama", 4), range(4)
    accumulate(state, cut("llama", samples, ids, 4), target_count(ids, samples), FP32)
    next(state.model.parameters()).grad[0, 0] = poison
    norm = update(state, torch.zeros(()), FP32, 1e-2, 1.0)
    assert not torch.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(weights(state), before, strict=True))
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(state.optimizer.state.values(), moments, strict=True))
    assert [s["step"].item() for s in state.optimizer.state.values()] == steps


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_half_precision_gives_nearly_the_same_loss_and_gradient_norm(precision: Precision, tolerance: float) -> None:
    loss, norm = one_step(new_state("llama"), "llama")
    work = workload("llama", precision=precision)
    half_loss, half_norm = one_step(new_state("llama", work=work), "llama", work)
    assert half_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert half_norm.item() == pytest.approx(norm.item(), rel=tolerance)
    assert half_loss.item() != loss.item()


def test_the_fp16_loss_scale_halves_after_an_overflow_and_doubles_after_many_good_steps() -> None:
    state = new_state("llama", work=FP16)
    first = state.loss_scale.item()
    accumulate(state, cut("llama", UnevenSamples("llama", 2), range(2), 2), 1, FP16)
    next(state.model.parameters()).grad[0, 0] = float("inf")
    update(state, torch.zeros(()), FP16, 1e-3, 1.0)
    assert state.loss_scale.item() == first / 2
    state.steps_since_overflow.fill_(1999)
    one_step(state, "llama", FP16)
    assert state.loss_scale.item() == first
    assert state.steps_since_overflow.item() == 0


def test_vectors_are_not_decayed() -> None:
    decays: dict[float, set[int]] = {}
    for group in new_state("gpt2").optimizer.param_groups:
        decays.setdefault(group["weight_decay"], set()).update(p.ndim for p in group["params"])
    assert decays == {0.1: {2}, 0.0: {1}}


def test_a_step_without_a_single_target_is_no_nan() -> None:
    class Nothing:
        def tokens(self, i: int) -> Any:
            return torch.tensor([3, 4, 5]).numpy()

        def spans(self, i: int) -> Any:
            return torch.empty(0, 2, dtype=torch.int32).numpy()

    state = new_state("llama")
    batches = lay_out(range(2), 2, Nothing(), workload("llama"), SpecialTokens(0, 0))
    loss, norm = train_step(state, batches, target_count(range(2), Nothing()), FP32, 1e-3, 1.0)
    assert loss.item() == 0
    assert norm.item() == 0
    assert all(torch.isfinite(p).all() for p in state.model.parameters())


@pytest.mark.parametrize("loss_head", ["full", "chunked"])
@pytest.mark.parametrize("layout", ["packed", "sorted", "fixed"])
def test_the_step_runs_under_fake_tensors(layout: Layout, loss_head: LossHead) -> None:
    """A trace takes the very same step: no shape depends on data, and nothing is read back."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    samples, ids = UnevenSamples("t5", 4), range(4)
    work = workload("t5", precision="bf16", loss_head=loss_head)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        state = start(MODELS["t5"](), work, 0.1)
        batches = [
            replace(
                batch,
                inputs={name: mode.from_tensor(tensor) for name, tensor in batch.inputs.items()},
                target_positions=mode.from_tensor(batch.target_positions),
                targets=mode.from_tensor(batch.targets),
            )
            for batch in cut("t5", samples, ids, 2, layout)
        ]
        loss, norm = train_step(state, batches, target_count(ids, samples), work, 1e-3, 1.0)
    assert loss.shape == norm.shape == ()
