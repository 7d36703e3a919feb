"""What people read of a plan: the sentences, from facts made by hand."""

from __future__ import annotations

import facts
import pytest

from autotune.errands import ModelSummary, Preprocessed
from autotune.plan import CardProcess
from cli.render import others_line, print_plan

GIB = 2**30
OLLAMA = CardProcess(process_id=77, name="ollama", bytes=round(2.9 * GIB))
XORG = CardProcess(process_id=78, name="Xorg", bytes=round(0.3 * GIB))
NAMELESS = CardProcess(process_id=79, name="", bytes=None)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ((OLLAMA, XORG), "taken by others: 3.20 GiB: ollama (2.90 GiB), Xorg (0.30 GiB)"),
        ((XORG, NAMELESS), "taken by others: 0.30 GiB: Xorg (0.30 GiB), process 79"),
        ((NAMELESS,), "taken by others: process 79"),
        ((XORG,) * 7, "taken by others: 2.10 GiB: " + "Xorg (0.30 GiB), " * 5 + "2 more"),
    ],
)
def test_others_on_the_card_are_named_with_what_they_hold(others: tuple[CardProcess, ...], said: str) -> None:
    assert others_line(others) == said


@pytest.mark.parametrize("others", [(), (OLLAMA,)])
def test_a_plan_names_the_others_on_the_card_where_there_are_any(
    others: tuple[CardProcess, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelSummary(
        task="causal",
        family="llama",
        parameters=26_000_000,
        trainable_parameters=26_000_000,
        vocabulary_size=6400,
        attention="sdpa",
        random_weights=True,
        longest_input=None,
    )
    prepared = Preprocessed(
        model=model, tokenizer_dir=None, tokenizer_fingerprint=None, ids=None, data=None, validation=None
    )
    plan = facts.plan(workload=facts.workload(cpu_allocator="tight"), hardware=facts.hardware(others=others))
    print_plan(plan, prepared, None, "chatlm train")
    assert ("taken by others" in capsys.readouterr().out) is bool(others)
