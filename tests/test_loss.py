"""The loss is the model's own, summed over the targets."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS, SEQ2SEQ, UnevenSamples, build, workload

from trainer.loss import loss_sum
from trainer.microbatch import SpecialTokens, collate


@pytest.mark.parametrize("family", MODELS)
def test_it_equals_the_loss_that_transformers_computes_from_labels(family: str) -> None:
    model = build(family, torch.float64).eval()
    samples, ids = UnevenSamples(family, 6), range(6)
    start = model.config.decoder_start_token_id if family in SEQ2SEQ else 0
    batch = collate([[i] for i in ids], samples, workload(family), SpecialTokens(0, int(start or 0)))
    ours = loss_sum(model, batch)

    theirs = torch.zeros((), dtype=torch.float64)
    for i in ids:
        tokens = torch.as_tensor(samples.tokens(i)).long()[None]
        spans = samples.spans(i)
        if family in SEQ2SEQ:
            source, target = tokens[:, : spans[0, 0]], tokens[:, spans[0, 0] :]
            theirs += model(input_ids=source, labels=target).loss * target.numel()
        else:
            labels = torch.full_like(tokens, -100)
            for first, last in spans:
                labels[:, first:last] = tokens[:, first:last]
            theirs += model(input_ids=tokens, labels=labels).loss * (labels != -100).sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)  # transformers' own loss is fp32
    assert ours.item() > 0


def test_logits_of_positions_without_a_target_never_exist() -> None:
    model = build("llama")
    seen = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.shape))
    batch = collate([[i] for i in range(6)], UnevenSamples("llama", 6), workload("llama"), SpecialTokens(0, 0))
    loss_sum(model, batch)
    assert seen == [(1, len(batch.targets), 97)]
    assert len(batch.targets) < batch.tokens


def test_a_model_is_left_as_it_was() -> None:
    model = build("llama")
    batch = collate([[i] for i in range(2)], UnevenSamples("llama", 2), workload("llama"), SpecialTokens(0, 0))
    loss_sum(model, batch)
    assert not model.lm_head._forward_pre_hooks
