"""Records -> tokens and the spans that are trained on, cut to the limits by rule and counted. No torch, no files.

Causal: an answer is trained with its end token, and nothing else is. Seq2seq: the response is. Pretraining: all is.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

from autotune.errands import TokenIds
from autotune.errors import ConfigurationError, DataError
from autotune.plan import Stage, Task
from trainer.records import Record, Turn
from trainer.template import ChatTemplate, limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 512
"""Records that are tokenized together; the tokenizer spreads them over the cores."""
FRAME = 8
"""Characters that a template puts around a turn, about."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens and the spans [start, end) of them that are targets.

    A seq2seq sample is its source followed by its target, which is the one span.
    """

    tokens: list[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """Turns as text and as tokens, perhaps without a piece of what was tokenized; no answer stands before that."""

    turns: Sequence[Turn]
    text: str
    tokens: list[int]
    encoding: Any
    tokens_gone: int = 0
    characters_gone: int = 0

    def token_at(self, place: int) -> int:
        """Return the first token that begins at this character or later; never the first, which nothing predicts."""
        encoding, place = self.encoding, place + self.characters_gone
        found = encoding.char_to_token(place)
        if found is None:  # a blank that no token has, or the end
            found = bisect_left(range(len(encoding)), place, key=lambda i: encoding.token_to_chars(i)[0])
        elif encoding.token_to_chars(found)[0] < place:
            found += 1
        return max(1, int(found) - self.tokens_gone)


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


def ids_of(tokenizer: PreTrainedTokenizerFast, task: Task, stage: Stage) -> TokenIds:
    """Return the ids of special tokens as a model's configurations hold them."""
    return TokenIds(pad=tokenizer.pad_token_id, eos=end_ids(tokenizer, task, stage), bos=tokenizer.bos_token_id)


