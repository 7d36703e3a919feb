"""Times as people write them."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.errors import ConfigurationError
from profiles import resolve
from profiles.values import parse_duration, parse_moment

NOW = datetime(2026, 11, 28, 21, 30)


@pytest.mark.parametrize(
    ("text", "seconds"), [("6h", 21_600), ("90m", 5400), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172_800), ("45 s", 45)]
)
def test_a_time_is_read_in_its_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "6", "h", "6 hours", "1h 30", "-2h", "0m", "nan", "6h!"])
def test_what_is_no_time_is_refused_with_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_duration(text)
    assert "write it like 6h, 90m or 1h30m" in refused.value.hint


@given(hour=st.integers(0, 23), minute=st.integers(0, 59), second=st.integers(0, 86_399))
def test_a_time_of_day_is_the_next_one_there_is(hour: int, minute: int, second: int) -> None:
    now = NOW.replace(hour=0, minute=0) + timedelta(seconds=second)
    found = parse_moment(f"{hour:02}:{minute:02}", now)
    assert timedelta() < found - now <= timedelta(days=1)
    assert (found.hour, found.minute, found.second) == (hour, minute, 0)


def test_a_day_may_be_named_and_a_zone() -> None:
    assert parse_moment("2026-11-29 08:00", NOW) == datetime(2026, 11, 29, 8)
    there = parse_moment("2026-11-29T08:00+08:00", NOW)
    assert there.timestamp() == datetime(2026, 11, 29, 0, tzinfo=UTC).timestamp()


def test_a_time_of_day_is_that_of_its_day_when_summer_time_ends_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        found = parse_moment("08:00", datetime(2026, 10, 24, 22, 0))
        assert found.timestamp() == datetime(2026, 10, 25, 7, 0, tzinfo=UTC).timestamp()
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("text", ["2026-11-28 08:00", "24:00", "8", "tomorrow", "08:60", ""])
def test_what_is_past_or_no_moment_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_moment(text, NOW)
    assert refused.value.hint == "write it like 08:00, or 2026-11-29 08:00"


def test_both_ways_to_say_when_to_end_come_to_a_moment_and_one_of_them_counts_what_was_before() -> None:
    assert resolve({}).limit is None
    limit = resolve({"max_time": "6h"}).limit
    assert limit is not None
    assert (limit.seconds, limit.of_run) == (21_600, True)
    limit = resolve({"finish_by": "2999-01-01 08:00"}).limit
    assert limit is not None
    assert (limit.ends_at, limit.of_run) == (datetime(2999, 1, 1, 8).timestamp(), False)
    with pytest.raises(ConfigurationError, match="both say when to end"):
        resolve({"max_time": "6h", "finish_by": "08:00"})


def test_what_is_typed_of_when_to_end_takes_the_place_of_what_a_file_says(tmp_path: Path) -> None:
    file = tmp_path / "night.toml"
    file.write_text('finish_by = "2999-01-01 08:00"', encoding="utf-8")
    resolved = resolve({"max_time": "2h"}, str(file))
    assert (resolved.settings.max_time, resolved.settings.finish_by) == ("2h", None)
    assert resolved.origins["finish_by"] == "default"
    assert resolve({}, str(file)).settings.finish_by is not None
