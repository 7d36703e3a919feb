"""Records -> tokens and the spans that are trained on, cut to the limits by rule and counted. No torch, no files.

Causal: an answer is trained with its end token, and nothing else is. Seq2seq: the response is. Pretraining: all is.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import jinja2

from autotune.errors import ConfigurationError, DataError
from autotune.plan import Stage, Task
from trainer.records import Record, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 512
"""Records that are tokenized together; the tokenizer spreads them over the cores."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens and the spans [start, end) of them that are targets.

    A seq2seq sample is its source followed by its target, which is the one span.
    """

    tokens: list[int]
    spans: list[tuple[int, int]]


def end_ids(tokenizer: PreTrainedTokenizerFast, task: Task, stage: Stage) -> int | tuple[int, ...]:
    """Return the ids at which generation has to stop: the end token, and what a chat template ends an answer with."""
    end = int(tokenizer.eos_token_id)
    if task == "seq2seq" or stage == "pretrain":
        return end
    probe = Record("probe", (Turn("user", "a"), Turn("assistant", "b")))
    encoder = Encoder(tokenizer, task, stage, 512, 0)
    (sample,) = encoder.encode([probe])
    last = sample.tokens[sample.spans[-1][1] - 1]
    added = tokenizer.added_tokens_decoder.get(last)
    return end if last == end or added is None or not added.special else (end, last)


@dataclass
class Encoder:
    """Turns records into samples under one set of rules, and counts what the rules cut."""

    tokenizer: PreTrainedTokenizerFast
    task: Task
    stage: Stage
    max_seq_len: int
    max_target_len: int
    cuts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Raise ConfigurationError for a tokenizer that cannot end a text."""
        if self.tokenizer.eos_token_id is None:
            raise ConfigurationError(
                "the tokenizer has no end token (eos_token), so a model would never stop",
                "set eos_token in its tokenizer_config.json, or leave --tokenizer out to train one",
            )
        special = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        self._end = re.compile(r"\s*(?:" + "|".join(map(re.escape, special)) + ")")

    def encode(self, records: Iterable[Record]) -> Iterator[Sample]:
        """Encode records in their order; a document may give several samples, any other row gives one."""
        if self.task == "seq2seq":
            encode_batch = self._pairs
        elif self.stage == "pretrain":
            encode_batch = self._documents
        else:
            encode_batch = self._conversations
        records = iter(records)
        while batch := list(islice(records, BATCH)):
            yield from encode_batch(batch)

    def prompt(self, text: str) -> list[int]:
        """Encode a question, or a document's beginning, as what comes before an answer in training.

        Too long a source loses its end, any other prompt its left: a quarter of the limit is for the answer.
        """
        end, begin = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        if self.task == "seq2seq":
            return [*self._tokenize([text])[0].ids[: self.max_seq_len - 1], end]
        if self.stage == "pretrain":
            ids = [*([begin] if begin is not None and begin != end else []), *self._tokenize([text])[0].ids]
        else:
            turns = (Turn("user", text),)
            ids = self._tokenize([self._template(Record(f"the prompt {text!r}", turns), turns, prompt=True)])[0].ids
        return ids[-(self.max_seq_len - self.max_seq_len // 4) :] or [end]

    def _tokenize(self, texts: Sequence[str]) -> list[Any]:
        """Return tokenizers' encodings (`ids`, `offsets`), without added special tokens."""
        encodings: list[Any] = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        return encodings

    def _pairs(self, records: Sequence[Record]) -> Iterator[Sample]:
        exchanges = [_answered(record) for record in records]
        sources = self._tokenize(["\n".join(t.content for t in turns[:-1]) for turns in exchanges])
        targets = self._tokenize([turns[-1].content for turns in exchanges])
        end = self.tokenizer.eos_token_id
        for source, target in zip(sources, targets, strict=True):
            source_ids, target_ids = [*source.ids, end], [*target.ids, end]
            if len(source_ids) > self.max_seq_len:
                self.cuts["source_cut"] += 1
                source_ids = [*source_ids[: self.max_seq_len - 1], end]
            if len(target_ids) > self.max_target_len:
                self.cuts["target_cut"] += 1
                target_ids = target_ids[: self.max_target_len]
            yield Sample([*source_ids, *target_ids], [(len(source_ids), len(source_ids) + len(target_ids))])

    def _documents(self, records: Sequence[Record]) -> Iterator[Sample]:
        texts = [r.text if r.text is not None else self._template(r, r.turns, prompt=False) for r in records]
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        head = [begin] if begin is not None and begin != end else []
        for record, encoding in zip(records, self._tokenize(texts), strict=True):
            ids = [*head, *encoding.ids, end] if record.text is not None else encoding.ids
            self.cuts["split"] += len(ids) > self.max_seq_len
            # Pieces overlap by one token, so that each token is predicted once.
            for start in range(0, max(len(ids) - 1, 1), self.max_seq_len - 1):
                piece = ids[start : start + self.max_seq_len]
                if len(piece) > 1:
                    yield Sample(piece, [(1, len(piece))])

    def _conversations(self, records: Sequence[Record]) -> Iterator[Sample]:
        exchanges = [_answered(record) for record in records]
        rendered = [self._render(*pair) for pair in zip(records, exchanges, strict=True)]
        encodings = self._tokenize([text for text, _ in rendered])
        for record, turns, (_, spans), encoding in zip(records, exchanges, rendered, encodings, strict=True):
            sample = _locate(encoding, spans)
            yield sample if len(sample.tokens) <= self.max_seq_len else self._shorten(record, turns, sample)

    def _shorten(self, record: Record, turns: Sequence[Turn], sample: Sample) -> Sample:
        """Drop whole oldest exchanges; then cut the prompt's left, to a quarter of the limit; then the answer's end."""

        def encode(turns: Sequence[Turn]) -> Sample:
            text, spans = self._render(record, turns)
            return _locate(self._tokenize([text])[0], spans)

        if shorter := _without_oldest(turns):
            self.cuts["dropped_turns"] += 1
            # Halving: one at a time takes a minute for 400 conversations of up to 318 turns.
            fits = bisect_left(shorter, True, key=lambda turns: len(encode(turns).tokens) <= self.max_seq_len)
            sample = encode(shorter[min(fits, len(shorter) - 1)])
        if len(sample.tokens) <= self.max_seq_len:
            return sample
        start, end = sample.spans[-1]
        keep = max(self.max_seq_len // 4, self.max_seq_len - (end - start))
        cut = max(0, start - keep)
        self.cuts["prompt_cut"] += cut > 0
        self.cuts["answer_cut"] += end - cut > self.max_seq_len
        end = min(end, cut + self.max_seq_len)
        return Sample(sample.tokens[cut:end], [(start - cut, end - cut)])

    def _render(self, record: Record, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """Render by the chat template, and find each answer with its end token in the text, by characters."""
        text = self._template(record, turns, prompt=False)
        spans = []
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._template(record, turns[:i], prompt=True)
            content = turn.content.strip()
            at = text.find(content, len(before))
            if not text.startswith(before) or at < 0:
                raise ConfigurationError(
                    f"the tokenizer's chat template renders turn {i + 1} of {record.place} in a way that hides "
                    "where the answer begins",
                    "use a template whose generation prompt is a prefix of the rendered answer",
                )
            after = at + len(content)
            ending = self._end.match(text, after)
            spans.append((len(before), ending.end() if ending else after))
        return text, spans

    def _template(self, record: Record, turns: Sequence[Turn], *, prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except (jinja2.TemplateError, IndexError, ValueError) as error:
            raise DataError(
                f"{record.place}: the tokenizer's chat template refuses this conversation: {error}"
            ) from None
        return str(rendered)


def _answered(record: Record) -> tuple[Turn, ...]:
    """Return the turns up to the last answer; raises DataError for a row without one."""
    if record.text is not None:
        raise DataError(
            f"{record.place}: a document of plain text has no answers to train on",
            "train it with --stage pretrain and a causal model",
        )
    for i in range(len(record.turns), 0, -1):
        if record.turns[i - 1].role == "assistant":
            return record.turns[:i]
    raise DataError(f"{record.place}: no assistant turn to train on")


def _without_oldest(turns: Sequence[Turn]) -> list[tuple[Turn, ...]]:
    """Drop the oldest turns up to the second question, the third, ... the last; a leading system turn is kept."""
    system = int(turns[0].role == "system")
    later = range(system + 1, len(turns))
    return [(*turns[:system], *turns[i:]) for i in later if turns[i].role == "user"]


def _locate(encoding: Any, spans: Sequence[tuple[int, int]]) -> Sample:
    """Turn spans of characters into spans of tokens; the first token has nothing before it to be predicted from."""
    starts = [start for start, _ in encoding.offsets]
    places = [max(1, bisect_left(starts, place)) for span in spans for place in span]
    return Sample(encoding.ids, list(zip(places[::2], places[1::2], strict=True)))