@dataclass
class Encoder:
    """Turns records into samples under one set of rules, and counts what the rules cut."""

    tokenizer: PreTrainedTokenizerFast
    task: Task
    stage: Stage
    max_seq_len: int
    max_target_len: int
    cuts: Counter[str] = field(default_factory=Counter)
    longest: tuple[int, str] = (0, "")
    """Tokens and place of the longest record, before it was cut."""

    def __post_init__(self) -> None:
        """Raise ConfigurationError for a tokenizer that cannot end a text."""
        if self.tokenizer.eos_token_id is None:
            raise ConfigurationError(
                "the tokenizer has no end token (eos_token), so a model would never stop",
                "set eos_token in its tokenizer_config.json, or leave --tokenizer out to train one",
            )
        self.template = ChatTemplate(self.tokenizer)
        special = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        self._end = re.compile(r"\s*(?:" + "|".join(map(re.escape, special)) + ")")
        # What stands on either side of one of these is tokenized alone, whatever stands on the other.
        self._walls = {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special and not t.single_word}

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
            with limited():
                samples = list(encode_batch(batch))
            yield from samples

    def prompt(self, text: str) -> list[int]:
        """Encode a question, or a document's beginning, as what comes before an answer in training.

        Too long a source loses its end, any other prompt its left: a quarter of the limit is for the answer.
        """
        room = self.max_seq_len if self.task == "seq2seq" else self.max_seq_len - self.max_seq_len // 4
        return self.question((Turn("user", text),), room)[0]

    def question(self, turns: Sequence[Turn], room: int) -> tuple[list[int], int]:
        """Encode turns, a question last, as what comes before its answer in training; say how many turns are left out.

        Those are whole oldest exchanges, where all do not go into so many tokens. What even then is too long is cut:
        a source's end, of any other its left.
        """
        kept, ids = turns, self._question(turns)
        for kept in (turns, *_without_oldest(turns)):
            ids = self._question(kept)
            if len(ids) <= room:
                break
        end = self.tokenizer.eos_token_id
        if len(ids) > room:
            ids = [*ids[: room - 1], end] if self.task == "seq2seq" else ids[-room:]
        return ids or [end], len(turns) - len(kept)

    def _question(self, turns: Sequence[Turn]) -> list[int]:
        end, begin = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        if self.task == "causal" and self.stage == "sft":
            text = self._template(Record(f"the prompt {turns[-1].content!r}", tuple(turns)), turns, prompt=True)
            return list(self._tokenize([text])[0].ids)
        ids = self._tokenize(["\n".join(turn.content for turn in turns)])[0].ids
        return (
            [*ids, end] if self.task == "seq2seq" else [*([begin] if begin is not None and begin != end else []), *ids]
        )

    def _tokenize(self, texts: Sequence[str], *, places: bool = False) -> list[Any]:
        """Return tokenizers' encodings, without added special tokens; places in the text only where they are needed."""
        backend = self.tokenizer.backend_tokenizer
        encode = backend.encode_batch if places else backend.encode_batch_fast
        encodings: list[Any] = encode(texts, add_special_tokens=False)
        return encodings

    def _pairs(self, records: Sequence[Record]) -> Iterator[Sample]:
        exchanges = [_answered(record) for record in records]
        sources = self._tokenize(["\n".join(t.content for t in turns[:-1]) for turns in exchanges])
        targets = self._tokenize([turns[-1].content for turns in exchanges])
        end = self.tokenizer.eos_token_id
        for record, source, target in zip(records, sources, targets, strict=True):
            source_ids, target_ids = [*source.ids, end], [*target.ids, end]
            self._see(record, len(source_ids) + len(target_ids))
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
            self._see(record, len(ids))
            self.cuts["split"] += len(ids) > self.max_seq_len
            # Pieces overlap by one token, so that each token is predicted once.
            for start in range(0, max(len(ids) - 1, 1), self.max_seq_len - 1):
                piece = ids[start : start + self.max_seq_len]
                if len(piece) > 1:
                    yield Sample(piece, [(1, len(piece))])

    def _conversations(self, records: Sequence[Record]) -> Iterator[Sample]:
        exchanges = [_answered(record) for record in records]
        texts = [self._template(*pair, prompt=False) for pair in zip(records, exchanges, strict=True)]
        encodings = self._tokenize(texts, places=True)
        for record, turns, text, encoding in zip(records, exchanges, texts, encodings, strict=True):
            self._see(record, len(encoding))
            whole = _Rendered(turns, text, encoding.ids, encoding)
            if len(encoding) > self.max_seq_len:
                whole = self._drop_oldest(record, whole)
            yield self._cut(self._sample(record, whole))

    def _see(self, record: Record, tokens: int) -> None:
        if tokens > self.longest[0]:
            self.longest = (tokens, record.place)

    def _drop_oldest(self, record: Record, whole: _Rendered) -> _Rendered:
        """Drop as few whole oldest exchanges as make the others fit, or all but the last."""
        turns, shorter = whole.turns, _without_oldest(whole.turns)
        if not shorter:
            return whole
        self.cuts["dropped_turns"] += 1

        @cache
        def rendered(i: int) -> _Rendered:
            text = self._template(record, shorter[i], prompt=False)
            return self._taken_out(whole, shorter[i], text) or self._rendered(shorter[i], text)

        # A text is about as many tokens as its share of the characters: so a few are looked at, and those are short.
        room = sum(len(turn.content) + FRAME for turn in turns) * self.max_seq_len / len(whole.tokens)
        sizes = [*accumulate(len(turn.content) + FRAME for turn in reversed(turns))]
        guess = bisect_left(shorter, True, key=lambda turns: sizes[len(turns) - 1] <= room)
        last = len(shorter) - 1
        return rendered(_first(last, min(guess, last), lambda i: len(rendered(i).tokens) <= self.max_seq_len))

    def _rendered(self, turns: Sequence[Turn], text: str) -> _Rendered:
        (encoding,) = self._tokenize([text], places=True)
        return _Rendered(turns, text, encoding.ids, encoding)

    def _taken_out(self, whole: _Rendered, turns: Sequence[Turn], text: str) -> _Rendered | None:
        """Tokenize a text that is the whole without a piece, by leaving out its tokens: exact between special tokens.

        None where the text is no such one, or its piece does not begin and end at the same special token.
        """
        encoding, ids = whole.encoding, whole.tokens
        for first, token in enumerate(ids):
            if token not in self._walls:
                continue
            start = encoding.token_to_chars(first)[0]
            if not whole.text.startswith(text[:start]):
                return None
            if whole.text.endswith(text[start:]):
                gone = len(whole.text) - len(text)
                end = encoding.char_to_token(start + gone)
                if end is not None and ids[end] == token and encoding.token_to_chars(end)[0] == start + gone:
                    return _Rendered(turns, text, ids[:first] + ids[end:], encoding, end - first, gone)
        return None

    def _cut(self, sample: Sample) -> Sample:
        """Cut the prompt's left, to a quarter of the limit; then the last answer's end."""
        if len(sample.tokens) <= self.max_seq_len:
            return sample
        start, end = sample.spans[-1]
        keep = max(self.max_seq_len // 4, self.max_seq_len - (end - start))
        cut = max(0, start - keep)
        self.cuts["prompt_cut"] += cut > 0
        self.cuts["answer_cut"] += end - cut > self.max_seq_len
        end = min(end, cut + self.max_seq_len)
        return Sample(sample.tokens[cut:end], [(start - cut, end - cut)])

    def _sample(self, record: Record, rendered: _Rendered) -> Sample:
        """Find each answer with its end token: in the text by the template, in the tokens by their characters."""
        turns, text, spans = rendered.turns, rendered.text, []
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
            spans.append((rendered.token_at(len(before)), rendered.token_at(ending.end() if ending else after)))
        return Sample(rendered.tokens, spans)

    def _template(self, record: Record, turns: Sequence[Turn], *, prompt: bool) -> str:
        return self.template.render(turns, record.place, prompt=prompt)


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


def _first(last: int, guess: int, holds: Callable[[int], bool]) -> int:
    """Return the first of 0 ... last for which it holds, as it then does for all that follow; last where none does.

    Looks near the guess, then twice as far, and so on.
    """
    low, high, step = 0, last, 1
    if holds(guess):
        high = guess
        while (i := high - step) >= 0 and holds(i):
            high, step = i, 2 * step
        low = max(0, high - step + 1)
    else:
        low = min(guess + 1, last)
        while (i := low + step - 1) < last and not holds(i):
            low, step = i + 1, 2 * step
        high = min(last, low + step - 1)
    return low + bisect_left(range(low, high), True, key=holds)
