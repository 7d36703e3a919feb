"""From what was said to what is done: which batch is fixed, what a plan file allows, what a run writes down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import facts
import pytest

from autotune.errors import ConfigurationError
from autotune.plan import Request
from cli.wiring import (
    make_request,
    make_saving,
    settings_of_plan,
)
from profiles import resolve
from profiles.values import parse_every


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


@pytest.mark.parametrize(("text", "every"), [("500", (500, None)), ("10m", (None, 600)), ("1.5h", (None, 5400))])
def test_how_often_to_save_is_in_steps_or_in_time(text: str, every: tuple[int | None, float | None]) -> None:
    assert parse_every(text) == every
    saving = make_saving(resolve({"save_every": text}).settings)
    assert (saving.every_steps, saving.every_seconds, saving.each_epoch) == (*every, False)
    default = make_saving(resolve({}).settings)
    assert (default.every_steps, default.every_seconds, default.each_epoch, default.keep_last) == (None, 1800, True, 3)


@pytest.mark.parametrize("text", ["", "0", "ten", "1.5", "-3", "10 days", "0m"])
def test_what_is_neither_steps_nor_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="no number of steps, and no time"):
        parse_every(text)
