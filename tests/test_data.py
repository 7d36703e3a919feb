"""The token store: samples come back exactly, and an epoch takes each of them once."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autotune.errors import DataError
from autotune.plan import Task
from trainer.data import Order, StoreWriter, TokenStore, pack, write_store
from trainer.encode import Sample

SMALL, LARGE = 2**16, 2**16 + 1
"""Vocabularies: the last whose ids fit two bytes, and the first whose do not."""


@st.composite
def causal_samples(draw: Any, vocabulary: int) -> Sample:
    tokens = draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=30))
    borders = draw(st.lists(st.integers(1, len(tokens)), unique=True, max_size=6).map(sorted))
    return Sample(tokens, list(zip(borders[::2], borders[1::2], strict=False)))


@st.composite
def seq2seq_samples(draw: Any, vocabulary: int) -> Sample:
    source, target = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    tokens = draw(st.lists(st.integers(0, vocabulary - 1), min_size=source + target, max_size=source + target))
    return Sample(tokens, [(source, source + target)])


def written(samples: list[Sample], folder: Path, task: Task, vocabulary: int) -> tuple[Any, TokenStore]:
    facts = write_store(iter(samples), folder, task, vocabulary)
    return facts, TokenStore(folder)


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_samples_come_back_as_they_were(task: Task, vocabulary: int) -> None:
    one = causal_samples(vocabulary) if task == "causal" else seq2seq_samples(vocabulary)

    @settings(deadline=None)
    @given(st.lists(one, min_size=1, max_size=8))
    def law(samples: list[Sample]) -> None:
        assume(any(sample.spans for sample in samples))
        with TemporaryDirectory() as folder:
            facts, store = written(samples, Path(folder), task, vocabulary)
            assert len(store) == facts.samples == len(samples)
            back = [
                Sample(store.tokens(i).tolist(), list(map(tuple, store.spans(i).tolist()))) for i in range(len(store))
            ]
            assert back == samples
            together = [token for sample in samples for token in sample.tokens]
            assert facts.tokens == len(together)
            assert facts.target_tokens == sum(end - start for sample in samples for start, end in sample.spans)
            assert store.first_tokens(5).tolist() == together[:5]
            assert store.first_tokens(10**6).tolist() == together
            if task == "causal":
                lengths = [[len(sample.tokens) for sample in samples]]
            else:
                spans = [sample.spans[0] for sample in samples]
                lengths = [[start for start, _ in spans], [end - start for start, end in spans]]
            assert facts.lengths == tuple(tuple(sorted(Counter(side).items())) for side in lengths)

    law()


@pytest.mark.parametrize(("vocabulary", "width"), [(100, 2), (SMALL, 2), (LARGE, 4), (250_000, 4)])
def test_a_token_takes_two_bytes_unless_the_vocabulary_is_larger(tmp_path: Path, vocabulary: int, width: int) -> None:
    _, store = written([Sample([0, vocabulary - 1, 7], [(1, 3)])], tmp_path, "causal", vocabulary)
    assert (tmp_path / "tokens").stat().st_size == 3 * width
    assert store.tokens(0).tolist() == [0, vocabulary - 1, 7]


@pytest.mark.parametrize("samples", [[], [Sample([1, 2], [])], [Sample([1, 2], [(2, 2)])]])
def test_data_without_a_target_is_an_error(tmp_path: Path, samples: list[Sample]) -> None:
    with pytest.raises(DataError, match="no token to train on"):
        write_store(samples, tmp_path, "causal", 100)


def test_a_store_may_hold_samples_without_a_target(tmp_path: Path) -> None:
    samples = [Sample([1], []), Sample([2, 3], [(1, 2)]), Sample([4], [])]
    _, store = written(samples, tmp_path, "causal", 100)
    assert [store.spans(i).tolist() for i in range(3)] == [[], [[1, 2]], []]
    assert all(store.spans(i).shape[1] == 2 for i in range(3))


@given(st.lists(causal_samples(SMALL), min_size=1, max_size=8), st.data())
def test_a_store_that_was_left_goes_on_from_what_was_saved(samples: list[Sample], data: Any) -> None:
    assume(any(start < end for sample in samples for start, end in sample.spans))
    saved = data.draw(st.integers(0, len(samples)), "samples that were saved")
    lost = data.draw(st.integers(saved, len(samples)), "samples that were written, some after that")
    with TemporaryDirectory() as whole, TemporaryDirectory() as left:
        write_store(samples, Path(whole), "causal", SMALL)
        with StoreWriter(Path(left), "causal") as writer:
            writer.append(pack(samples[:saved], SMALL))
            writer.save()
            writer.append(pack(samples[saved:lost], SMALL))
        with StoreWriter(Path(left), "causal") as writer:
            assert writer.facts.samples == saved
            writer.append(pack(samples[saved:], SMALL))
            writer.finish()
        assert contents(Path(left)) == contents(Path(whole))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def taken(samples: int, seed: int, epoch: int) -> list[int]:
    return Order(samples, seed, epoch)[:].tolist()


@given(st.integers(0, 10_000), st.integers(0, 2**40), st.integers(0, 10**6))
def test_an_epoch_takes_each_sample_once_in_an_order_of_seed_and_epoch(samples: int, seed: int, epoch: int) -> None:
    once = taken(samples, seed, epoch)
    assert sorted(once) == list(range(samples))
    np.random.random()  # what others draw changes nothing
    assert taken(samples, seed, epoch) == once


@given(st.integers(1, 10**8), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9000)), min_size=2, max_size=5))
def test_any_slice_of_an_order_is_the_same_whatever_was_asked_before(
    samples: int, parts: list[tuple[float, int]]
) -> None:
    order = Order(samples, 42, 3)
    for share, length in parts:
        start = int(share * samples)
        part = order[start : start + length]
        assert part.tolist() == Order(samples, 42, 3)[start : start + length].tolist()
        assert len(part) == len(set(part.tolist())) == min(length, samples - start)
        assert all(0 <= i < samples for i in part)


@pytest.mark.parametrize("samples", [5, 9, 10, 23])
def test_no_place_and_no_pair_of_places_is_likelier_than_another(samples: int) -> None:
    """By the chi-squared statistic, which lies within five standard deviations of its mean but once in a million."""
    epochs = 4000
    places, pairs = np.zeros((samples, samples)), np.zeros((samples, samples))
    for epoch in range(epochs):
        order = Order(samples, 1, epoch)[:]
        places[np.arange(samples), order] += 1
        pairs[order[0], order[1]] += 1
    assert deviations(places.ravel(), epochs / samples, (samples - 1) ** 2) < 5
    different = pairs[~np.eye(samples, dtype=bool)]
    assert deviations(different, epochs / len(different), len(different) - 1) < 5


def deviations(counts: Any, expected: float, freedom: int) -> float:
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_every_seed_and_every_epoch_has_an_order_of_its_own() -> None:
    orders = {tuple(taken(50, seed, epoch)) for seed, epoch in product(range(20), range(20))}
    assert len(orders) == 400


def test_the_order_is_the_same_on_any_machine_and_with_any_numpy() -> None:
    assert taken(10, 42, 0) == [9, 1, 2, 4, 8, 7, 3, 6, 5, 0]
    assert taken(10, 42, 1) == [6, 4, 3, 2, 9, 8, 0, 5, 1, 7]
    assert Order(10**8, 42, 0)[10**7 : 10**7 + 4].tolist() == [61110489, 95661946, 26657797, 66307120]
