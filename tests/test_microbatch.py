"""Micro-batches: every target at the position that predicts it, and padding that changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build, workload

from autotune.batching import balanced_cuts
from autotune.plan import Task, Workload
from trainer.data import TokenStore, write_store
from trainer.encode import Sample
from trainer.forward import forward
from trainer.microbatch import (
    IGNORED,
    MicroBatch,
    SpecialTokens,
    WorstCase,
    collate,
    cut,
    lay_out,
    padded_size,
    target_count,
)

FAMILY: dict[Task, str] = {"causal": "llama", "seq2seq": "t5"}
SPECIAL = SpecialTokens(pad=0, decoder_start=1)
WORDS = st.integers(2, 96)


def alone(ids: Sequence[int]) -> list[list[int]]:
    """Rows of one sample each."""
    return [[i] for i in ids]


class Memory:
    """Samples held in memory, as a store gives them."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def tokens(self, i: int) -> Any:
        return np.array(self.samples[i].tokens, np.uint16)

    def spans(self, i: int) -> Any:
        return np.array(self.samples[i].spans, np.int32).reshape(-1, 2)


@st.composite
def causal_samples(draw: Any, limit: int) -> Sample:
    tokens = draw(st.lists(WORDS, min_size=1, max_size=limit))
    borders = draw(st.lists(st.integers(1, len(tokens)), unique=True, max_size=6).map(sorted))
    return Sample(tokens, list(zip(borders[::2], borders[1::2], strict=False)))


@st.composite
def seq2seq_samples(draw: Any, limit: int, target_limit: int) -> Sample:
    source = draw(st.lists(WORDS, min_size=1, max_size=limit))
    target = draw(st.lists(WORDS, min_size=1, max_size=target_limit))
    return Sample([*source, *target], [(len(source), len(source) + len(target))])


LIMITS = st.sampled_from([5, 8, 13, 16, 30])


@st.composite
def batches(draw: Any, task: Task) -> tuple[list[Sample], Workload]:
    limit, target_limit = draw(LIMITS), draw(LIMITS) if task == "seq2seq" else 0
    one = causal_samples(limit) if task == "causal" else seq2seq_samples(limit, target_limit)
    samples = draw(st.lists(one, min_size=1, max_size=6))
    return samples, workload(FAMILY[task], max_seq_len=limit, max_target_len=target_limit)


