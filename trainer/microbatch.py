"""The samples of one optimizer step -> micro-batches of tensors, none larger than the plan's. Pure.

Rows are padded on the right, to the longest of the micro-batch rounded up to 8. A causal model of one sample a row
needs no mask for that: what is real never looks to its right. All else is told by segments: which sample of its row a
position belongs to, from 1; 0 is padding. `trainer.forward` makes the masks of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autotune.batching import PADDING_MULTIPLE
from autotune.layout import Row, arrange, padded
from autotune.plan import Workload

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
    """Each [rows, length], integers: `input_ids`; seq2seq `segments` and `decoder_input_ids` [rows, target length];
    rows of several samples `segments` and `position_ids` of each side, those of the decoder with its prefix."""
    target_positions: Tensor
    """[targets], index into the flattened [rows x length] positions of the output."""
    targets: Tensor
    """[targets], token to be predicted there; IGNORED in what fills the length up."""
    samples: int
    tokens: int
    """Real tokens, template included."""
    padded_tokens: int
    """What the model computes on, padding included."""

    def to(self, device: torch.device) -> MicroBatch:
        """Return the same micro-batch on a device."""
        return replace(
            self,
            inputs={name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            target_positions=self.target_positions.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids that a batch is built with."""

    pad: int
    decoder_start: int


def lay_out(
    ids: Sequence[int], rows: int, samples: Samples, workload: Workload, special: SpecialTokens
) -> list[MicroBatch]:
    """Lay the samples of a step out as the workload says, in micro-batches of at most `rows` full rows; largest first.

    An allocator cuts what it keeps of a large tensor for small ones, but has to find new memory the other way round.
    """
    batches = [collate(batch, samples, workload, special) for batch in cut(ids, rows, samples, workload)]
    return sorted(batches, key=lambda batch: batch.padded_tokens, reverse=True)


def cut(ids: Sequence[int], rows: int, samples: Samples, workload: Workload) -> list[list[Row]]:
    """Say which samples share a micro-batch, and which of them a row."""
    lengths = [_lengths(i, samples, workload) for i in ids]
    arranged = arrange(lengths, workload.layout, rows, workload.limits, workload.starting_tokens)
    return [[[ids[i] for i in row] for row in batch] for batch in arranged]


def padded_size(batch: Sequence[Row], samples: Samples, workload: Workload) -> int:
    """Count the tokens of a micro-batch, padding included."""
    rows = [[_lengths(i, samples, workload) for i in row] for row in batch]
    sides = [[sum(lengths[side] for lengths in row) for row in rows] for side in range(len(workload.limits))]
    return len(batch) * sum(padded(max(side), limit) for side, limit in zip(sides, workload.limits, strict=True))


def _lengths(i: int, samples: Samples, workload: Workload) -> tuple[int, ...]:
    if workload.task == "causal":
        return (len(samples.tokens(i)),)
    source = int(samples.spans(i)[0, 0])
    return (source, len(samples.tokens(i)) - source)


def collate(batch: Sequence[Row], samples: Samples, workload: Workload, special: SpecialTokens) -> MicroBatch:
    """Lay samples out as these rows."""
    if workload.task == "causal":
        return _causal(batch, samples, workload, special)
    return _seq2seq(batch, samples, workload, special)


def target_count(ids: Sequence[int], samples: Samples) -> int:
    """Count the target tokens of these samples: what the loss of a step is divided by."""
    return sum(int((spans[:, 1] - spans[:, 0]).sum()) for spans in map(samples.spans, ids))


def _causal(batch: Sequence[Row], samples: Samples, workload: Workload, special: SpecialTokens) -> MicroBatch:
    tokens = [[np.asarray(samples.tokens(i), np.int64) for i in row] for row in batch]
    length = _padded_length(tokens, workload.max_seq_len)
    inputs = {"input_ids": _padded(tokens, length, special.pad)}
    if workload.layout == "packed":
        inputs |= _places(tokens, length)
    positions, targets = [], []
    for row, parts in enumerate(batch):
        start = row * length
        for i, part in zip(parts, tokens[row], strict=True):
            # What is predicted at a position is the token after it.
            positions += [start + np.arange(s - 1, e - 1) for s, e in samples.spans(i)]
            targets += [part[s:e] for s, e in samples.spans(i)]
            start += len(part)
    return MicroBatch(
        inputs,
        *_on_grid(positions, targets, len(batch) * length),
        samples=sum(map(len, batch)),
        tokens=sum(len(part) for row in tokens for part in row),
        padded_tokens=len(batch) * length,
    )


def _seq2seq(batch: Sequence[Row], samples: Samples, workload: Workload, special: SpecialTokens) -> MicroBatch:
    sources: list[list[Array]] = []
    targets: list[list[Array]] = []
    given: list[list[Array]] = []
    """To the decoder: what is predicted at a position is the token that it is given next."""
    for row in batch:
        borders = [int(samples.spans(i)[0, 0]) for i in row]
        whole = [np.asarray(samples.tokens(i), np.int64) for i in row]
        sources.append([tokens[:border] for tokens, border in zip(whole, borders, strict=True)])
        targets.append([tokens[border:] for tokens, border in zip(whole, borders, strict=True)])
        given.append([np.concatenate(([special.decoder_start], target[:-1])) for target in targets[-1]])
    length = _padded_length(sources, workload.max_seq_len)
    target_length = _padded_length(targets, workload.max_target_len)
    places, decoder_places = _places(sources, length), _places(targets, target_length)
    inputs = {
        "input_ids": _padded(sources, length, special.pad),
        "decoder_input_ids": _padded(given, target_length, special.pad),
        "segments": places["segments"],
    }
    if workload.layout == "packed":
        inputs |= places | {f"decoder_{name}": tensor for name, tensor in decoder_places.items()}
    row_lengths = [sum(map(len, row)) for row in targets]
    return MicroBatch(
        inputs,
        *_on_grid(
            [row * target_length + np.arange(count) for row, count in enumerate(row_lengths)],
            [part for row in targets for part in row],
            len(batch) * target_length,
        ),
        samples=sum(map(len, batch)),
        tokens=sum(len(part) for side in (sources, targets) for row in side for part in row),
        padded_tokens=len(batch) * (length + target_length),
    )


def _padded_length(rows: list[list[Array]], limit: int) -> int:
    return padded(max(sum(map(len, row)) for row in rows), limit)


def _padded(rows: list[list[Array]], length: int, pad: int) -> Tensor:
    filled = np.full((len(rows), length), pad, np.int64)
    for row, parts in zip(filled, rows, strict=True):
        values = np.concatenate(parts)
        row[: len(values)] = values
    return torch.from_numpy(filled)


def _places(rows: list[list[Array]], length: int) -> dict[str, Tensor]:
    """Say of each position which sample of its row it belongs to, and its place in it."""
    segments = [[np.full(len(part), at) for at, part in enumerate(row, 1)] for row in rows]
    positions = [[np.arange(len(part)) for part in row] for row in rows]
    return {"segments": _padded(segments, length, 0), "position_ids": _padded(positions, length, 0)}


def _on_grid(positions: list[Array], targets: list[Array], most: int) -> tuple[Tensor, Tensor]:
    """Join positions and targets, filled up with ignored ones to one of a few lengths, eight an octave.

    Else each step brings the vocabulary head a shape of its own, for which oneDNN makes and keeps a kernel: seen to
    take 350 MiB over 240 steps of a tiny model, which no dry step had shown.
    """
    count = sum(map(len, targets))
    coarseness = max(PADDING_MULTIPLE, 2 ** (count.bit_length() - 4))
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
