"""What a model is worth on a data set: loss, perplexity, token accuracy, BLEU; and how it answers fixed prompts.

Loss and accuracy are true means over all target tokens, whatever the batch. BLEU is of a bounded number of rows, the
same each time; so are the prompts.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autotune.errands import Train
from autotune.plan import Workload
from trainer.compiled import eagerly
from trainer.data import Order, TokenStore, open_store
from trainer.encode import Encoder
from trainer.generate import Generator, room_to_generate
from trainer.loss import loss_and_right
from trainer.memory import PeakMeter, first_line, is_memory_error, prepare_heap
from trainer.microbatch import MicroBatch, SpecialTokens, lay_out, target_count
from trainer.ranks import Ranks
from trainer.step import autocast
from trainer.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Metrics = dict[str, Any]
SAMPLE_TOKENS = 128
"""Of the answer to a fixed prompt at most: as much as people read."""
OPENING_TOKENS = 32
"""Of a document at most, for a model that is to go on with it."""


@torch.no_grad()
def totals(model: Any, batches: Iterable[MicroBatch], workload: Workload, device: torch.device) -> Tensor:
    """Return the sum of the losses of all targets and how many were right, in fp64 [2].

    The model is in evaluation mode afterwards.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        with autocast(device, workload.precision), eagerly(workload.compile):
            total += torch.stack(loss_and_right(model, batch.to(device), workload.loss_head))
    return total


def perplexity(loss: float) -> float:
    """Return e to the loss, infinite where that is no number of the machine's."""
    return math.exp(loss) if loss < 700 else math.inf


