"""What rows are worth: what says nothing, repeats, breaks off or was said before goes, and little else."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_sampling import RANDOM, drawn, pairs, write

from trainer.quality import NEAR, Judge, Runs, Text, Verdict, contents, find_topics

CHINESE = "".join(chr(code) for code in range(0x4E00, 0x5A00))


def sentence(generator: random.Random, length: int = 120) -> str:
    """Text of random characters, half of it Chinese, that ends as one does."""
    letters = CHINESE if generator.random() < 0.5 else "abcdefghijklmnopqrstuvwxyz      "
    return "".join(generator.choices(letters, k=length)).strip() + "."


def judged(rows: list[tuple[str, str]], folder: Path) -> list[Verdict]:
    text = Text.of(pairs(rows))
    with Judge(len(rows), find_topics(Runs.of(text.whole).vectors, 0), folder) as judge:
        judge.look(text)
        judge.decide()
    return [Verdict(verdict) for verdict in judge.verdicts.tolist()]


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (("", "An answer."), Verdict.EMPTY),
        (("A question?", "  \n"), Verdict.EMPTY),
        (("说什么?", "好的好的" * 50 + "。"), Verdict.REPEATED),
        (("A question?", "First this, then that, and,"), Verdict.TRUNCATED),
        (("A question?", "".join(map(chr, range(0x4E00, 0x9000))) + "."), Verdict.OUTLIER),
    ],
)
def test_what_is_worth_nothing_goes(row: tuple[str, str], verdict: Verdict, tmp_path: Path) -> None:
    generator = random.Random(0)
    others = [(sentence(generator), sentence(generator)) for _ in range(60)]
    assert judged([*others, row], tmp_path) == [Verdict.KEPT] * 60 + [verdict]


def test_answers_that_something_cut_at_one_length_go(tmp_path: Path) -> None:
    generator = random.Random(1)
    whole = [("q?", sentence(generator, generator.randint(100, 300))) for _ in range(500)]
    cut = [("q?", sentence(generator, 400)[:320]) for _ in range(20)]
    assert judged(whole + cut, tmp_path) == [Verdict.KEPT] * 500 + [Verdict.TRUNCATED] * 20
    assert judged([*whole, cut[0]], tmp_path) == [Verdict.KEPT] * 501, "one alone is just the longest"
    longer = [("q?", sentence(generator, 400))]
    assert judged(whole + cut + longer, tmp_path)[500:] == [Verdict.TRUNCATED] * 20 + [Verdict.KEPT]


def test_short_answers_of_a_class_are_no_cut_ones_and_signs_say_something(tmp_path: Path) -> None:
    generator = random.Random(4)
    classes = [(sentence(generator), generator.choice(["A", "B", "yes", "no"])) for _ in range(200)]
    assert judged(classes, tmp_path) == [Verdict.KEPT] * 200
    label = "this is the one label that all of them have, again and again, word for word, and it is a hundred long"
    assert judged([(question, label) for question, _ in classes], tmp_path) == [Verdict.KEPT] * 200
    sums = [(f"{a} {sign} {b} = ?", f"{a}{sign}{b}") for a, b in ((17, 4), (23, 8), (91, 7)) for sign in "+-*/"]
    assert judged(sums, tmp_path) == [Verdict.KEPT] * 12
    smiles = [("How are you?", chr(0x1F600 + i) * 3) for i in range(20)]
    assert judged(smiles, tmp_path) == [Verdict.KEPT] * 20
    assert judged([("", "")], tmp_path) == [Verdict.EMPTY]


def test_planted_duplicates_go_and_distinct_rows_stay(tmp_path: Path) -> None:
    """Of exact ones all, of near ones (case, blanks, two letters) 95 %, of distinct rows 0.5 % at most."""
    generator = random.Random(2)
    distinct = [(sentence(generator), sentence(generator)) for _ in range(3000)]
    copies = generator.sample(distinct, 300)
    near = []
    for prompt, response in generator.sample(distinct, 300):
        at = generator.sample(range(10, 110), 2)
        letters = ["x" if i in at else c for i, c in enumerate(response)]
        near.append((f"{prompt.upper()} ", "".join(letters)))
    verdicts = judged(distinct + copies + near, tmp_path)
    assert Counter(verdicts[3000:3300]) == {Verdict.DUPLICATE: 300}
    assert verdicts[3300:].count(Verdict.NEAR_DUPLICATE) >= 285
    assert verdicts[:3000].count(Verdict.KEPT) >= 2985


@given(st.integers(0, 10**6), st.integers(0, 80))
def test_rows_much_less_alike_than_the_threshold_are_no_near_duplicates(seed: int, changed: int) -> None:
    generator = random.Random(seed)
    one = "".join(generator.choices(CHINESE, k=100))
    letters = list(one)
    for at in generator.sample(range(100), changed):
        letters[at] = "a"
    runs = [Runs.of(pa.array([text])).hashes for text in (one, "".join(letters))]
    alike = len(np.intersect1d(*runs)) / len(np.union1d(*runs))
    with tempfile.TemporaryDirectory() as folder:
        verdicts = judged([("q", one + "."), ("q", "".join(letters) + ".")], Path(folder))
    if alike < NEAR - 0.15:
        assert verdicts[1] == Verdict.KEPT
    if alike > NEAR + 0.1:
        assert verdicts[1] in (Verdict.DUPLICATE, Verdict.NEAR_DUPLICATE)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=20))
def test_runs_are_of_one_row_alone_without_its_blanks(rows: list[str]) -> None:
    together = Runs.of(pa.array(rows))
    for i, row in enumerate(rows):
        alone = Runs.of(pa.array([row]))
        here = slice(together.first[i], together.first[i + 1])
        assert np.array_equal(together.hashes[here], alone.hashes)
        assert np.allclose(together.vectors[i], alone.vectors[0])
        assert together.distinct_share[i] == alone.distinct_share[0]
        seen = [c for c in row if not c.isspace() and (c.isprintable() or ord(c) >= 0xA0)]
        assert len(alone.hashes) == max(1, len(seen) - 4)


def test_a_content_is_its_words_whatever_file_has_them() -> None:
    turns = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None, []]
    text = Text.of(pa.table({"conversations": pa.array(turns)}))
    assert text.whole.to_pylist() == ["a\nb", "", ""]
    assert text.answer.to_pylist() == ["b", "", ""]
    assert text.blank.tolist() == [False, True, True]
    same = Text.of(pa.table({"prompt": ["a"], "response": ["b"], "other": [1]}))
    assert contents(text, 7)[0] == contents(same, 7)[0] != contents(same, 8)[0]


def test_a_smart_sample_keeps_the_shares_of_lengths_and_topics(tmp_path: Path) -> None:
    generator = random.Random(3)
    rows = [(sentence(generator, 10), sentence(generator, generator.choice((40, 150, 600)))) for _ in range(2000)]
    file = write(tmp_path / "rows.parquet", pairs(rows + rows[:500]))
    made = drawn([file], replace(RANDOM, rows=600, smart=True), tmp_path / "out.parquet")
    assert made.gone == {"duplicate": 500}
    left = pq.read_table(tmp_path / "out.parquet")["response"].to_pylist()
    assert len(left) == len(set(left)) == 600
    every = [response for _, response in rows]
    for low, high in ((0, 100), (100, 400), (400, 700)):
        was, now = (sum(low < len(r) <= high for r in side) / len(side) for side in (every, left))
        assert now == pytest.approx(was, abs=0.02)
    chinese_was, chinese_now = (sum(r[0] in CHINESE for r in side) / len(side) for side in (every, left))
    assert chinese_now == pytest.approx(chinese_was, abs=0.03)
