"""Evaluation: true means over tokens whatever the batch, BLEU as sacrebleu has it, and what is asked of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loop import errand_of, never
from tiny_models import MODELS, SEQ2SEQ, UnevenSamples, build, workload

from autotune.errands import Train
from trainer.data import TokenStore, write_store
from trainer.encode import Sample
from trainer.evaluate import OPENING_TOKENS, Evaluator, bleu, perplexity, question, totals
from trainer.loop import train
from trainer.memory import PeakMeter
from trainer.microbatch import SpecialTokens, lay_out, target_count
from trainer.model import build_for
from trainer.ranks import Ranks
from trainer.tokenizer import load_tokenizer

CPU = torch.device("cpu")
ZH = ["今天天气很好，我们去公园散步吧。", "我喜欢喝绿茶，不喜欢喝咖啡。"]
EN = ["the weather is nice today, let us walk", "I like green tea and do not like coffee"]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("layout", ["packed", "sorted", "fixed"])
def test_loss_and_accuracy_are_those_of_a_plain_loop_whatever_the_batch(family: str, layout: Any) -> None:
    model = build(family, torch.float64).eval()
    samples, ids, work = UnevenSamples(family, 40), list(range(40)), workload(family, layout=layout)
    start = int(model.config.decoder_start_token_id or 0) if family in SEQ2SEQ else 0
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)  # so that some are right
    loss = right = 0.0
    for i in ids:
        tokens = torch.as_tensor(samples.tokens(i)).long()
        spans = samples.spans(i).tolist()
        with torch.no_grad():
            if family in SEQ2SEQ:
                border = spans[0][0]
                given = torch.cat([torch.tensor([start]), tokens[border:-1]])[None]
                logits = model(input_ids=tokens[None, :border], decoder_input_ids=given).logits[0]
                wanted = list(enumerate(tokens[border:].tolist()))
            else:
                logits = model(input_ids=tokens[None]).logits[0]
                wanted = [(at - 1, int(tokens[at])) for first, last in spans for at in range(first, last)]
        for at, token in wanted:
            loss -= float(logits[at].log_softmax(-1)[token])
            right += int(logits[at].argmax()) == token
    for rows, loss_head in ((1, "full"), (7, "full"), (40, "full"), (7, "chunked"), (40, "chunked")):
        batches = lay_out(ids, rows, samples, work, SpecialTokens(0, start))
        headed = work.model_copy(update={"loss_head": loss_head})
        found = totals(model.train(), batches, headed, CPU).tolist()
        assert found == pytest.approx([loss, right], rel=1e-9)
    assert 0 < right < target_count(ids, samples)


def test_perplexity_is_e_to_the_loss_and_infinite_beyond_numbers() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == float("inf")


@pytest.mark.parametrize(("texts", "tokenizer"), [(ZH, "zh"), (EN, "13a"), ([*ZH, EN[0][:9]], "zh"), (["", ""], "13a")])
def test_chinese_is_scored_by_characters_and_the_signature_says_so(texts: list[str], tokenizer: str) -> None:
    score, signature = bleu(texts, texts)
    assert f"tok:{tokenizer}" in signature
    assert score == pytest.approx(100.0 if any(texts) else 0.0)


def test_bleu_is_of_the_whole_corpus_and_what_a_text_lacks_lowers_it() -> None:
    worse = bleu([ZH[0], "我喜欢喝咖啡。"], ZH)[0]
    assert 0 < worse < 100
    assert bleu(["", ""], ZH)[0] == 0
    assert bleu(ZH[::-1], ZH)[0] < worse


def store_of(samples: list[Sample], folder: Path, task: Any) -> TokenStore:
    folder.mkdir()
    write_store(samples, folder, task, 97)
    return TokenStore(folder)


def test_what_is_asked_is_all_before_the_last_answer_and_the_reference_is_that_answer(tmp_path: Path) -> None:
    tokens = list(range(10, 90))
    talk = store_of([Sample(tokens, [(5, 9), (20, 30)])], tmp_path / "talk", "causal")
    asked = question(talk, 0, workload("llama", stage="sft"))
    assert (asked.prompt, asked.reference) == (tokens[:20], tokens[20:30])
    pair = store_of([Sample(tokens, [(50, 80)])], tmp_path / "pair", "seq2seq")
    for stage in ("sft", "pretrain"):
        asked = question(pair, 0, workload("t5", stage=stage))
        assert (asked.prompt, asked.reference) == (tokens[:50], tokens[50:])


@pytest.mark.parametrize(("length", "opening"), [(80, OPENING_TOKENS), (12, 6), (2, 1)])
def test_a_document_is_gone_on_with_from_its_opening(length: int, opening: int, tmp_path: Path) -> None:
    tokens = list(range(10, 10 + length))
    store = store_of([Sample(tokens, [(1, length)])], tmp_path / "text", "causal")
    asked = question(store, 0, workload("llama", stage="pretrain"))
    assert (asked.prompt, asked.reference) == (tokens[:opening], tokens[opening:])


class Parrot:
    """Answers each prompt with what the data has, to the token."""

    def __init__(self, evaluator: Evaluator, unanswered: int = 0) -> None:
        self._references = [q.reference for q in evaluator._scored]
        self._unanswered = unanswered
        self.most: list[int] = []

    def generate(self, _model: Any, prompts: list[list[int]], most: list[int], _stop: Any) -> list[list[int] | None]:
        self.most = most
        return [None if i < self._unanswered else self._references[i] for i in range(len(prompts))]


def evaluator_of(errand: Train) -> tuple[Evaluator, Any]:
    torch.manual_seed(0)
    model = build_for(errand.plan.workload, errand.ids, CPU)
    return Evaluator(errand, TokenStore(Path(errand.store)), model, PeakMeter(CPU), Ranks(), lambda: False), model


def with_recipe(errand: Train, **changes: Any) -> Train:
    return errand.model_copy(update={"recipe": errand.recipe.model_copy(update=changes)})


@pytest.mark.parametrize("model", ["tiny", "tiny-t5"])
def test_who_answers_as_the_references_do_has_a_bleu_of_100(model: str, tmp_path: Path) -> None:
    evaluator, built = evaluator_of(with_recipe(errand_of(tmp_path, model), bleu_rows=64, samples=0))
    evaluator._generator = parrot = Parrot(evaluator)  # type: ignore[assignment]
    (row,) = evaluator.evaluate(built, 7, 4)
    assert (row["kind"], row["step"], row["bleu_rows"], row["samples"]) == ("validation", 7, 40, 40)
    assert row["bleu"] == pytest.approx(100)
    assert "tok:zh" in row["bleu_signature"]
    assert max(parrot.most) <= max(len(q.reference or ()) for q in evaluator._scored)
    evaluator._generator = Parrot(evaluator, unanswered=30)  # type: ignore[assignment]
    (row,) = evaluator.evaluate(built, 7, 4)
    assert (row["bleu_rows"], row["bleu"]) == (10, pytest.approx(100)), "of what there was room to answer"
    evaluator._generator = Parrot(evaluator, unanswered=40)  # type: ignore[assignment]
    (row,) = evaluator.evaluate(built, 7, 4)
    assert "bleu" not in row


def test_rows_for_bleu_are_the_seeds_the_same_each_time(tmp_path: Path) -> None:
    errand = errand_of(tmp_path)
    chosen = [
        [tuple(q.prompt) for q in evaluator_of(with_recipe(errand, bleu_rows=8, seed=seed))[0]._scored]
        for seed in (1, 1, 2)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 8


def test_pretraining_on_documents_has_no_bleu(tmp_path: Path) -> None:
    errand = errand_of(tmp_path)
    work = errand.plan.workload.model_copy(update={"stage": "pretrain"})
    errand = errand.model_copy(update={"plan": errand.plan.model_copy(update={"workload": work})})
    evaluator, model = evaluator_of(errand)
    sample, row = evaluator.evaluate(model, 1, 4)
    assert sample["kind"] == "sample"
    assert "bleu" not in row


@pytest.mark.parametrize("model", ["tiny", "tiny-t5"])
def test_typed_prompts_are_asked_as_training_asks_them(model: str, tmp_path: Path) -> None:
    """The first prompt of the data, typed, is the same tokens and so has the same answer."""
    errand = errand_of(tmp_path, model)
    tokenizer = load_tokenizer(errand.tokenizer_dir)
    store = TokenStore(Path(errand.store))
    asked = question(store, 0, errand.plan.workload)
    words = tokenizer.decode(asked.prompt, skip_special_tokens=True).strip()
    text = words.removeprefix("user").removesuffix("assistant").strip()
    evaluator, built = evaluator_of(with_recipe(errand, prompts=(text,), samples=1, bleu_rows=0))
    typed, stored = evaluator._fixed
    assert typed.prompt == stored.prompt
    first, second, _ = evaluator.evaluate(built, 3, 4)
    assert first["answer"] == second["answer"]
    assert (first["prompt"], first["reference"]) == (text, None)
    assert second["reference"] == tokenizer.decode(asked.reference, skip_special_tokens=True).strip()


def test_answers_stay_within_the_limits_and_what_the_plan_holds(tmp_path: Path) -> None:
    errand = with_recipe(errand_of(tmp_path), samples=40, bleu_rows=40)
    evaluator, model = evaluator_of(errand)
    assert evaluator._generator is not None
    limit, reference = errand.plan.workload.max_seq_len, max(len(q.reference or ()) for q in evaluator._scored)
    for q, answer in zip(evaluator._scored, evaluator._answer(model, evaluator._scored, reference), strict=True):
        assert answer is not None
        assert len(answer) <= min(limit - len(q.prompt), reference)
    nothing = errand.plan.memory.model_copy(update={"items": {"process": 2**40}, "budget_bytes": 0})
    full = errand.model_copy(update={"plan": errand.plan.model_copy(update={"memory": nothing})})
    assert all(row["answer"] is None for row in evaluator_of(full)[0].evaluate(model, 1, 4) if row["kind"] == "sample")


def test_nothing_is_generated_where_nothing_is_asked(tmp_path: Path) -> None:
    """And no tokenizer is needed."""
    errand = with_recipe(errand_of(tmp_path), samples=0, bleu_rows=0).model_copy(update={"tokenizer_dir": "nowhere"})
    evaluator, model = evaluator_of(errand)
    (row,) = evaluator.evaluate(model, 1, 4)
    assert {"loss", "perplexity", "accuracy"} < row.keys()
    assert "generation_seconds" not in row


def test_a_model_learns_to_answer_and_bleu_and_accuracy_say_so(tmp_path: Path) -> None:
    """Overfitted to two rows it has seen them all: right in each token, and so BLEU 100."""
    errand = errand_of(tmp_path)
    store = TokenStore(Path(errand.store))
    samples = [
        Sample(store.tokens(i).tolist(), [(int(s), int(e)) for s, e in store.spans(i)]) for i in np.argsort(
            [-len(store.tokens(i)) for i in range(len(store))])[:2]
    ]  # fmt: skip
    store_folder = tmp_path / "two"
    store_folder.mkdir()
    write_store(samples, store_folder, "causal", 6400)
    recipe = errand.recipe.model_copy(
        update={"max_steps": 60, "epochs": 60, "learning_rate": 3e-3, "eval_every": 30, "weight_decay": 0.0}
    )
    errand = errand.model_copy(
        update={"store": str(store_folder), "validation_store": str(store_folder), "recipe": recipe}
    )
    rows = list(train(errand, never))
    first, last = [row for row in rows if row["kind"] == "validation"]
    assert (last["accuracy"], last["bleu"]) == (1.0, pytest.approx(100))
    assert first["loss"] > last["loss"]
    sample = [row for row in rows if row["kind"] == "sample"][-1]
    assert sample["answer"] == sample["reference"] != ""
    assert json.dumps(sample)
