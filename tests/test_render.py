"""What people read of a plan: the sentences, from facts made by hand."""

from __future__ import annotations

import re

import facts
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.levers import Varied
from autotune.plan import Alternative, CardProcess
from cli.progress import RunProgress
from cli.render.console import err, say, show_command
from cli.render.data import histogram_bars
from cli.render.notes import slower_precision
from cli.render.plan import others_line, print_plan
from cli.render.run import print_run
from cli.render.whatif import print_varied

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
    plan = facts.plan(workload=facts.workload(cpu_allocator="tight"), hardware=facts.hardware(others=others))
    print_plan(plan, facts.preprocessed(), None, ["chatlm", "train"])
    assert ("taken by others" in capsys.readouterr().out) is bool(others)


def test_a_plan_names_what_is_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    work = facts.workload(frozen=("embedding",), trainable_parameters=20_000_000)
    print_plan(facts.plan(workload=work), facts.preprocessed(), None, ["chatlm", "train"])
    assert "20.0 M of them trained (embedding frozen)" in " ".join(capsys.readouterr().out.split())


def test_a_command_is_printed_as_a_shell_takes_it_whatever_rich_makes_of_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["chatlm", ":fire:", "[bold]a[/]", "a\tb\r\x08\x0b\n", "it's\ta \\", "你好 世界", "\udcff"]
    quoted = r"""chatlm :fire: '[bold]a[/]' $'a\x09b\x0d\x08\x0b\x0a' $'it\x27s\x09a \x5c' '你好 世界' $'\xff'"""
    print_plan(facts.plan(), facts.preprocessed(), None, words)
    assert capsys.readouterr().out.endswith(f"\nTrain it:  {quoted}\n")
    show_command(err, "go on with:", words)
    assert capsys.readouterr().err == f"go on with:  {quoted}\n"


def test_a_folder_is_said_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    progress = RunProgress(facts.plan())
    progress.ended, progress.model = "finished", "[bold]:fire:/model"
    print_run(progress, facts.plan())
    assert "model: [bold]:fire:/model" in capsys.readouterr().out
    say("[bold]:fire:")
    assert capsys.readouterr().err == "[bold]:fire:\n"


def test_plans_side_by_side_fit_80_columns_and_name_the_fastest(capsys: pytest.CaptureFixture[str]) -> None:
    made = facts.plan()
    slow = made.forecast.model_copy(
        update={"seconds_per_epoch": 90_000.0, "total_seconds": 1_800_000.0, "total_steps": 46_875}
    )  # type: ignore[union-attr]
    rows = [
        Varied("as asked", made, ""),
        Varied("max-seq-len 1024", made.model_copy(update={"forecast": slow}), ""),
        Varied("batch-size-per-gpu 64", None, "64 rows of 512 tokens would take 30.00 GiB by the trace"),
    ]
    print_varied(rows, "Levers", recommend=True)
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if "x 6 x 2 = 240" in line or "does not fit" in line or "1024" in line]
    assert len(table) >= 3, lines
    assert all(len(line.rstrip()) <= 80 for line in table)
    assert any("64 rows of 512 tokens would take 30.00 GiB" in line for line in lines)
    assert any("as asked, 3000.0 times as fast as max-seq-len 1024" in line for line in lines)


def test_a_batch_of_rows_that_share_samples_is_no_product(capsys: pytest.CaptureFixture[str]) -> None:
    made = facts.plan()
    packed = made.model_copy(
        update={
            "workload": made.workload.model_copy(update={"layout": "packed"}),
            "batching": made.batching.model_copy(
                update={"micro_batch_size": 19, "expected_micro_batches_per_step": 1.62, "effective_batch_size": 32}
            ),
        }
    )
    print_varied([Varied("as asked", packed, "")], "Levers", recommend=False)
    out = capsys.readouterr().out
    assert "32 in 1.6 of <= 19 x 2" in out
    assert "=" not in out.replace("<=", "")


@pytest.mark.parametrize("kind", ["measured", "cached", "estimated"])
def test_a_plan_says_what_it_rests_on_and_marks_what_was_not_measured(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = facts.plan()
    other = Alternative(
        change="--gradient-checkpointing on", largest_micro_batch_size=64, gradient_accumulation_steps=2,
        peak_bytes=4 * GIB, seconds_per_step=None, measured=False,
    )  # fmt: skip
    evidence = made.evidence.model_copy(update={"kind": kind})
    print_plan(
        made.model_copy(update={"alternatives": (other,), "evidence": evidence}), facts.preprocessed(), None, ["train"]
    )
    out = capsys.readouterr().out
    assert "21.00 GiB ~" in out
    assert "5.00 GiB ~" not in out
    assert "24, the next that would save a micro-batch, would take" in re.sub(r"\s+", " ", out)
    assert " over" in out
    assert "64 rows" in out
    assert {"measured": "Measured on this machine.", "cached": "--no-cache", "estimated": "by the trace alone"}[
        kind
    ] in out
    assert "about 5,632 MiB of 20,480 MiB" in out, "half a gibibyte is others', 5 GiB will be ours"


@given(st.dictionaries(st.integers(1, 3000), st.integers(1, 10**6), min_size=1))
def test_the_bars_of_a_histogram_hold_each_sample_once(samples: dict[int, int]) -> None:
    bars = histogram_bars(sorted(samples.items()))
    assert len(bars) <= 10
    assert [low for low, _, _ in bars] == [1, *(high + 1 for _, high, _ in bars[:-1])]
    for low, high, inside in bars:
        assert inside == sum(count for length, count in samples.items() if low <= length <= high)
    assert bars[-1][0] <= max(samples) <= bars[-1][1]


@pytest.mark.parametrize(
    ("rates", "said"),
    [({"bf16": 4e11, "fp32": 2e11}, ""), ({"bf16": 1e11, "fp32": 2e11}, "--precision fp32"), ({}, "")],
)
def test_half_precision_that_is_slower_here_is_said(rates: dict[str, float], said: str) -> None:
    plan = facts.plan(speed=facts.speed(matrix_flops=rates))
    assert plan.workload.precision == "bf16"
    assert said in slower_precision(plan)
    assert bool(slower_precision(plan)) is bool(said)
