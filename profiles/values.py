"""Sizes, shares and times as people write them. Pure."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from autotune.errors import ConfigurationError

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """Read a size such as 6GiB, 512M or 1073741824; K, M, G and T are powers of 1024."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigurationError(f"{text!r} is no size", "write it like 6GiB or 512MiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_headroom(text: str) -> float:
    """Read a share (`5%`, below 1) or a size (`512MiB`, in bytes)."""
    if text.strip().endswith("%"):
        try:
            share = float(text.strip()[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise ConfigurationError(f"{text!r} is no share", "write it like 5%")
        return share
    size = parse_bytes(text)
    return float(size) if size >= 1 else float(text)


def parse_every(text: str) -> tuple[int | None, float | None]:
    """Read how often to save: steps (`500`), or seconds (`90s`, `10m`, `2h`); the other one is None."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smhd]?)\s*", text)
    number = float(match[1]) if match else 0.0
    if match is None or not number or (not match[2] and number != int(number)):
        raise ConfigurationError(f"{text!r} is no number of steps, and no time", "write it like 500, or 10m")
    return (None, number * SECONDS[match[2]]) if match[2] else (int(number), None)


def parse_duration(text: str) -> float:
    """Read a time such as 6h, 90m, 1h30m or 2d, in seconds."""
    parts = re.findall(r"([0-9]*\.?[0-9]+)([smhd])", text.replace(" ", ""))
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise ConfigurationError(f"{text!r} is no time", "write it like 6h, 90m or 1h30m")
    seconds = sum(float(number) * SECONDS[unit] for number, unit in parts)
    if not seconds:
        raise ConfigurationError(f"{text!r} is no time to train in", "write it like 6h, 90m or 1h30m")
    return seconds


def parse_moment(text: str, now: datetime) -> datetime:
    """Read a time of day (`08:00`: the next one), or of a day (`2026-11-29 08:00`), local as `now` is.

    Local times are without a zone, so that 08:00 is that of its day, whatever becomes of summer time until then.
    """
    hint = "write it like 08:00, or 2026-11-29 08:00"
    try:
        if re.fullmatch(r"\d{1,2}:\d{2}", text.strip()):
            hour, minute = map(int, text.split(":"))
            moment = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
            return moment if moment > now else moment + timedelta(days=1)
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ConfigurationError(f"{text!r} is no time of day, and no date with one", hint) from None
    if moment.tzinfo is not None:
        moment = moment.astimezone().replace(tzinfo=None)
    if moment <= now:
        raise ConfigurationError(f"{text} is past: it is {now:%Y-%m-%d %H:%M} now", hint)
    return moment
