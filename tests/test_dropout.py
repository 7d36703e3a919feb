"""Dropout's masks on a processor: as torch's own are, but for the time they take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.dropout import AT_ONCE, draw, fast_masks

COUNT = 3 * AT_ONCE + 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_each_number_is_kept_as_often_as_asked_whatever_its_neighbour_is(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    kept = draw(torch.empty(COUNT, dtype=dtype), p).double()
    deviation = (p * (1 - p) / COUNT) ** 0.5
    assert set(kept.tolist()) == {0.0, 1.0}
    assert abs(float(kept.mean()) - p) < 5 * deviation
    for distance in (1, 2, 7, AT_ONCE):
        both = float(((kept[distance:] - p) * (kept[:-distance] - p)).mean())
        assert abs(both) < 5 * p * (1 - p) / (COUNT - distance) ** 0.5


def test_a_mask_is_that_of_its_seed_and_the_next_is_another() -> None:
    torch.manual_seed(7)
    first, second = draw(torch.empty(1000), 0.5), draw(torch.empty(1000), 0.5)
    state = torch.get_rng_state()
    third = draw(torch.empty(1000), 0.5)
    torch.manual_seed(7)
    assert torch.equal(draw(torch.empty(1000), 0.5), first)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(draw(torch.empty(1000), 0.5), third)
    own = torch.Generator().manual_seed(7)
    assert torch.equal(draw(torch.empty(1000), 0.5, generator=own), first)


def test_any_shape_is_filled_and_sure_things_are_sure() -> None:
    whole = torch.full((6, 10), 9.0)
    draw(whole.t()[::2], 0.5)
    assert set(whole[:, ::2].unique().tolist()) == {0.0, 1.0}
    assert (whole[:, 1::2] == 9).all()
    assert draw(torch.empty(100), 1.0).all()
    assert not draw(torch.empty(100), 0.0).any()
    assert draw(torch.empty(0), 0.5).numel() == 0
    assert draw(torch.empty(()), 0.5).item() in (0.0, 1.0)


def layer(x: Tensor) -> Tensor:
    return torch.nn.Dropout(0.25)(x)


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.25)


@pytest.mark.parametrize("drop", [layer, attention])
def test_what_a_model_drops_is_drawn_so_inside_and_as_before_outside(drop: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 1, 64, 64, requires_grad=True)

    def dropped() -> Tensor:
        torch.manual_seed(3)
        return drop(x)

    before = dropped()
    with fast_masks():
        inside = dropped()
        inside.sum().backward()
    assert not torch.equal(inside, before)
    assert torch.equal(dropped(), before)
    if drop is layer:
        torch.manual_seed(3)
        mask = draw(torch.empty_like(x), 0.75)
        assert torch.equal(inside, x * (mask / 0.75))
        assert torch.equal(x.grad, mask / 0.75)  # type: ignore[arg-type]
