"""What kept a run from being faster is the greatest share, and nothing is said of what is little."""

from __future__ import annotations

from typing import Any

import facts
import pytest

from autotune.bottleneck import WINDOW, Spent, bottleneck
from autotune.plan import Plan


def plan(**changes: Any) -> Plan:
    hardware = facts.hardware(device=changes.pop("device", "cpu"))
    speed = facts.speed(**({"alpha_seconds": 0.01, "update_seconds": 0.01} | changes))
    return facts.plan(hardware=hardware, speed=speed)


def spent(steps: int = 100, later: float = 1.0, **changes: Any) -> Spent:
    account = Spent()
    for step in range(steps):
        values = {
            "seconds": 1.0,
            "data_seconds": 0.01,
            "tokens": 95,
            "padded_tokens": 100,
            "micro_batches": 4,
        } | changes
        account.add(**(values | {"seconds": values["seconds"] * (later if step > steps / 2 else 1.0)}))
    return account


def test_a_run_that_computes_has_nothing_to_be_told() -> None:
    assert bottleneck(spent(), plan()) is None
    assert bottleneck(Spent(), plan()) is None


@pytest.mark.parametrize(
    ("changes", "speed", "what", "share"),
    [
        ({"data_seconds": 0.4}, {}, "waiting for data", 0.4),
        ({"data_seconds": 0.4, "tokens": 75}, {"device": "cuda"}, "padding", 0.25),
        ({"tokens": 40}, {}, "padding", 0.6),
        ({"later": 2.0}, {}, "last steps", 0.5),
        ({"micro_batches": 50}, {}, "starting micro-batches", 0.5),
        ({}, {"update_seconds": 0.3}, "the optimizer", 0.3),
        ({"data_seconds": 0.4, "tokens": 50}, {}, "padding", 0.5),
    ],
)
def test_the_greatest_share_is_named_with_what_to_do(changes: Any, speed: Any, what: str, share: float) -> None:
    found = bottleneck(spent(**changes), plan(**speed))
    assert found is not None
    assert what in found.what
    assert found.share == pytest.approx(share, abs=0.02)


def test_nothing_took_more_than_all_of_the_time() -> None:
    assert bottleneck(spent(micro_batches=150), plan()) is None
    found = bottleneck(spent(micro_batches=150, tokens=50), plan())
    assert found is not None
    assert "padding" in found.what


def test_a_short_run_is_not_said_to_slow_down() -> None:
    assert bottleneck(spent(steps=2 * WINDOW, later=3.0), plan()) is None


def test_padding_of_plain_rows_is_left_by_packing_them() -> None:
    plain = plan()
    packed = plain.model_copy(update={"workload": plain.workload.model_copy(update={"layout": "packed"})})
    advice = [bottleneck(spent(tokens=40), p) for p in (plain, packed)]
    assert advice[0] is not None
    assert "--layout packed" in advice[0].advice
    assert advice[1] is not None
    assert "--layout" not in advice[1].advice


def test_larger_micro_batches_are_had_by_memory_only_where_memory_is_what_limits_them() -> None:
    tight = plan()
    others = tight.model_copy(update={"batching": tight.batching.model_copy(update={"limited_by": "effective_batch"})})
    advice = [bottleneck(spent(micro_batches=50), p) for p in (tight, others)]
    assert tight.batching.limited_by == "memory"
    assert advice[0] is not None
    assert advice[1] is not None
    assert "memory" in advice[0].advice
    assert "--effective-batch-size" in advice[1].advice


def test_without_a_measured_speed_the_rest_is_still_told() -> None:
    found = bottleneck(spent(tokens=40), plan().model_copy(update={"speed": None}))
    assert found is not None
    assert "padding" in found.what
