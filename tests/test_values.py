"""Times as people write them."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.errors import ConfigurationError
from cli.wiring import make_time_limit
from profiles import resolve
from profiles.values import parse_duration, parse_moment

CHINA = timezone(timedelta(hours=8))
NOW = datetime(2026, 11, 28, 21, 30, tzinfo=CHINA)


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


def test_a_day_may_be_named_in_the_zone_of_the_machine_or_another() -> None:
    assert parse_moment("2026-11-29 08:00", NOW) == datetime(2026, 11, 29, 8, tzinfo=CHINA)
    assert parse_moment("2026-11-29T08:00+00:00", NOW) == datetime(2026, 11, 29, 16, tzinfo=CHINA)


@pytest.mark.parametrize("text", ["2026-11-28 08:00", "24:00", "8", "tomorrow", "08:60", ""])
def test_what_is_past_or_no_moment_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_moment(text, NOW)
    assert refused.value.hint == "write it like 08:00, or 2026-11-29 08:00"


def test_both_ways_to_say_when_to_end_come_to_seconds_and_one_of_them_to_a_moment() -> None:
    assert make_time_limit(resolve({}).settings, NOW) is None
    limit = make_time_limit(resolve({"max_time": "6h"}).settings, NOW)
    assert limit is not None
    assert (limit.seconds, limit.of_run) == (21_600, True)
    limit = make_time_limit(resolve({"finish_by": "08:00"}).settings, NOW)
    assert limit is not None
    assert (limit.seconds, limit.of_run) == (10.5 * 3600, False)
    assert limit.ends_at == datetime(2026, 11, 29, 8, tzinfo=CHINA).timestamp()
    with pytest.raises(ConfigurationError, match="both say when to end"):
        resolve({"max_time": "6h", "finish_by": "08:00"})
