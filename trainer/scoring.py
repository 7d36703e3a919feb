"""What a model that lies on the disk is worth on a token store: loss, perplexity, accuracy, BLEU and chrF."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from autotune.errands import Evaluate, Evaluated
from trainer.data import Order, TokenStore
from trainer.evaluate import bleu, most_new, perplexity, question, text_of, totals
from trainer.generate import Generator
from trainer.memory import first_line, is_memory_error
from trainer.microbatch import MicroBatch, SpecialTokens, lay_out, target_count
from trainer.saved import open_model
from trainer.tokenizer import load_tokenizer

ROWS = 8
"""Full rows at once, and half of them where memory runs out."""
TOGETHER = 512
"""Samples that are laid out together."""
SEED = 42
"""Decides which rows are answered, whatever the model: the same for each."""


def score(errand: Evaluate, tell: Callable[[str], None]) -> Evaluated:
    """Evaluate a model; answers that have no room are left out, and counted out."""
    began, device = time.perf_counter(), torch.device(errand.device)
    tell(f"{errand.saved.place}: losses")
    model, store = open_model(errand.saved, device), TokenStore(Path(errand.store))
    loss, right = _losses(model, store, errand, device)
    targets = max(1, target_count(range(len(store)), store))
    tell(f"{errand.saved.place}: answers")
    try:
        answers, references = _answers(model, store, errand)
    except (RuntimeError, MemoryError) as error:
        if not is_memory_error(error):
            raise
        tell(f"{errand.saved.place}: no answers, memory ran out: {first_line(error)}")
        answers, references = [], []
    scores: dict[str, Any] = {"bleu": None, "bleu_signature": None, "chrf": None, "chrf_signature": None}
    if answers:
        scores["bleu"], scores["bleu_signature"] = bleu(answers, references)
        scores["chrf"], scores["chrf_signature"] = chrf(answers, references)
    perplexed = perplexity(loss / targets)
    return Evaluated(
        loss=loss / targets if math.isfinite(loss) else None,
        perplexity=perplexed if math.isfinite(perplexed) else None,
        accuracy=right / targets,
        samples=len(store),
        target_tokens=targets,
        answered=len(answers),
        seconds=time.perf_counter() - began,
        **scores,
    )


def chrf(answers: list[str], references: list[str]) -> tuple[float, str]:
    """Return the corpus chrF (Popović, 2015; F with beta 2 over character n-grams to 6) and its signature."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    score = metric.corpus_score(answers, [references]).score
    return float(score), str(metric.get_signature())


def _losses(model: Any, store: TokenStore, errand: Evaluate, device: torch.device) -> tuple[float, float]:
    rows = ROWS
    while True:
        try:
            loss, right = totals(model, _batches(store, rows, errand, model), errand.workload, device).tolist()
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not is_memory_error(error):
                raise
            rows //= 2
        else:
            return loss, right


def _batches(store: TokenStore, rows: int, errand: Evaluate, model: Any) -> Iterator[MicroBatch]:
    start = getattr(model.config, "decoder_start_token_id", None)
    special = SpecialTokens(errand.ids.pad, errand.ids.pad if start is None else int(start))
    for first in range(0, len(store), TOGETHER):
        ids = range(first, min(first + TOGETHER, len(store)))
        yield from lay_out(ids, rows, store, errand.workload, special)


def _answers(model: Any, store: TokenStore, errand: Evaluate) -> tuple[list[str], list[str]]:
    """Answer rows that are the same for every model, each as long as the longest reference among them at most."""
    work = errand.workload
    if errand.answers == 0 or (work.task == "causal" and work.stage == "pretrain"):
        return [], []
    tokenizer = load_tokenizer(errand.tokenizer_dir)
    chosen = sorted(Order(len(store), SEED, 0)[: errand.answers].tolist())
    questions = [question(store, i, work) for i in chosen]
    longest = max(len(q.reference or ()) for q in questions)
    generator = Generator(model, errand.ids, work, errand.room_bytes)
    limits = [most_new(work, q, longest) for q in questions]
    made = generator.generate(model, [q.prompt for q in questions], limits)
    pairs = [(a, q.reference or []) for a, q in zip(made, questions, strict=True) if a is not None]
    return [text_of(tokenizer, a) for a, _ in pairs], [text_of(tokenizer, r) for _, r in pairs]
