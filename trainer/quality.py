"""What rows are worth: whether they say something, are whole, were said before; how long they are, and what about.

Rows are compared by runs of five of their characters, in lower case and without blanks: no language is known. No torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from rensa import RMinHash

from trainer.records import shape_columns

RUN = 5
"""Characters of a run."""
MOST_CHARACTERS = 2**20
"""Of rows that are looked at together, and of a row: runs take 80 bytes a character, and a book tells itself sooner."""
HASHES, BANDS = 128, 16
"""Of a signature. Rows that have half of their runs in common meet in a band in 6 % of cases, with 0.85 in 99 %."""
NEAR = 0.85
"""Share of runs in common, of all that either has, from which rows are near duplicates: ChatLM-mini-Chinese's own."""
FEWEST_RUNS = 20
"""Of a row that may be a near duplicate: in a few characters one says something else."""
REPEATED, REPEATED_RUNS = 0.3, 40
"""Share of a text's runs that differ from one another below which it repeats itself; fewer runs tell nothing."""
FAR = 3.0
"""So many interquartile ranges beyond a quartile (of the logarithm) a length is an outlier: Tukey's "far out"."""
PILED, PILED_TIMES, PILED_LENGTH, BESIDE = 0.001, 10, 100, 10
"""Where something cut answers: at a length of so many characters at least, which such a share of all have and break off
at, ten times as many as have one of the ten lengths below it; most of them of other words."""
OPEN_ENDS = set("，、,:：;；([{（【《“‘")
"""What no answer that is whole ends with."""
CLOSED_ENDS = set("。！？…”’」』）】》.!?\"')]}>`|~*")
TOPICS, TOPIC_WIDTH, ROUNDS = 16, 64, 10
"""Groups of rows that are alike in their pairs of letters; what these are hashed to; rounds of k-means."""

Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Vectors = NDArray[np.float32]


class Verdict(IntEnum):
    """Why a row goes; KEPT: it stays."""

    KEPT = 0
    EMPTY = 1
    REPEATED = 2
    TRUNCATED = 3
    OUTLIER = 4
    DUPLICATE = 5
    NEAR_DUPLICATE = 6


@dataclass(frozen=True)
class Text:
    """The rows of a table as text."""

    whole: Any
    """All that is trained on, an array of Arrow."""
    answer: Any
    """What is learned last of it: the last turn, the response, or the document."""
    blank: Flags
    """Whether a part of it says nothing."""

    @classmethod
    def of(cls, table: Any) -> Text:
        """Take what a table's columns are trained on, which are text or turns."""
        names = shape_columns(table.column_names, "the rows")
        columns = {name: table.column(name).combine_chunks() for name in names}
        if "conversations" in columns:
            return _of_turns(columns["conversations"])
        parts = {name: pc.fill_null(column, "") for name, column in columns.items()}
        blank = np.any([_blank(part) for name, part in parts.items() if name != "input"], axis=0)
        if "input" in parts:
            more = parts.pop("input")
            asked = pc.binary_join_element_wise(parts["instruction"], more, "\n")
            parts["instruction"] = pc.if_else(pc.equal(more, ""), parts["instruction"], asked)
        *_, answer = parts.values()
        return cls(pc.binary_join_element_wise(*parts.values(), "\n"), answer, blank)

    def take(self, rows: Numbers) -> Text:
        """Return the rows of these numbers."""
        numbers = pa.array(rows)
        return Text(self.whole.take(numbers), self.answer.take(numbers), self.blank[rows])

    def part(self, rows: slice) -> Text:
        """Return some of the rows."""
        count = rows.stop - rows.start
        return Text(self.whole.slice(rows.start, count), self.answer.slice(rows.start, count), self.blank[rows])

    @property
    def characters(self) -> Numbers:
        """Of each row."""
        return _lengths(self.whole)


