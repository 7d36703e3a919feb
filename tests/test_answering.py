"""What answers will take, measured on a real small model: the law is that of what is measured, not of how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import small_errand
from tiny_models import build

from trainer.answering import measure_answering
from trainer.data import TokenStore
from trainer.evaluate import question


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_is_measured_is_of_the_data_s_own_questions(family: str, tmp_path: Path) -> None:
    errand = small_errand(tmp_path, family)
    store, work = TokenStore(Path(errand.store)), errand.plan.workload
    found = measure_answering(build(family), store, work, range(len(store)), 2**30, 1e-6)
    assert found is not None
    asked = [question(store, i, work) for i in range(len(store))]
    assert found.prompt_tokens == pytest.approx(sum(len(q.prompt) for q in asked) / len(asked))
    assert found.longest_answer <= max(len(q.reference or ()) for q in asked)
    assert found.rows_at_once == len(asked), "there is room for all"
    assert found.seconds_of_token > 0


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_token_is_timed_with_as_much_behind_it_as_one_has_on_average(family: str, tmp_path: Path) -> None:
    errand, model = small_errand(tmp_path, family), build(family)
    store, work, generate, lengths = TokenStore(Path(errand.store)), errand.plan.workload, model.generate, []

    def spied(input_ids: Any, **told: Any) -> Any:
        lengths.append(told.get("decoder_input_ids", input_ids).shape[1])
        return generate(input_ids=input_ids, **told)

    model.generate = spied
    found = measure_answering(model, store, work, range(len(store)), 2**30, 1e-6)
    assert found is not None
    asked = [question(store, i, work) for i in range(len(store))]
    half = max(len(q.reference or ()) for q in asked) // 2
    assert lengths[-1] == half + (0 if family == "t5" else max(len(q.prompt) for q in asked))


def test_where_not_one_row_has_room_nothing_is_said(tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama")
    store, work = TokenStore(Path(errand.store)), errand.plan.workload
    assert measure_answering(build("llama"), store, work, range(len(store)), 1, 1e-6) is None
