"""Adafactor is the paper's, at the rate that is asked for; it skips what is not finite, and keeps next to nothing."""

from __future__ import annotations

import pytest
import torch
from tiny_models import UnevenSamples, build, workload
from torch import Tensor

from trainer.microbatch import SpecialTokens, lay_out, target_count
from trainer.step import TrainState, accumulate, start, train_step, update

WORK = workload("llama", optimizer="adafactor")


def new_state() -> TrainState:
    return start(build("llama"), WORK, weight_decay=0.1)


def step(state: TrainState, rate: float = 1e-3) -> None:
    samples, ids = UnevenSamples("llama", 4), range(4)
    batches = lay_out(ids, 2, samples, WORK, SpecialTokens(0, 0))
    train_step(state, batches, target_count(ids, samples), WORK, rate, clip=1.0)


def weights(state: TrainState) -> list[Tensor]:
    return [p.detach().clone() for p in state.model.parameters()]


def test_it_is_torchs_own_without_its_scaling_by_the_size_of_a_weight() -> None:
    """torch scales by max(eps, size of the weight): at an eps above the sizes there are, by a constant."""
    ours, plain = new_state(), build("llama")
    assert max(p.square().mean().sqrt() for p in plain.parameters()) <= 1
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    theirs = torch.optim.Adafactor(groups, lr=1e-3, eps=(1e-30, 1.0))
    scratch = start(plain, WORK, 0.1)
    samples, ids = UnevenSamples("llama", 4), range(4)
    for _ in range(4):
        step(ours)
        batches = lay_out(ids, 2, samples, WORK, SpecialTokens(0, 0))
        accumulate(scratch, batches, target_count(ids, samples), WORK)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        theirs.step()
        theirs.zero_grad()
    for mine, reference in zip(weights(ours), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, reference.detach(), rtol=1e-4, atol=1e-5)


def test_the_learning_rate_acts() -> None:
    moved = {}
    for rate in (1e-3, 2e-3):
        state = new_state()
        before = weights(state)
        step(state, rate)
        changes = [(a - b).abs().sum() for a, b in zip(weights(state), before, strict=True)]
        moved[rate] = torch.stack(changes).sum().item()
    assert moved[2e-3] == pytest.approx(2 * moved[1e-3], rel=1e-3)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(steps_before: int) -> None:
    state, other = new_state(), new_state()
    for _ in range(steps_before):
        step(state)
        step(other)
    samples, ids = UnevenSamples("llama", 4), range(4)
    accumulate(state, lay_out(ids, 2, samples, WORK, SpecialTokens(0, 0)), target_count(ids, samples), WORK)
    next(state.model.parameters()).grad[0, 0] = float("nan")
    assert not update(state, torch.zeros(()), WORK, 1e-3, 1.0).isfinite()
    step(state)
    step(other)
    assert all(torch.equal(a, b) for a, b in zip(weights(state), weights(other), strict=True))
    assert all(torch.isfinite(p).all() for p in weights(state))


def test_it_keeps_of_a_matrix_its_rows_and_columns() -> None:
    state = new_state()
    step(state)
    for parameter, kept in state.optimizer.state.items():
        numbers = sum(tensor.numel() for name, tensor in kept.items() if name != "step")
        assert numbers == (sum(parameter.shape) if parameter.ndim == 2 else parameter.numel())
