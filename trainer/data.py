"""The token store: samples on disk, memory-mapped, and the order in which an epoch takes them.

A store is four flat files and a summary: `tokens` (uint16, or uint32 for a large vocabulary), `offsets` (int64, one
more than samples), `spans` (int32 pairs, targets within the sample) and `span_offsets` (int64).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autotune.errors import DataError
from autotune.plan import Task
from trainer.encode import Sample

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """What was written: numbers that a plan and a forecast need."""

    samples: int
    tokens: int
    target_tokens: int
    lengths: tuple[tuple[tuple[int, int], ...], ...]
    """Histograms of (tokens, samples): of sequences, or of sources and of targets."""


def write_store(samples: Iterable[Sample], folder: Path, task: Task, vocabulary_size: int) -> StoreFacts:
    """Write samples as they come; memory does not grow with them. Raises DataError if there is nothing to train on."""
    token_type = np.uint16 if vocabulary_size <= np.iinfo(np.uint16).max + 1 else np.uint32
    sides: tuple[Counter[int], ...] = (Counter(), Counter()) if task == "seq2seq" else (Counter(),)
    count = tokens = target_tokens = spans = 0
    with (
        (folder / "tokens").open("wb") as token_file,
        (folder / "offsets").open("wb") as offset_file,
        (folder / "spans").open("wb") as span_file,
        (folder / "span_offsets").open("wb") as span_offset_file,
    ):
        offset_file.write(np.int64(0).tobytes())
        span_offset_file.write(np.int64(0).tobytes())
        for sample in samples:
            count += 1
            tokens += len(sample.tokens)
            spans += len(sample.spans)
            target_tokens += sum(end - start for start, end in sample.spans)
            token_file.write(np.asarray(sample.tokens, token_type).tobytes())
            offset_file.write(np.int64(tokens).tobytes())
            span_file.write(np.asarray(sample.spans, np.int32).tobytes())
            span_offset_file.write(np.int64(spans).tobytes())
            for side, length in zip(sides, _lengths(sample, task), strict=True):
                side[length] += 1
    if target_tokens == 0:
        raise DataError("there is no token to train on in this data")
    return StoreFacts(count, tokens, target_tokens, tuple(tuple(sorted(side.items())) for side in sides))


def _lengths(sample: Sample, task: Task) -> tuple[int, ...]:
    if task == "causal":
        return (len(sample.tokens),)
    start, end = sample.spans[0]
    return (start, end - start)


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


def order(samples: int, seed: int, epoch: int) -> Array:
    """Return the order in which an epoch takes its samples: a permutation by (seed, epoch) alone, on any machine."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(samples)