def predicted(batch: MicroBatch, name: str) -> list[tuple[int, int, int]]:
    """Row, column and token of each target."""
    width = batch.inputs[name].shape[1]
    places = batch.target_positions.tolist()
    pairs = zip(places, batch.targets.tolist(), strict=True)
    return [(place // width, place % width, token) for place, token in pairs if token != IGNORED]


def is_padded_length(length: int, longest: int, limit: int) -> bool:
    return length == limit < longest + 8 or (length % 8 == 0 and longest <= length < longest + 8 and length <= limit)


@settings(deadline=None)
@given(batches("causal"))
def test_a_causal_target_sits_where_the_token_after_is_the_target(given: tuple[list[Sample], Workload]) -> None:
    samples, work = given
    batch = collate(alone(range(len(samples))), Memory(samples), work, SPECIAL)
    ids = batch.inputs["input_ids"]
    found = predicted(batch, "input_ids")
    assert all(ids[row, column + 1] == token for row, column, token in found)
    expected = [(row, p) for row, sample in enumerate(samples) for s, e in sample.spans for p in range(s, e)]
    assert [(row, column + 1) for row, column, _ in found] == expected
    assert set(batch.inputs) == {"input_ids"}


@settings(deadline=None)
@given(batches("seq2seq"))
def test_a_seq2seq_target_sits_where_the_decoder_is_given_the_token_before(
    given: tuple[list[Sample], Workload],
) -> None:
    samples, work = given
    batch = collate(alone(range(len(samples))), Memory(samples), work, SPECIAL)
    ids = batch.inputs["decoder_input_ids"]
    targets = [sample.tokens[sample.spans[0][0] :] for sample in samples]
    found = predicted(batch, "decoder_input_ids")
    assert found == [(row, i, token) for row, target in enumerate(targets) for i, token in enumerate(target)]
    for row, target in enumerate(targets):
        given_tokens = [SPECIAL.decoder_start, *target[:-1]]
        assert ids[row].tolist() == given_tokens + [SPECIAL.pad] * (ids.shape[1] - len(target))


@settings(deadline=None)
@given(batches("causal") | batches("seq2seq"))
def test_rows_are_the_samples_padded_to_eight_but_not_over_the_limit(given: tuple[list[Sample], Workload]) -> None:
    samples, work = given
    batch = collate(alone(range(len(samples))), Memory(samples), work, SPECIAL)
    inputs = batch.inputs
    first = [s.tokens if work.task == "causal" else s.tokens[: s.spans[0][0]] for s in samples]
    length = inputs["input_ids"].shape[1]
    assert inputs["input_ids"].tolist() == [row + [SPECIAL.pad] * (length - len(row)) for row in first]
    assert is_padded_length(length, max(map(len, first)), work.max_seq_len)
    assert batch.tokens == sum(len(sample.tokens) for sample in samples)
    if work.task == "causal":
        assert batch.padded_tokens == inputs["input_ids"].numel()
        return
    assert is_padded_length(
        inputs["decoder_input_ids"].shape[1],
        max(end - start for s in samples for start, end in s.spans),
        work.max_target_len,
    )
    assert batch.padded_tokens == inputs["input_ids"].numel() + inputs["decoder_input_ids"].numel()
    assert inputs["segments"].tolist() == [[1] * len(row) + [0] * (length - len(row)) for row in first]


@settings(deadline=None)
@given(batches("causal") | batches("seq2seq"), st.integers(1, 7), st.randoms())
def test_a_step_is_each_sample_once_in_balanced_micro_batches_the_largest_first(
    given: tuple[list[Sample], Workload], rows: int, random: Any
) -> None:
    samples, work = given
    memory, ids = Memory(samples), random.sample(range(len(samples)), len(samples))
    step = lay_out(ids, rows, memory, work, SPECIAL)
    sizes = [batch.inputs["input_ids"].shape[0] for batch in step]
    assert sum(sizes) == len(ids)
    assert len(sizes) == -(-len(ids) // rows)
    assert max(sizes) <= rows
    assert max(sizes) - min(sizes) <= 1
    starts = [sum(balanced_cuts(len(ids), rows)[:i]) for i in range(len(sizes) + 1)]
    cuts = [collate(alone(ids[a:b]), memory, work, SPECIAL) for a, b in pairwise(starts)]
    for batch, whole in zip(step, sorted(cuts, key=lambda b: -b.padded_tokens), strict=True):
        same(batch, whole)
    assert target_count(ids, memory) == sum(int((batch.targets != IGNORED).sum()) for batch in step)
    assert sum(batch.tokens for batch in step) == sum(len(sample.tokens) for sample in samples)


def same(one: MicroBatch, other: MicroBatch) -> None:
    assert one.inputs.keys() == other.inputs.keys()
    assert all(torch.equal(tensor, other.inputs[name]) for name, tensor in one.inputs.items())
    assert torch.equal(one.target_positions, other.target_positions)
    assert torch.equal(one.targets, other.targets)
    assert (one.tokens, one.padded_tokens) == (other.tokens, other.padded_tokens)


def test_no_samples_are_no_micro_batches() -> None:
    assert lay_out([], 4, Memory([]), workload("llama"), SPECIAL) == []
    assert target_count([], Memory([])) == 0


def test_a_store_gives_the_batch_that_its_samples_give(tmp_path: Any) -> None:
    samples = [Sample([5, 6, 7, 8], [(2, 4)]), Sample([9, 10], []), Sample([11, 12, 13], [(1, 2), (2, 3)])]
    write_store(samples, tmp_path, "causal", 97)
    work = workload("llama")
    same(
        collate(alone([2, 0, 1]), TokenStore(tmp_path), work, SPECIAL),
        collate(alone([2, 0, 1]), Memory(samples), work, SPECIAL),
    )


def test_a_batch_moves_to_a_device_whole() -> None:
    batch = collate([[0]], Memory([Sample([5, 6, 7], [(2, 3)])]), workload("llama"), SPECIAL)
    moved = batch.to(torch.device("meta"))
    tensors = [*moved.inputs.values(), moved.target_positions, moved.targets]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.tokens, moved.padded_tokens) == (batch.tokens, batch.padded_tokens)


# The worst case.


@pytest.mark.parametrize("limit", [8, 13, 64])
@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_the_worst_case_fills_its_limits_with_targets(task: Task, limit: int) -> None:
    target_limit = limit + 3 if task == "seq2seq" else 0
    work = workload(FAMILY[task], max_seq_len=limit, max_target_len=target_limit)
    batch = collate(alone(range(3)), WorstCase(work), work, SPECIAL)
    assert batch.inputs["input_ids"].shape == (3, limit)
    assert batch.padded_tokens == batch.tokens == 3 * work.tokens_per_row
    # The first token of a causal row has none before it that could predict it.
    real = int((batch.targets != IGNORED).sum())
    assert real == target_count(range(3), WorstCase(work)) == 3 * (target_limit or limit - 1)
    assert real <= len(batch.targets) <= 3 * (target_limit or limit)
    assert int(batch.inputs["input_ids"].max()) < work.vocabulary_size


@pytest.mark.parametrize(("share", "source", "target"), [(1.0, 64, 32), (0.75, 48, 24), (0.5, 32, 16), (0.01, 2, 1)])
def test_a_share_of_the_worst_case_is_that_share_of_each_limit(share: float, source: int, target: int) -> None:
    causal = workload("llama", max_seq_len=64)
    assert len(WorstCase(causal, share).tokens(0)) == source
    assert WorstCase(causal, share).spans(0).tolist() == [[1, source]]
    seq2seq = workload("t5", max_seq_len=64, max_target_len=32)
    assert len(WorstCase(seq2seq, share).tokens(0)) == source + target
    assert WorstCase(seq2seq, share).spans(0).tolist() == [[source, source + target]]


@settings(deadline=None)
@given(batches("causal") | batches("seq2seq"))
def test_no_batch_is_larger_than_the_worst_case(given: tuple[list[Sample], Workload]) -> None:
    """So a plan that holds for it holds for all data."""
    samples, work = given
    rows = range(len(samples))
    batch, worst = (collate(alone(rows), source, work, SPECIAL) for source in (Memory(samples), WorstCase(work)))
    assert batch.inputs.keys() == worst.inputs.keys()
    assert all(tensor.nbytes <= worst.inputs[name].nbytes for name, tensor in batch.inputs.items())
    assert batch.padded_tokens <= worst.padded_tokens
    assert len(batch.targets) <= len(worst.targets)


# Padding and real models.


def uneven(task: Task) -> list[Sample]:
    random = np.random.Generator(np.random.PCG64(1))
    samples = []
    for source, target in [(3, 17), (26, 1), (1, 9), (17, 26), (8, 8), (25, 2)]:
        tokens = random.integers(2, 97, source + (target if task == "seq2seq" else 0)).tolist()
        samples.append(Sample(tokens, [(source, source + target)] if task == "seq2seq" else []))
    return samples


@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_padding_changes_no_logits_of_a_real_position(task: Task) -> None:
    samples, double = uneven(task), torch.float64
    work = workload(FAMILY[task])
    model = build(FAMILY[task], double).eval()

    def logits(ids: list[int], work: Workload) -> Any:
        with torch.no_grad():
            return forward(model, collate(alone(ids), Memory(samples), work, SPECIAL).inputs)

    padded = logits(list(range(len(samples))), work)
    assert padded.dtype == double
    for i, sample in enumerate(samples):
        start, end = sample.spans[0] if sample.spans else (len(sample.tokens), 2 * len(sample.tokens))
        exact = workload(FAMILY[task], max_seq_len=start, max_target_len=end - start if task == "seq2seq" else 0)
        by_itself = logits([i], exact)
        assert by_itself.shape[1] == end - start, "one row under its own limits is not padded"
        torch.testing.assert_close(padded[i, : end - start], by_itself[0], rtol=0, atol=1e-10)


def test_without_its_mask_an_encoder_would_see_the_padding() -> None:
    """So the law above can fail."""
    samples = uneven("seq2seq")
    model = build("t5", torch.float64).eval()
    batch = collate(alone(range(6)), Memory(samples), workload("t5"), SPECIAL)
    blind = replace(batch, inputs=batch.inputs | {"segments": torch.ones_like(batch.inputs["segments"])})
    with torch.no_grad():
        seen, not_masked = (forward(model, b.inputs)[0] for b in (batch, blind))
    assert (seen - not_masked).abs().max() > 1e-3


def test_targets_come_in_few_lengths_with_little_added() -> None:
    class Rows:
        def __init__(self, length: int) -> None:
            self._length = length

        def tokens(self, i: int) -> Any:
            return np.arange(4096)

        def spans(self, i: int) -> Any:
            return np.array([[1, self._length]])

    work = workload("llama", max_seq_len=4096)
    lengths = [len(collate([[0]], Rows(length), work, SPECIAL).targets) for length in range(2, 4097)]
    assert all(found >= length for length, found in enumerate(lengths, 1))
    assert all(found < length + max(8, length / 8 + 1) for length, found in enumerate(lengths, 1))
    assert len(set(lengths)) <= 8 * 12


# Rows of several samples.


@settings(deadline=None)
@given(batches("causal") | batches("seq2seq"), st.integers(1, 4), st.sampled_from(["packed", "sorted", "fixed"]))
def test_each_sample_lies_whole_in_its_row_and_its_targets_where_they_are_predicted(
    given: tuple[list[Sample], Workload], rows: int, layout: str
) -> None:
    samples, work = given
    work = work.model_copy(update={"layout": layout})
    memory, ids = Memory(samples), range(len(samples))
    found: list[tuple[list[int], list[int]]] = []
    for batch, laid in zip(
        sorted(cut(ids, rows, memory, work), key=lambda b: -padded_size(b, memory, work)),
        lay_out(ids, rows, memory, work, SPECIAL),
        strict=True,
    ):
        assert padded_size(batch, memory, work) == laid.padded_tokens
        assert laid.samples == sum(map(len, batch))
        found += [parts for row in range(len(laid.inputs["input_ids"])) for parts in read_row(laid, row, work)]
    expected = [(sample.tokens, targets_of(sample)) for sample in samples]
    assert sorted(found) == sorted(expected)


def targets_of(sample: Sample) -> list[int]:
    return [token for start, end in sample.spans for token in sample.tokens[start:end]]


def read_row(batch: MicroBatch, row: int, work: Workload) -> list[tuple[list[int], list[int]]]:
    """Read samples back from a row by its segments: their tokens, and what is predicted of them."""
    name = "input_ids" if work.task == "causal" else "decoder_input_ids"
    ids = batch.inputs[name][row]
    predictions = {column: token for r, column, token in predicted(batch, name) if r == row}
    prefix = "decoder_" if work.task == "seq2seq" else ""
    segments = batch.inputs.get(f"{prefix}segments")
    if segments is None:  # a row is a sample, padded on its right
        assert work.layout != "packed"
        filled = sorted(predictions)[-1] + 1 if predictions else len(ids)
        source = batch.inputs["input_ids"][row]
        if work.task == "seq2seq":
            real = int((batch.inputs["segments"][row] != 0).sum())
            targets = [predictions[column] for column in range(filled)]
            return [([*source[:real].tolist(), *targets], targets)]
        real = int((source != SPECIAL.pad).sum())
        return [(source[:real].tolist(), [predictions[column] for column in sorted(predictions)])]
    found = []
    for number in range(1, int(segments[row].max()) + 1):
        places = (segments[row] == number).nonzero().flatten()
        assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1)), "in one piece"
        positions = batch.inputs[f"{prefix}position_ids"][row][places]
        assert positions.tolist() == list(range(len(places))), "that begins anew"
        targets = [predictions[place] for place in places.tolist() if place in predictions]
        if work.task == "seq2seq":
            assert ids[places].tolist() == [SPECIAL.decoder_start, *targets[:-1]]
            own = batch.inputs["segments"][row] == number
            found.append(([*batch.inputs["input_ids"][row][own].tolist(), *targets], targets))
        else:
            found.append((ids[places].tolist(), targets))
    return found


def test_rows_that_are_filled_with_several_samples_hold_what_they_say() -> None:
    samples = [Sample([5, 6, 7, 8, 9], [(1, 3), (4, 5)]), Sample([10, 11, 12], [(2, 3)])]
    work = workload("llama", layout="packed", max_seq_len=16)
    (batch,) = lay_out([1, 0], 4, Memory(samples), work, SPECIAL)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch.inputs["segments"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 2]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert predicted(batch, "input_ids") == [(0, 0, 6), (0, 1, 7), (0, 3, 9), (0, 6, 12)]
    assert (batch.samples, batch.tokens, batch.padded_tokens) == (2, 8, 8)
