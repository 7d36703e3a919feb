"""The token store: samples on disk, memory-mapped, and the order in which an epoch takes them.

A store is four flat files and a summary: `tokens` (uint16, or uint32 for a large vocabulary), `offsets` (int64, one
more than samples), `spans` (int32 pairs, targets within the sample) and `span_offsets` (int64).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from math import isqrt
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from autotune.errors import DataError
from autotune.plan import Task
from trainer.encode import Sample

Array = npt.NDArray[Any]
FILES = ("tokens", "offsets", "spans", "span_offsets")
TOGETHER = 1024
"""Samples that are written together."""
AHEAD = 4096
"""Places of an order that are worked out together: a few take hardly less time."""
ROUNDS = 12
"""Of an order, six for each side: of few samples too no place is likelier than another, nor any pair of places."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Samples end to end, as they will lie in a store."""

    tokens: Array
    ends: Array
    """Where each sample ends, int64."""
    spans: Array
    span_ends: Array


def pack(samples: Sequence[Sample], vocabulary_size: int) -> Packed:
    """Lay samples end to end."""
    token_type = np.uint16 if vocabulary_size <= np.iinfo(np.uint16).max + 1 else np.uint32
    return Packed(
        np.array([*chain.from_iterable(sample.tokens for sample in samples)], token_type),
        np.cumsum([len(sample.tokens) for sample in samples], dtype=np.int64),
        np.array([*chain.from_iterable(sample.spans for sample in samples)], np.int32).reshape(-1, 2),
        np.cumsum([len(sample.spans) for sample in samples], dtype=np.int64),
    )


@dataclass
class StoreFacts:
    """What was written: numbers that a plan and a forecast need."""

    rows_read: int = 0
    """Of the data files, whether they are in this store or not."""
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    spans: int = 0
    sides: tuple[Counter[int], ...] = ()
    """Samples by length: of sequences, or of sources and of targets."""
    cuts: Counter[str] = field(default_factory=Counter)
    longest: tuple[int, str] = (0, "")
    """Tokens and place of the longest row, before it was cut."""
    sizes: tuple[int, ...] = ()
    """Bytes of each file, when this was saved."""

    @property
    def lengths(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Histograms of (tokens, samples), rising by length."""
        return tuple(tuple(sorted(side.items())) for side in self.sides)


FACTS = TypeAdapter(StoreFacts)


class StoreWriter:
    """Writes a store piece by piece; memory does not grow with it. From what was saved the next writer goes on."""

    def __init__(self, folder: Path, task: Task) -> None:
        self._progress = folder / "progress.json"
        if self._progress.exists():
            self.facts = FACTS.validate_json(self._progress.read_bytes())
            self._files: list[BinaryIO] = [(folder / name).open("r+b") for name in FILES]
            for file, size in zip(self._files, self.facts.sizes, strict=True):
                file.truncate(size)
                file.seek(size)
        else:
            self.facts = StoreFacts(sides=tuple(Counter() for _ in range(1 + (task == "seq2seq"))))
            self._files = [(folder / name).open("wb") for name in FILES]
            for file in self._files[1::2]:
                file.write(np.int64(0).tobytes())

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as all_of_them:  # also where one has still to be written, to a disk that is full
            for file in self._files:
                all_of_them.callback(file.close)

    def append(self, packed: Packed) -> None:
        """Write samples behind those that are there."""
        facts = self.facts
        arrays = (packed.tokens, packed.ends + facts.tokens, packed.spans, packed.span_ends + facts.spans)
        for file, array in zip(self._files, arrays, strict=True):
            file.write(array.tobytes())
        facts.samples += len(packed.ends)
        facts.tokens += len(packed.tokens)
        facts.spans += len(packed.spans)
        facts.target_tokens += int((packed.spans[:, 1] - packed.spans[:, 0]).sum())
        lengths = np.diff(packed.ends, prepend=0)
        if len(facts.sides) == 2:  # a source, then a target, which is the one span
            lengths = np.diff(packed.spans, prepend=0, axis=1).T
        for side, of_side in zip(facts.sides, np.atleast_2d(lengths), strict=True):
            side.update(of_side.tolist())

    def save(self) -> None:
        """Make what is written outlast a kill, and a loss of power."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self.facts.sizes = tuple(file.tell() for file in self._files)
        partial = self._progress.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(FACTS.dump_json(self.facts))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._progress)

    def finish(self) -> None:
        """Say that all is written; raises DataError if there is nothing to train on."""
        if self.facts.target_tokens == 0:
            raise DataError("there is no token to train on in this data")
        self._progress.unlink(missing_ok=True)