def bleu(answers: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Return the corpus BLEU and its signature: by characters where the references are mostly Chinese, else by 13a."""
    from sacrebleu.metrics.bleu import BLEU

    text = "".join(references)
    chinese = len(re.findall(r"[\u3400-\u9fff]", text))
    metric = BLEU(tokenize="zh" if 2 * chinese > len(re.findall(r"\w", text)) else "13a")
    score = metric.corpus_score(list(answers), [list(references)]).score
    return float(score), str(metric.get_signature())


@dataclass(frozen=True)
class Question:
    """A prompt, and how it was answered in the data."""

    prompt: list[int]
    reference: list[int] | None
    typed: str | None = None


def question(store: TokenStore, i: int, workload: Workload) -> Question:
    """Take the last answer of a sample as what was asked for; of a document what comes after its opening."""
    tokens = store.tokens(i).tolist()
    start, end = map(int, store.spans(i)[-1])
    if workload.task == "causal" and workload.stage == "pretrain":
        start = max(1, min(OPENING_TOKENS, len(tokens) // 2))
    return Question(tokens[:start], tokens[start:end])


def scored_rows(store: TokenStore, seed: int, rows: int) -> list[int]:
    """Return the rows that are answered for BLEU, in their order: the same at each evaluation."""
    return sorted(Order(len(store), seed, 0)[:rows].tolist())


def most_new(workload: Workload, asked: Question, most: int) -> int:
    """Return how many tokens an answer may have, of `most`, within the workload's lengths."""
    seq2seq = workload.task == "seq2seq"
    room = workload.max_target_len if seq2seq else workload.max_seq_len - len(asked.prompt)
    return max(1, min(most, room))


class BrokenOffError(Exception):
    """A stop was asked for before all answers were there."""


class Evaluator:
    """Evaluates a model in training on its validation data, if there is any, and has it answer fixed prompts."""

    def __init__(
        self, errand: Train, store: TokenStore, model: Any, meter: PeakMeter, ranks: Ranks, stop: Callable[[], bool]
    ) -> None:
        self._plan, self._workload, self._tokenizer_dir = errand.plan, errand.plan.workload, errand.tokenizer_dir
        self._meter, self._special = meter, special_tokens(model, errand)
        self._ranks, self._stop = ranks, stop
        held_out = errand.validation_store
        self.validation = open_store(Path(held_out), errand.longest) if held_out else None
        self._fixed = self._typed(errand.recipe.prompts)
        asked = self.validation or store
        self._fixed += [question(asked, i, self._workload) for i in range(min(errand.recipe.samples, len(asked)))]
        self._scored: list[Question] = []
        if self.validation and (self._workload.task == "seq2seq" or self._workload.stage == "sft"):
            rows = scored_rows(self.validation, errand.recipe.seed, errand.recipe.bleu_rows)
            self._scored = [question(self.validation, i, self._workload) for i in rows]
        self._generator = None
        if (self._fixed or self._scored) and ranks.leads:
            room = room_to_generate(errand.plan)
            self._generator = Generator(model, errand.ids, self._workload, room)

    def evaluate(self, model: Any, step: int, rows: int) -> Iterator[Metrics]:
        """Yield a `sample` for each fixed prompt, then the `validation` row, or without data an event `sampled`.

        The losses are taken by all ranks, in micro-batches of at most so many rows; the answers are the first rank's.
        Where a stop is asked for it is broken off, without that last row. Raises MemoryRanOutError, on all ranks,
        where memory runs out on one; answers that have no room are left out, and an event says so.
        """
        self._meter.reset()
        row: Metrics = {"kind": "event", "event": "sampled", "step": step}
        if self.validation is not None:
            losses = self._losses(model, self.validation, rows)
            if losses is None:
                return
            row = {"kind": "validation", "step": step} | losses
        answered = True
        if self._generator is not None:
            began = time.perf_counter()
            try:
                tokenizer = load_tokenizer(self._tokenizer_dir)  # not kept: a large one would add to each step's peak
                row |= self._bleu(model, tokenizer)
                yield from self._samples(model, tokenizer, step)
            except BrokenOffError:
                answered = False
            except (RuntimeError, MemoryError) as error:
                if not is_memory_error(error):
                    raise
                event = {"kind": "event", "event": "out_of_memory", "step": step, "where": "answers"}
                yield event | {"message": first_line(error), "rows": None, "rows_now": None}
            row["generation_seconds"] = time.perf_counter() - began
        if not self._ranks.any(not answered)[0]:
            yield row | {"peak_memory_bytes": self._meter.peak_bytes()}

    def _typed(self, texts: Sequence[str]) -> list[Question]:
        if not texts:
            return []
        work = self._workload
        tokenizer = load_tokenizer(self._tokenizer_dir)
        encoder = Encoder(tokenizer, work.task, work.stage, work.max_seq_len, work.max_target_len)
        return [Question(encoder.prompt(text), None, text) for text in texts]

    def _losses(self, model: Any, store: TokenStore, rows: int) -> Metrics | None:
        """Return the means over all target tokens; None where it was broken off."""
        prepare_heap(self._meter.device, self._workload.cpu_allocator)
        own = self._ranks.together(
            lambda: totals(model, self._in_order(store, rows), self._workload, self._meter.device).tolist()
        )
        if self._ranks.any(self._stop())[0]:
            return None
        loss, right = self._ranks.total(*own)
        targets = max(1, target_count(range(len(store)), store))
        return {
            "loss": loss / targets,
            "perplexity": perplexity(loss / targets),
            "accuracy": right / targets,
            "samples": len(store),
        }

    def _in_order(self, store: TokenStore, rows: int) -> Iterator[MicroBatch]:
        """Lay out this rank's part of each step's worth of rows, until a stop is asked for."""
        ids = range(len(store))
        together = self._plan.batching.effective_batch_size
        for first in range(0, len(ids), together):
            if self._stop():
                return
            share = self._ranks.share(ids[first : first + together])
            yield from lay_out(share, rows, store, self._workload, self._special)

    def _bleu(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> Metrics:
        """Score the answers to the chosen rows, each no longer than the longest reference among them."""
        longest = max((len(q.reference or ()) for q in self._scored), default=0)
        answers = self._answer(model, self._scored, longest)
        pairs = [(a, q.reference or []) for a, q in zip(answers, self._scored, strict=True) if a is not None]
        if not pairs:
            return {}
        texts = [[text_of(tokenizer, tokens) for tokens in side] for side in zip(*pairs, strict=True)]
        score, signature = bleu(*texts)
        return {"bleu": score, "bleu_signature": signature, "bleu_rows": len(pairs)}

    def _samples(self, model: Any, tokenizer: PreTrainedTokenizerFast, step: int) -> Iterator[Metrics]:
        for q, answer in zip(self._fixed, self._answer(model, self._fixed, SAMPLE_TOKENS), strict=True):
            yield {
                "kind": "sample",
                "step": step,
                "prompt": q.typed if q.typed is not None else text_of(tokenizer, q.prompt),
                "answer": None if answer is None else text_of(tokenizer, answer),
                "reference": None if q.reference is None else text_of(tokenizer, q.reference),
            }

    def _answer(self, model: Any, questions: Sequence[Question], most: int) -> list[list[int] | None]:
        """Generate within what is left of the limits."""
        if self._generator is None or not questions:
            return []
        prepare_heap(self._meter.device, self._workload.cpu_allocator)
        limits = [most_new(self._workload, q, most) for q in questions]
        answers = self._generator.generate(model, [q.prompt for q in questions], limits, self._stop)
        if self._stop():
            raise BrokenOffError
        return answers


def special_tokens(model: Any, errand: Train) -> SpecialTokens:
    """Return the ids that rows are padded and targets started with."""
    start_id = getattr(model.config, "decoder_start_token_id", None)
    return SpecialTokens(errand.ids.pad, errand.ids.pad if start_id is None else int(start_id))


def text_of(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    """Return tokens as people read them."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