def _of_turns(turns: Any) -> Text:
    said = pc.fill_null(pc.struct_field(turns.flatten(), "content"), "")
    counts = pc.fill_null(pc.list_value_length(turns), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(counts)])
    whole = pc.binary_join(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), said), "\n")
    said = pa.concat_arrays([said, pa.array([""])])
    answer = said.take(pa.array(np.where(counts > 0, ends[1:] - 1, len(said) - 1)))
    blanks = np.concatenate([[0], np.cumsum(_blank(said)[:-1])])
    return Text(whole, answer, (np.diff(blanks[ends]) > 0) | (counts < 2))


def _blank(text: Any) -> Flags:
    return pc.equal(pc.utf8_trim_whitespace(text), "").to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _lengths(text: Any) -> Numbers:
    return pc.utf8_length(text).to_numpy(zero_copy_only=False).astype(np.int64)  # type: ignore[no-any-return]


def contents(text: Text, seed: int) -> Hashes:
    """Return a number of each row: rows of the same words have the same."""
    return _hashed(text.whole, seed)


def _hashed(texts: Any, seed: int) -> Hashes:
    key = seed.to_bytes(16, "big", signed=True)
    digests = (blake2b(row, digest_size=8, key=key).digest() for row in texts.cast(pa.binary()).to_pylist())
    return np.frombuffer(b"".join(digests), np.uint64)


def together(text: Text) -> Iterator[slice]:
    """Yield rows that are looked at together: as many as have `MOST_CHARACTERS`, or one."""
    start, characters = 0, 0
    for row, length in enumerate(text.characters.tolist()):
        if characters + length > MOST_CHARACTERS and row > start:
            yield slice(start, row)
            start, characters = row, 0
        characters += length
    if start < len(text.blank):
        yield slice(start, len(text.blank))


@cache
def _folded() -> NDArray[np.uint32]:
    """Return for each code point its lower case, or 0 for a blank and what nobody sees."""
    made = np.arange(0x110000, dtype=np.uint32)
    for code in range(0x110000):
        character = chr(code)
        if character.isspace() or (code < 0xA0 and not character.isprintable()):
            made[code] = 0
        elif len(lower := character.lower()) == 1:
            made[code] = ord(lower)
    return made


@dataclass(frozen=True)
class Runs:
    """Runs of characters of rows, by their hashes; each row has one at least."""

    hashes: Hashes
    first: Numbers
    """Where those of each row begin, and the end."""
    vectors: Vectors
    """Of each row how often it has which pairs of letters, hashed; of length 1, or 0 where it has none."""

    @classmethod
    def of(cls, text: Any) -> Runs:
        """Take the characters of an array of texts, of each the first `MOST_CHARACTERS`."""
        text = pc.utf8_slice_codeunits(text, 0, MOST_CHARACTERS)
        codes = np.frombuffer("".join(text.to_pylist()).encode("utf-32-le"), np.uint32)
        letters = _folded()[codes]
        kept = letters > 0
        row = np.repeat(np.arange(len(text)), _lengths(text))[kept]
        letters = letters[kept].astype(np.uint64)
        lengths = np.bincount(row, minlength=len(text))
        # Each row is followed by room for the end of its last run, which begins in it even where it has no letter.
        starts = np.concatenate([[0], np.cumsum(np.maximum(lengths, 1) + RUN - 1)])
        spaced = np.zeros(starts[-1], np.uint64)
        spaced[np.arange(len(letters)) + np.repeat(starts[:-1] - np.cumsum(lengths) + lengths, lengths)] = letters
        count = np.maximum(lengths - RUN + 1, 1)
        first = np.concatenate([[0], np.cumsum(count)])
        at = np.arange(first[-1]) + np.repeat(starts[:-1] - first[:-1], count)
        hashes = np.zeros(len(at), np.uint64)
        for i in range(RUN):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + spaced[at + i]
        return cls(_mixed(hashes), first, _pair_vectors(spaced, at, first))

    @property
    def of_row(self) -> Numbers:
        """The row of each run."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))

    @property
    def distinct_share(self) -> NDArray[np.float64]:
        """Of each row's runs, the share that differ from one another."""
        keyed = np.sort((self.of_row.astype(np.uint64) << np.uint64(40)) | (self.hashes >> np.uint64(24)))
        new = keyed[np.concatenate([[True], keyed[1:] != keyed[:-1]])]
        distinct = np.bincount((new >> np.uint64(40)).astype(np.int64), minlength=len(self.first) - 1)
        return distinct / np.diff(self.first)


