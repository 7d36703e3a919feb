"""From what was said to what is done: which batch is fixed, what a plan file allows, what a run writes down."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import facts
import pytest

from autotune.errands import DataSummary, Preprocessed
from autotune.errors import ConfigurationError, MachineError, RunExistsError
from autotune.plan import Request
from cli.wiring import (
    choose_layout,
    choose_loss_head,
    make_folder,
    make_request,
    run_folder,
    settings_of_plan,
    slower_precision,
    write_run,
)
from profiles import Settings, resolve


def request(typed: dict[str, Any], profile: str | None = None, world_size: int = 1, *, search: bool = False) -> Request:
    return make_request(resolve(typed, None, profile), world_size, search=search)


def asked(*values: Any) -> dict[str, Any]:
    names = ("batch_size_per_gpu", "gradient_accumulation_steps", "effective_batch_size")
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


@pytest.mark.parametrize(
    ("typed", "profile", "world_size", "search", "rows", "effective"),
    [
        (asked(None, None, None), None, 1, True, None, 32),
        (asked(7, None, 30), None, 1, True, 7, 30),  # typed rows win, a search too
        (asked(7, None, 30), None, 2, False, 7, 30),
        (asked(7, 3, None), None, 2, False, 7, 42),
        (asked(7, 3, 42), None, 2, False, 7, 42),
        (asked(64, None, None), None, 1, False, 64, 64),  # the default of 32 yields
        (asked(64, None, None), "small", 1, False, 64, 64),  # and a profile's 16
        (asked(None, 4, 30), None, 1, False, 8, 30),
        (asked(None, 4, 30), None, 2, True, 4, 30),
        (asked(None, None, None), "fast", 1, False, 16, 64),
        (asked(None, None, None), "fast", 1, True, None, 64),
        (asked(None, None, 8), "fast", 1, False, 8, 8),  # a profile's rows yield to a typed effective batch
        (asked(None, None, 8), "fast", 3, False, 3, 8),
        (asked(None, 2, None), "fast", 1, False, 32, 64),  # and to a typed accumulation
        (asked(4, None, None), "fast", 1, True, 4, 64),
    ],
)
def test_what_was_typed_wins_and_the_effective_batch_is_kept(
    typed: dict[str, Any], profile: str | None, world_size: int, search: bool, rows: int | None, effective: int
) -> None:
    made = request(typed, profile, world_size, search=search)
    assert (made.micro_batch_size, made.effective_batch_size) == (rows, effective)


@pytest.mark.parametrize(
    ("typed", "world_size", "words"),
    [
        (asked(7, 3, 20), 1, "7 rows x 3 accumulation x 1 ranks are 21 samples, not the effective batch of 20"),
        (asked(64, None, 32), 1, "64 rows x 1 accumulation x 1 ranks are 64 samples"),
        (
            asked(None, 4, 9),
            1,
            "9 samples over 1 ranks do not go into 4 equal micro-batches: 3 rows each reach them in 3",
        ),
        (asked(None, 40, 32), 1, "do not go into 40 equal micro-batches: 1 rows each reach them in 32"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_numbers(
    typed: dict[str, Any], world_size: int, words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        request(typed, None, world_size)


def test_a_profiles_rows_and_accumulation_are_its_effective_batch_where_it_names_none(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("batch_size_per_gpu = 8\ngradient_accumulation_steps = 4\n")
    (tmp_path / "count.toml").write_text("effective_batch_size = 64\ngradient_accumulation_steps = 4\n")
    own, count = (str(tmp_path / name) for name in ("own.toml", "count.toml"))
    for search, rows in ((False, 8), (True, None)):
        made = request({}, own, search=search)
        assert (made.micro_batch_size, made.effective_batch_size) == (rows, 32)
    for search, rows in ((False, 16), (True, None)):
        made = request({}, count, search=search)
        assert (made.micro_batch_size, made.effective_batch_size) == (rows, 64)


def test_limits_are_read_in_bytes_and_headroom_as_a_share_or_bytes() -> None:
    made = request({"memory_limit": "1.5GiB", "headroom": "10%"})
    assert (made.memory_limit_bytes, made.headroom) == (1536 * 2**20, 0.1)
    assert request({"headroom": "64M"}).headroom == 64 * 2**20
    assert (request({}).memory_limit_bytes, request({}).headroom) == (None, None)


def test_the_plan_is_in_force_and_what_was_typed_against_it_is_refused() -> None:
    plan = facts.plan()
    settings = settings_of_plan(plan, resolve({}, None, "fast"))
    assert (settings.model, settings.batch_size_per_gpu, settings.effective_batch_size) == ("small", 20, 240)
    assert settings_of_plan(plan, resolve({"effective_batch_size": 240, "precision": "auto"})).precision == "bf16"
    for typed in (
        {"effective_batch_size": 64},
        {"precision": "fp32"},
        {"model": "tiny"},
        {"dropout": 0.5},
        {"freeze": "encoder"},
    ):
        with pytest.raises(ConfigurationError, match="the plan has"):
            settings_of_plan(plan, resolve(typed))


def test_parts_to_freeze_are_given_with_commas_or_one_by_one_in_any_order() -> None:
    for typed in ("encoder,embedding", ["embedding", "encoder"], [" encoder, ", "embedding"]):
        assert resolve({"freeze": typed}).settings.freeze == ("embedding", "encoder")
    assert resolve({}).settings.freeze == ()
    for wrong in ([1], True, 3, {"encoder": False}):
        with pytest.raises(ConfigurationError, match="freeze"):
            resolve({"freeze": wrong})


def test_a_run_writes_every_value_in_force_and_where_it_came_from(tmp_path: Path) -> None:
    resolved = resolve({"epochs": 2.0}, None, "small")
    write_run(tmp_path, resolved, resolved.settings, facts.plan(), evidence=None)
    text = (tmp_path / "config.toml").read_text(encoding="utf-8")
    values = tomllib.loads(text)
    assert values["learning_rate"] == 1e-4
    assert values["precision"] == "bf16"
    assert not values.keys() & {"batch_size_per_gpu", "output_dir"}, "else it could not be given as --config"
    for line in ("epochs = 2.0  # command line", "seed = 42  # default", 'precision = "bf16"  # rule',
                 "learning_rate = 0.0001  # rule", "# batch_size_per_gpu = 20  # plan"):  # fmt: skip
        assert line in text.splitlines()
    assert not (tmp_path / "evidence.json").exists()


def test_a_folder_with_a_run_is_refused_and_one_that_cannot_be_made_too(tmp_path: Path) -> None:
    taken = resolve({"output_dir": str(tmp_path)}).settings
    (tmp_path / "metrics.jsonl").touch()
    assert run_folder(taken) == tmp_path, "an empty file is what a run that did not begin leaves"
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(RunExistsError) as error:
        run_folder(taken)
    assert error.value.exit_code == 5
    model = facts.preprocessed().model.model_copy(update={"parameters": 10**6})
    with pytest.raises(MachineError, match=r"Not a directory|File exists"):
        make_folder(tmp_path / "metrics.jsonl" / "run", model, facts.hardware())
    with pytest.raises(MachineError, match="has 5 MiB free, saving the model takes 24 MiB"):
        make_folder(tmp_path / "run", model, facts.hardware(disk_free_bytes=5 * 2**20))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("asked", "packs", "window", "layout"),
    [
        ("auto", True, None, "packed"),
        ("auto", True, 512, "packed"),
        ("auto", True, 511, "sorted"),
        ("auto", False, None, "sorted"),
        ("packed", True, 4096, "packed"),
        ("fixed", False, 128, "fixed"),
    ],
)
def test_samples_share_rows_where_the_model_lets_them(asked: Any, packs: bool, window: int | None, layout: str) -> None:
    assert choose_layout(Settings(layout=asked), known(packs, window), (512,)) == layout


def known(packs: bool, window: int | None, data: DataSummary | None = None) -> Preprocessed:
    model = facts.preprocessed().model.model_copy(update={"packs": packs, "window": window})
    return facts.preprocessed(model=model, data=data)


@pytest.mark.parametrize(("short", "layout"), [(0, "fixed"), (5, "fixed"), (50, "packed")])
def test_documents_that_fill_their_rows_are_not_packed(short: int, layout: str) -> None:
    data = DataSummary(
        files=("a.jsonl",), store="store", fingerprint="data", stage="pretrain", rows=100, samples=100,
        tokens=512 * (100 - short) + 64 * short, target_tokens=100, cuts={}, unknown_share=0.0,
        longest_row=(512, "data.jsonl: line 1"),
        lengths=(((64, short), (512, 100 - short))[not short:],),
    )  # fmt: skip
    assert choose_layout(Settings(), known(packs=True, window=None, data=data), (512,)) == layout


@pytest.mark.parametrize(("packs", "window", "why"), [(True, 128, "128 tokens of 512"), (False, None, "no mask")])
def test_packed_rows_that_a_model_cannot_keep_apart_are_refused(packs: bool, window: int | None, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        choose_layout(Settings(layout="packed"), known(packs, window), (512,))


@pytest.mark.parametrize(
    ("asked", "chunks", "limit", "loss_head"),
    [
        # 32 x 512 x 6400 logits of 8 bytes are 0.78 GiB.
        ("auto", True, "12GiB", "chunked"),
        ("auto", True, "13GiB", "full"),
        ("auto", False, "12GiB", "full"),
        ("chunked", False, "13GiB", "chunked"),
        ("full", True, "1GiB", "full"),
    ],
)
def test_logits_are_taken_in_chunks_where_they_are_much(asked: Any, chunks: bool, limit: str, loss_head: str) -> None:
    model = facts.preprocessed().model.model_copy(update={"chunks": chunks, "vocabulary_size": 6400})
    settings = Settings(loss_head=asked, memory_limit=limit)
    assert choose_loss_head(settings, facts.preprocessed(model=model), facts.hardware(world_size=1), 512) == loss_head


@pytest.mark.parametrize(
    ("rates", "said"),
    [({"bf16": 4e11, "fp32": 2e11}, ""), ({"bf16": 1e11, "fp32": 2e11}, "--precision fp32"), ({}, "")],
)
def test_half_precision_that_is_slower_here_is_said(rates: dict[str, float], said: str) -> None:
    plan = facts.plan(speed=facts.speed(matrix_flops=rates))
    assert plan.workload.precision == "bf16"
    assert said in slower_precision(plan)
    assert bool(slower_precision(plan)) is bool(said)
