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
from trainer.data import TokenStore, order, write_store
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


@given(st.integers(0, 300), st.integers(0, 2**40), st.integers(0, 10**6))
def test_an_epoch_takes_each_sample_once_in_an_order_of_seed_and_epoch(samples: int, seed: int, epoch: int) -> None:
    taken = order(samples, seed, epoch)
    assert sorted(taken.tolist()) == list(range(samples))
    np.random.random()  # what others draw changes nothing
    assert order(samples, seed, epoch).tolist() == taken.tolist()


def test_every_seed_and_every_epoch_has_an_order_of_its_own() -> None:
    orders = {tuple(order(50, seed, epoch).tolist()) for seed, epoch in product(range(20), range(20))}
    assert len(orders) == 400


def test_the_order_is_the_same_on_any_machine_and_with_any_numpy() -> None:
    assert order(10, 42, 0).tolist() == [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]
    assert order(10, 42, 1).tolist() == [0, 8, 7, 4, 3, 1, 2, 9, 6, 5]