def _pair_vectors(letters: Hashes, at: Numbers, first: Numbers) -> Vectors:
    rows = len(first) - 1
    pairs = _mixed(letters[at] * np.uint64(0x9E3779B97F4A7C15) + letters[at + 1]) >> np.uint64(58)
    places = np.repeat(np.arange(rows), np.diff(first)) * TOPIC_WIDTH + pairs.astype(np.int64)
    made = np.sqrt(np.bincount(places, minlength=rows * TOPIC_WIDTH)).reshape(rows, TOPIC_WIDTH).astype(np.float32)
    made /= np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-9)
    return made


def _mixed(numbers: Hashes) -> Hashes:
    """Spread what numbers differ in over all their bits (Steele, Lea and Flood, "SplitMix", 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def find_topics(vectors: Vectors, seed: int) -> Vectors:
    """Return the middles of groups of rows that are alike: k-means of directions."""
    random = np.random.default_rng(seed)
    middles = vectors[random.choice(len(vectors), min(TOPICS, len(vectors)), replace=False)]
    for _ in range(ROUNDS):
        nearest = nearest_topic(vectors, middles)
        sums = np.stack([vectors[nearest == i].sum(0) for i in range(len(middles))])
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        middles = np.where(lengths > 0, sums / np.maximum(lengths, 1e-9), middles)
    return middles


def nearest_topic(vectors: Vectors, middles: Vectors) -> NDArray[np.uint8]:
    """Return of each row the topic that it is most alike."""
    return (vectors @ middles.T).argmax(1).astype(np.uint8)  # type: ignore[no-any-return]


class Judge:
    """Looks at all rows of some files once, then says of each whether it stays.

    Of a row 30 bytes are held, and 640 lie in files without a name in `folder`; raises OSError where it has no room.
    """

    def __init__(self, total: int, topics: Vectors, folder: Path) -> None:
        self._total, self._topics, self.rows = total, topics, 0
        # Written as files are, not as memory: a full disk is then an error, and no signal that ends us.
        self._signatures = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 # closed as we are left
        self._bands = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._characters, self._answers = (np.zeros(total, np.int32) for _ in range(2))
        self._contents, self._said = (np.zeros(total, np.uint64) for _ in range(2))
        self.verdicts, self._topic = (np.zeros(total, np.uint8) for _ in range(2))
        self._open, self._few = (np.zeros(total, np.bool_) for _ in range(2))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._signatures.close()
        self._bands.close()

    def look(self, text: Text) -> None:
        """Look at more rows, in their order."""
        for rows in together(text):
            self._look(text.part(rows))

    def _look(self, text: Text) -> None:
        here = slice(self.rows, self.rows + len(text.blank))
        self.rows = here.stop
        runs = Runs.of(text.whole)
        made = RMinHash.digest_matrix_from_flat_token_hashes(runs.hashes, runs.first, HASHES, 1)
        signatures = np.array(made.to_rows(), np.uint32)
        _write(self._signatures, here.start * HASHES * 4, signatures)
        for band, part in enumerate(np.split(signatures, BANDS, axis=1)):
            keys = np.zeros(len(part), np.uint64)
            for column in part.T:
                keys = _mixed(keys ^ column)
            _write(self._bands, (band * self._total + here.start) * 8, keys)
        self._contents[here] = contents(text, 0)
        self._characters[here] = text.characters
        self._topic[here] = nearest_topic(runs.vectors, self._topics)
        self._answers[here] = _lengths(text.answer)
        ends = pc.utf8_slice_codeunits(pc.utf8_rtrim_whitespace(text.answer), -1).to_pylist()
        breaks_off = np.array([end not in CLOSED_ENDS for end in ends]) & (self._answers[here] >= PILED_LENGTH)
        self._open[here] = breaks_off
        self._said[here][breaks_off] = _hashed(text.answer.filter(pa.array(breaks_off)), 0)
        self._few[here] = np.diff(runs.first) < FEWEST_RUNS
        verdicts = self.verdicts[here]
        verdicts[[end in OPEN_ENDS for end in ends]] = Verdict.TRUNCATED
        repeats = (runs.distinct_share < REPEATED) & (np.diff(runs.first) >= REPEATED_RUNS)
        verdicts[repeats] = Verdict.REPEATED
        verdicts[text.blank] = Verdict.EMPTY

    def decide(self) -> None:
        """Decide what becomes of each row; of those that are alike the first that is worth keeping stays."""
        made = self.verdicts
        open_ones = np.flatnonzero(self._open & (made == Verdict.KEPT))
        made[open_ones[np.isin(self._answers[open_ones], self._cut_at(open_ones))]] = Verdict.TRUNCATED
        kept = np.flatnonzero(made == Verdict.KEPT)
        made[kept[_far_out(self._characters[kept])]] = Verdict.OUTLIER
        kept = np.flatnonzero(made == Verdict.KEPT)
        _, first = np.unique(self._contents[kept], return_index=True)
        made[np.delete(kept, first)] = Verdict.DUPLICATE
        kept = np.sort(kept[first])
        made[self._near_duplicates(kept[~self._few[kept]])] = Verdict.NEAR_DUPLICATE

    def strata(self, rows: Numbers, lengths: int) -> Numbers:
        """Return of some rows which they are alike: in topic, and in which of so many equal parts their length lies."""
        characters = self._characters[rows]
        borders = np.quantile(characters, np.arange(1, lengths) / lengths) if len(rows) else np.empty(0)
        return self._topic[rows].astype(np.int64) * lengths + np.searchsorted(borders, characters)

    def _cut_at(self, rows: Numbers) -> Numbers:
        """Return the lengths at which something cut answers, of rows whose answers break off."""
        if not len(rows):
            return rows
        lengths = self._answers[rows]
        counts = np.bincount(lengths)
        below = np.convolve(counts, np.ones(BESIDE))[: len(counts)]
        before = np.concatenate([[0.0], below[:-1]]) / BESIDE
        often = counts >= np.maximum(max(5.0, PILED * self.rows), PILED_TIMES * before)
        found = np.flatnonzero(often)
        different = [len(np.unique(self._said[rows[lengths == length]])) > counts[length] / 2 for length in found]
        return found[np.array(different, bool)]  # type: ignore[no-any-return]

    def _near_duplicates(self, rows: Numbers) -> Numbers:
        """Return those that are much like one before them (Broder, "On the resemblance of documents", 1997).

        Rows that have a band of their signatures in common are each compared with the first of them that is left.
        """
        gone = np.zeros(self.rows, np.bool_)
        if not len(rows):
            return rows
        self._signatures.flush()
        signatures = np.memmap(self._signatures, np.uint32, "r", shape=(self.rows, HASHES))
        for band in range(BANDS):
            rows = rows[~gone[rows]]
            self._bands.seek(band * self._total * 8)
            keys = np.frombuffer(self._bands.read(self.rows * 8), np.uint64)[rows]
            order = np.argsort(keys, kind="stable")
            starts = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1]]))
            leader = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
            pairs = np.flatnonzero(leader != order)
            for part in np.array_split(pairs, len(pairs) // 2**16 + 1):
                one, other = rows[leader[part]], rows[order[part]]
                alike = (signatures[one] == signatures[other]).mean(1) >= NEAR
                gone[other[alike]] = True
        return np.flatnonzero(gone)


def _write(file: IO[bytes], place: int, numbers: NDArray[Any]) -> None:
    file.seek(place)
    file.write(numbers.tobytes())


def _far_out(lengths: NDArray[np.int32]) -> Flags:
    logs = np.log(np.maximum(lengths, 1))
    if not len(logs):
        return np.zeros(0, np.bool_)
    low, high = np.quantile(logs, [0.25, 0.75])
    reach = FAR * max(high - low, np.log(2))
    return (logs < low - reach) | (logs > high + reach)  # type: ignore[no-any-return]
