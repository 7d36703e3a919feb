"""What a step needs is what torch counts of it but for attention's own products; what a device does is measured."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SEQ2SEQ, workload
from torch.utils.flop_counter import FlopCounterMode

from trainer.microbatch import SpecialTokens, WorstCase, collate, target_count
from trainer.model import build_for
from trainer.rate import copy_bytes, matrix_flops, token_flops
from trainer.step import accumulate, start

CPU = torch.device("cpu")


@pytest.mark.parametrize("frozen", [(), ("embedding", "encoder")])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_flops_of_a_token_are_those_that_torch_counts(family: str, frozen: tuple[str, ...]) -> None:
    if frozen and family not in SEQ2SEQ:
        pytest.skip("there is no encoder")
    lengths = {"max_seq_len": 32, "max_target_len": 16 if family == "t5" else 0}
    preset = "tiny" if family == "llama" else "tiny-t5"
    work = workload(
        family, model=preset, vocabulary_size=1000, frozen=frozen, dropout=0.0, attention="eager", **lengths
    )
    model = build_for(work, None, CPU)
    batch = collate([[0], [1]], WorstCase(work), work, SpecialTokens(0, 0))
    state = start(model, work, 0.1)
    with FlopCounterMode(display=False) as counter:
        accumulate(state, [batch], 1, work)
    counted = sum(n for operator, n in counter.get_flop_counts()["Global"].items() if "bmm" not in str(operator))
    targets = target_count(range(2), WorstCase(work))
    # A decoder's keys and values of the source are its weights' work on tokens that are no targets.
    assert token_flops(model).of_step(batch.tokens, targets) == pytest.approx(counted, rel=0.15 if frozen else 0.1)


def test_a_device_multiplies_matrices_at_some_rate() -> None:
    rate = matrix_flops(CPU, "fp32")
    assert 1e8 < rate < 1e15


def test_a_device_copies_memory_at_some_rate() -> None:
    assert 1e8 < copy_bytes(CPU) < 1e14