def write_store(samples: Iterable[Sample], folder: Path, task: Task, vocabulary_size: int) -> StoreFacts:
    """Write samples as they come. Raises DataError if there is nothing to train on."""
    samples = iter(samples)
    with StoreWriter(folder, task) as writer:
        while some := list(islice(samples, TOGETHER)):
            writer.append(pack(some, vocabulary_size))
        writer.finish()
    return writer.facts


def contents_of(folder: Path) -> str:
    """Return the hash of all samples of a store: what a run that goes on has to find as it was."""
    digest = hashlib.sha256()
    for name in FILES:
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class TokenStore:
    """Samples of a store by number, read through the page cache: memory does not grow with the data."""

    def __init__(self, folder: Path) -> None:
        self._offsets = np.memmap(folder / "offsets", np.int64, "r")
        self._spans = np.memmap(folder / "spans", np.int32, "r").reshape(-1, 2)
        self._span_offsets = np.memmap(folder / "span_offsets", np.int64, "r")
        width = (folder / "tokens").stat().st_size // int(self._offsets[-1])
        self._tokens = np.memmap(folder / "tokens", np.uint16 if width == 2 else np.uint32, "r")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def first_tokens(self, count: int) -> Array:
        """Return the first tokens of the store, over its samples."""
        return self._tokens[:count]

    def tokens(self, i: int) -> Array:
        """Return the tokens of sample i."""
        return self._tokens[self._offsets[i] : self._offsets[i + 1]]

    def spans(self, i: int) -> Array:
        """Return the target spans of sample i, [spans, 2]."""
        return self._spans[self._span_offsets[i] : self._span_offsets[i + 1]]


class Longest(TokenStore):
    """So many of a store's samples, the longest there are, in the store's order."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(folder)
        lengths = np.diff(self._offsets)
        first = max(0, len(lengths) - count)
        self._ids = np.sort(np.argpartition(lengths, first)[first:]) if first else np.arange(len(lengths))

    def __len__(self) -> int:
        return len(self._ids)

    def tokens(self, i: int) -> Array:
        """Return the tokens of sample i."""
        return super().tokens(int(self._ids[i]))

    def spans(self, i: int) -> Array:
        """Return its target spans, [spans, 2]."""
        return super().spans(int(self._ids[i]))


def open_store(folder: Path, longest: int | None) -> TokenStore:
    """Open a store, or so many of its samples, the longest."""
    return TokenStore(folder) if longest is None else Longest(folder, longest)


class Order:
    """The order in which an epoch takes its samples: any slice of a permutation by (seed, epoch), none of it held.

    A Feistel network over the pairs (left < a, right < b) with a x b hardly more than the samples, whose results that
    are no sample are sent through again: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", methods 3 and
    2. Its round function is the finaliser of SplitMix64 (Steele, Lea and Flood 2014). Integers alone: it is the same on
    any machine, for any number of ranks.
    """

    def __init__(self, samples: int, seed: int, epoch: int) -> None:
        self._samples = samples
        self._left = isqrt(max(0, samples - 1)) + 1
        self._right = -(-samples // self._left)
        self._keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)
        self._start = 0
        self._taken: Array = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, part: slice) -> Array:
        start, stop, _ = part.indices(self._samples)
        if not self._start <= start <= stop <= self._start + len(self._taken):
            end = max(stop, min(start + AHEAD, self._samples))
            self._start, self._taken = start, self._take(np.arange(start, end, dtype=np.uint64))
        return self._taken[start - self._start : stop - self._start]

    def _take(self, numbers: Array) -> Array:
        numbers = self._permuted(numbers)
        while (outside := np.flatnonzero(numbers >= self._samples)).size:
            numbers[outside] = self._permuted(numbers[outside])
        taken: Array = numbers.astype(np.int64)
        return taken

    def _permuted(self, numbers: Array) -> Array:
        width = np.uint64(self._right)
        sides: list[Array] = [numbers // width, numbers % width]
        for i, key in enumerate(self._keys):
            size = np.uint64((self._left, self._right)[i % 2])
            moved = sides[i % 2] + _below(size, _mix(sides[1 - i % 2] + key))
            sides[i % 2] = np.where(moved >= size, moved - size, moved)
        return sides[0] * width + sides[1]


def _mix(x: Array) -> Array:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = x ^ (x >> np.uint64(31))
    return mixed


def _below(size: np.uint64, x: Array) -> Array:
    """Return numbers below `size`, itself below 2^32, from numbers below 2^64."""
    return ((x >> np.uint64(32)) * size) >> np.uint64(32)
