"""Alternatives: what needs less memory, and what it would come to."""

from __future__ import annotations

import re
from typing import Any

import pytest
from facts import GIB, hardware, traced, workload
from hypothesis import given
from hypothesis import strategies as st

from autotune.alternatives import SHORTEST_SEQUENCE, advise, by_trace, milder
from autotune.errands import TraceReport
from profiles import FIELDS

# The changes that would need less memory.


def test_checkpointing_comes_first_then_half_the_length_and_half_of_that() -> None:
    changes = milder(workload(max_seq_len=512), hardware())
    assert [(w.gradient_checkpointing, w.max_seq_len) for _, w in changes] == [
        ("on", 512),
        ("on", 256),
        ("on", 128),
        ("on", SHORTEST_SEQUENCE),
        ("on", 512),
    ]
    assert [options for options, _ in changes] == [
        "--gradient-checkpointing on",
        "--gradient-checkpointing on --max-seq-len 256",
        "--gradient-checkpointing on --max-seq-len 128",
        "--gradient-checkpointing on --max-seq-len 64",
        "--gradient-checkpointing on --optimizer adafactor",
    ]


def test_what_is_on_already_is_not_advised_and_what_is_short_already_is_not_cut() -> None:
    step = {"gradient_checkpointing": "on", "optimizer": "adafactor"}
    assert [w.max_seq_len for _, w in milder(workload(**step, max_seq_len=256), hardware())] == [128, 64]
    assert milder(workload(**step, max_seq_len=2 * SHORTEST_SEQUENCE - 1), hardware()) == []


seq2seq = {"task": "seq2seq", "gradient_checkpointing": "on"}
kinds_of_work = [
    pytest.param(workload(), id="causal"),
    pytest.param(workload(gradient_checkpointing="on"), id="causal with checkpointing"),
    pytest.param(workload(**seq2seq, max_target_len=512), id="seq2seq"),
    pytest.param(
        workload(**seq2seq, max_target_len=128),
        id="seq2seq with a short target",
    ),
    pytest.param(
        workload(**seq2seq, max_seq_len=128, max_target_len=512),
        id="seq2seq with a short source",
    ),
]


@pytest.mark.parametrize("work", kinds_of_work)
def test_each_change_is_made_by_options_that_exist_and_that_make_the_workload_it_speaks_of(work: Any) -> None:
    for options, changed in milder(work, hardware()):
        typed = {name.replace("-", "_"): value for name, value in re.findall(r"--(\S+) (\S+)", options)}
        assert typed.keys() <= FIELDS.keys()
        values: dict[str, Any] = {n: int(value) if value.isdigit() else value for n, value in typed.items()}
        if "freeze" in values:
            values["frozen"] = tuple(values.pop("freeze").split(","))
        assert work.model_copy(update=values) == changed


@given(
    seq2seq=st.booleans(),
    checkpointing=st.sampled_from(["off", "on"]),
    source=st.integers(1, 4096),
    target=st.integers(1, 4096),
)
def test_each_change_is_harder_than_the_one_before_and_no_side_grows(
    seq2seq: bool, checkpointing: str, source: int, target: int
) -> None:
    work = workload(
        task="seq2seq" if seq2seq else "causal",
        gradient_checkpointing=checkpointing,
        max_seq_len=source,
        max_target_len=target if seq2seq else 0,
    )
    before = work
    *others, factored, frozen = milder(work, hardware()) if seq2seq else [*milder(work, hardware()), None]
    assert factored is not None
    assert factored[1] == work.model_copy(update={"gradient_checkpointing": "on", "optimizer": "adafactor"})
    if frozen is not None:
        _, changed = frozen
        assert changed == work.model_copy(update={"gradient_checkpointing": "on", "frozen": changed.frozen})
        assert changed.frozen
        assert milder(changed, hardware()) == [
            (options, w.model_copy(update={"frozen": changed.frozen}))
            for options, w in milder(work.model_copy(update={"gradient_checkpointing": "on"}), hardware())[:-1]
        ]
    for _, changed in others:
        assert changed != before
        assert changed.gradient_checkpointing == "on"
        assert changed.max_seq_len <= before.max_seq_len
        assert changed.max_target_len <= before.max_target_len
        longest_before, longest = (max(w.max_seq_len, w.max_target_len) for w in (work, changed))
        assert longest >= min(SHORTEST_SEQUENCE, longest_before)
        before = changed


def test_half_precision_is_advised_only_to_hardware_that_has_it() -> None:
    full = workload(precision="fp32", max_seq_len=64, optimizer="adafactor")
    options = [change for change, _ in milder(full, hardware())]
    assert options == ["--gradient-checkpointing on", "--gradient-checkpointing on --precision bf16"]
    assert len(milder(full, hardware(fast_bf16=False))) == 1


def test_what_a_change_comes_to_is_its_trace_the_context_what_two_ranks_need_and_what_the_allocator_keeps() -> None:
    report = TraceReport(process_bytes=0, traced=tuple(traced(r, {"forward_backward": r * GIB}) for r in (1, 8)))
    fits = by_trace("--this", report, hardware(), 5 * GIB, [1, 2, 4, 8])
    assert (fits.largest_micro_batch_size, fits.gradient_accumulation_steps, fits.measured) == (4, 2, False)
    assert fits.peak_bytes == round(1.05 * (4 * GIB + 756 * 2**20))
    nothing = by_trace("--that", report, hardware(), GIB, [1, 2, 4, 8])
    assert (nothing.largest_micro_batch_size, nothing.peak_bytes) == (0, round(1.05 * (GIB + 756 * 2**20)))
    assert advise([nothing, fits]) == "by the trace these would fit: --this: up to 4 rows, 4.98 GiB"
    assert "smaller model" in advise([nothing])
