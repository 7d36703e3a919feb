"""The loss is the model's own, summed over the targets, whatever the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import DECODER, MODELS, SEQ2SEQ, UnevenSamples, build, workload
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from autotune.plan import LossHead, Precision
from trainer import loss as loss_room
from trainer.loss import KNOWN_TAILS, loss_sum
from trainer.microbatch import MicroBatch, SpecialTokens, collate
from trainer.step import autocast


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_room, "LEAST_CHUNK", 16)
    monkeypatch.setattr(loss_room, "LOGITS", 0)


def batch_of(family: str, samples: int = 6) -> MicroBatch:
    model = build(family)
    start = model.config.decoder_start_token_id if family in SEQ2SEQ else 0
    rows, special = [[i] for i in range(samples)], SpecialTokens(0, int(start or 0))
    return collate(rows, UnevenSamples(family, samples), workload(family), special)


@pytest.mark.parametrize("loss_head", ["full", "chunked"])
@pytest.mark.parametrize("family", MODELS)
def test_it_equals_the_loss_that_transformers_computes_from_labels(family: str, loss_head: LossHead) -> None:
    model, samples = build(family, torch.float64).eval(), UnevenSamples(family, 6)
    ours = loss_sum(model, batch_of(family), loss_head)

    theirs = torch.zeros((), dtype=torch.float64)
    for i in range(6):
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
    with torch.no_grad():
        assert loss_sum(model, batch_of(family), loss_head).item() == pytest.approx(ours.item(), rel=1e-12)


def gradients(model: Any, batch: MicroBatch, loss_head: LossHead, precision: Precision) -> Tensor:
    with autocast(torch.device("cpu"), precision):
        loss = loss_sum(model, batch, loss_head)
    (loss * 0.5).backward()
    gathered = [p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(gathered)


@pytest.mark.parametrize("frozen", ["nothing", "the head", "all but the head"])
@pytest.mark.parametrize("family", MODELS)
def test_chunks_give_the_gradient_of_the_whole_whatever_is_frozen(family: str, frozen: str) -> None:
    model, batch = build(family, torch.float64), batch_of(family)
    assert len(batch.targets) > 2 * 16
    head = set(model.get_output_embeddings().parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(frozen == "nothing" or (parameter in head) is (frozen == "all but the head"))
    whole = gradients(model, batch, "full", "fp32")
    moved = gradients(model, batch, "chunked", "fp32") - whole
    # Gemma's attention is computed in fp32 whatever the model is.
    assert moved.norm() <= whole.norm() * (1e-6 if family == "gemma2" else 1e-12)
    assert whole.norm() > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_chunks_are_as_near_to_fp32_as_the_whole_is_in_half_precision(precision: Precision) -> None:
    model, batch = build("llama"), batch_of("llama")
    exact = gradients(model, batch, "full", "fp32")
    whole, chunked = (gradients(model, batch, head, precision) - exact for head in ("full", "chunked"))
    assert chunked.norm() <= 1.2 * whole.norm()
    assert chunked.norm() > 0


@pytest.mark.parametrize("loss_head", ["full", "chunked"])
def test_logits_of_positions_without_a_target_never_exist_and_in_chunks_not_those_of_all(loss_head: LossHead) -> None:
    model, batch, seen = build("llama"), batch_of("llama"), []
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.shape[:-1].numel()))
    loss_sum(model, batch, loss_head)
    targets = len(batch.targets)
    assert targets < batch.tokens
    if loss_head == "full":
        assert seen == [targets]
    else:
        assert seen == [1, *[16] * (targets // 16), *[targets % 16] * (targets % 16 > 0)]


@pytest.mark.parametrize("family", sorted(KNOWN_TAILS))
def test_every_family_whose_head_is_taken_in_chunks_unasked_has_the_same_gradient(family: str) -> None:
    sizes = DECODER | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "layer_norm_eps": 1e-5}
    config = AutoConfig.for_model(family, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    kind = "t5" if config.is_encoder_decoder else "llama"
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for buffer in (b for name, b in model.named_buffers() if name == "final_logits_bias"):
        buffer.normal_()
    batch = batch_of(kind)
    whole = gradients(model, batch, "full", "fp32")
    assert (gradients(model, batch, "chunked", "fp32") - whole).norm() <= 1e-5 * whole.norm()


@pytest.mark.parametrize("loss_head", ["full", "chunked"])
def test_a_model_is_left_as_it_was(loss_head: LossHead) -> None:
    model = build("llama")
    loss_sum(model, batch_of("llama"), loss_head).backward()
    assert not model.lm_head._forward_pre_hooks
