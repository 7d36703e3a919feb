"""What a worker says of the machine: the rates of the device that it is asked for, where torch sees that one."""

from __future__ import annotations

import pytest
import torch

from autotune.errands import ERRAND, Probe
from trainer.probe import probe


def test_a_processor_is_measured_at_each_precision_that_is_asked_for() -> None:
    found = probe(Probe(device="cpu", precisions=("fp32", "bf16")))
    assert list(found.matrix_flops) == ["fp32", "bf16"]
    assert min(*found.matrix_flops.values(), found.copy_bytes or 0) > 1e7
    assert (found.failed, found.why_not, found.threads) == ("", "", torch.get_num_threads())
    assert found.seconds < 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_torch_does_not_see_is_not_measured_and_the_reason_is_told() -> None:
    found = probe(Probe(device="cuda", precisions=("fp32",)))
    assert (found.sees_card, found.matrix_flops, found.copy_bytes, found.failed) == (False, {}, None, "")
    assert found.why_not


def test_it_crosses_the_pipe_as_the_errand_that_it_is() -> None:
    errand = Probe(device="cpu", precisions=("fp32",))
    assert ERRAND.validate_json(errand.model_dump_json()) == errand
