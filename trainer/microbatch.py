"""The samples of one optimizer step -> micro-batches of tensors, none larger than the plan's. Pure.

Layout `fixed`: a row is a sample. Rows are padded on the right, to the longest of the micro-batch rounded up to 8 (few
shapes, and whole tiles for the matrix units). A causal model needs no mask for that: what is real never looks to its
right. An encoder does, and gets one that is ready to be added to the scores, so that nothing is read back to build it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autotune.batching import balanced_cuts
from autotune.plan import Workload

MULTIPLE = 8
IGNORED = -100
"""The target of no token, as torch's cross-entropy has it by default."""
Array = npt.NDArray[Any]


class Samples(Protocol):
    """Where samples come from: a token store, or the worst case that there can be."""

    def tokens(self, i: int) -> Array:
        """Return the tokens of sample i."""

    def spans(self, i: int) -> Array:
        """Return its target spans [start, end), [spans, 2]."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward/backward: what the model is given, and where it has to predict what."""

    inputs: dict[str, Tensor]
    """By name of the model's argument: input_ids [rows, length]; seq2seq: attention_mask [rows, 1, 1, length] of zeros
    and of the lowest number, and decoder_input_ids [rows, target length]."""
    target_positions: Tensor
    """[targets], index into the flattened [rows x length] positions of the output."""
    targets: Tensor
    """[targets], token to be predicted there; IGNORED in what fills the length up."""
    tokens: int
    """Real tokens, template included."""
    padded_tokens: int
    """What the model computes on, padding included."""

    def to(self, device: torch.device) -> MicroBatch:
        """Return the same micro-batch on a device."""
        return MicroBatch(
            {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            self.target_positions.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.tokens,
            self.padded_tokens,
        )


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids that a batch is built with."""

    pad: int
    decoder_start: int


def lay_out(
    ids: Sequence[int],
    rows: int,
    samples: Samples,
    workload: Workload,
    special: SpecialTokens,
    dtype: torch.dtype = torch.float32,
) -> list[MicroBatch]:
    """Cut the samples of a step, in their order, into balanced micro-batches of at most `rows` rows; largest first.

    An allocator cuts what it keeps of a large tensor for small ones, but has to find new memory the other way round.
    """
    batches, start = [], 0
    for size in balanced_cuts(len(ids), rows):
        batches.append(collate(ids[start : start + size], samples, workload, special, dtype))
        start += size
    return sorted(batches, key=lambda batch: batch.padded_tokens, reverse=True)


def collate(
    ids: Sequence[int],
    samples: Samples,
    workload: Workload,
    special: SpecialTokens,
    dtype: torch.dtype = torch.float32,
) -> MicroBatch:
    """Lay samples out as rows; `dtype` is that of the mask, which has to be the model's."""
    tokens = [np.asarray(samples.tokens(i), np.int64) for i in ids]
    spans = [samples.spans(i) for i in ids]
    if workload.task == "causal":
        return _causal(tokens, spans, workload, special)
    return _seq2seq(tokens, spans, workload, special, dtype)


def target_count(ids: Sequence[int], samples: Samples) -> int:
    """Count the target tokens of these samples: what the loss of a step is divided by."""
    return sum(int((spans[:, 1] - spans[:, 0]).sum()) for spans in map(samples.spans, ids))


def _causal(tokens: list[Array], spans: list[Array], workload: Workload, special: SpecialTokens) -> MicroBatch:
    length = _padded_length(tokens, workload.max_seq_len)
    # What is predicted at a position is the token after it.
    positions = [row * length + np.arange(s - 1, e - 1) for row, pairs in enumerate(spans) for s, e in pairs]
    targets = [tokens[row][s:e] for row, pairs in enumerate(spans) for s, e in pairs]
    return MicroBatch(
        {"input_ids": _padded(tokens, length, special.pad)},
        *_on_grid(positions, targets, len(tokens) * length),
        sum(map(len, tokens)),
        len(tokens) * length,
    )


def _seq2seq(
    tokens: list[Array], spans: list[Array], workload: Workload, special: SpecialTokens, dtype: torch.dtype
) -> MicroBatch:
    sources = [row[: pairs[0, 0]] for row, pairs in zip(tokens, spans, strict=True)]
    targets = [row[pairs[0, 0] :] for row, pairs in zip(tokens, spans, strict=True)]
    starts = [np.concatenate(([special.decoder_start], target[:-1])) for target in targets]
    source_length = _padded_length(sources, workload.max_seq_len)
    target_length = _padded_length(targets, workload.max_target_len)
    mask = np.arange(source_length) >= np.array([len(source) for source in sources])[:, None]
    hidden = torch.from_numpy(mask)[:, None, None, :]
    return MicroBatch(
        {
            "input_ids": _padded(sources, source_length, special.pad),
            "attention_mask": torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min),
            "decoder_input_ids": _padded(starts, target_length, special.pad),
        },
        *_on_grid(
            [row * target_length + np.arange(len(target)) for row, target in enumerate(targets)],
            targets,
            len(tokens) * target_length,
        ),
        sum(map(len, tokens)),
        len(tokens) * (source_length + target_length),
    )


def _padded_length(rows: list[Array], limit: int) -> int:
    return min(ceil(max(map(len, rows)) / MULTIPLE) * MULTIPLE, limit)


def _padded(rows: list[Array], length: int, pad: int) -> Tensor:
    padded = np.full((len(rows), length), pad, np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(padded)


def _on_grid(positions: list[Array], targets: list[Array], most: int) -> tuple[Tensor, Tensor]:
    """Join positions and targets, filled up with ignored ones to one of a few lengths, eight an octave.

    Else each step brings the vocabulary head a shape of its own, for which oneDNN makes and keeps a kernel: seen to
    take 350 MiB over 240 steps of a tiny model, which no dry step had shown.
    """
    count = sum(map(len, targets))
    coarseness = max(MULTIPLE, 2 ** (count.bit_length() - 4))
    length = min(ceil(max(count, 1) / coarseness) * coarseness, most)
    filled = np.zeros((2, length), np.int64)
    filled[1] = IGNORED
    if count:
        filled[:, :count] = np.concatenate(positions), np.concatenate(targets)
    return torch.from_numpy(filled[0]), torch.from_numpy(filled[1])


@dataclass(frozen=True, slots=True)
class WorstCase:
    """Samples as long as the plan allows, or a share of that, every token of which is a target: for dry steps."""

    workload: Workload
    share: float = 1.0

    def tokens(self, i: int) -> Array:
        """Return arbitrary tokens, source and target filling their share of the limits."""
        generator = np.random.Generator(np.random.PCG64(i))
        return generator.integers(0, self.workload.vocabulary_size, sum(self._lengths()))

    def spans(self, i: int) -> Array:  # noqa: ARG002 # all are alike
        """Return the one span of all that can be predicted."""
        source, target = self._lengths()
        return np.array([[source if target else 1, source + target]], np.int32)

    def _lengths(self) -> tuple[int, int]:
        limits = (self.workload.max_seq_len, self.workload.max_target_len)
        source, target = (ceil(self.share * limit) for limit in limits)
        return max(2, source), target
