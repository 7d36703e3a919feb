"""What happened in a run, in words, with step and time. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from cli.history import History, Metrics
from cli.progress import EVENTS, validation_line, verified_line
from cli.render.units import count, duration, number, size
from cli.report.measures import as_number
from cli.report.page import Section, details, paragraph, table

ROUTINE = ("checkpoint", "validation", "sampled")
"""What comes again and again when all goes well."""
MOST = 300
"""Rows of a table; a run that leaps at each step has more."""


class Happened(NamedTuple):
    """Something that happened."""

    step: int
    seconds: float
    """Of the run's own time until then."""
    kind: str
    row: Metrics


class Course(NamedTuple):
    """A run in the order of time."""

    seconds: list[float]
    """The run's own, after each step of its columns."""
    happened: list[Happened]


def course(history: History) -> Course:
    """Put steps, evaluations and events in one order, and add up what they took."""
    others = sorted([*history.validations, *history.events], key=lambda row: row["step"])  # stable: evaluations first
    seconds, happened, total, at = [], [], 0.0, 0

    def take(until: float) -> None:
        nonlocal total, at
        while at < len(others) and others[at]["step"] < until:
            row = others[at]
            total += _seconds(row)
            happened.append(Happened(int(row["step"]), total, _kind(row), row))
            at += 1

    for step, taken in zip(history.columns["step"], history.columns["seconds"], strict=True):
        take(step)
        total += taken if taken >= 0 else 0.0  # nan is not
        seconds.append(total)
    take(float("inf"))
    return Course(seconds, happened)


def _kind(row: Metrics) -> str:
    kind = row.get("event", "validation")
    return kind if isinstance(kind, str) else "validation"


def _seconds(row: Metrics) -> float:
    taken = as_number(row.get("seconds"))
    return taken if taken >= 0 else 0.0  # nan is not


def told(row: Metrics) -> str:
    """Say in words what happened; by its name alone what does not tell all that it should."""
    kind = _kind(row)
    with suppress(LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        said = _told(kind, row)
        if said:
            return _without_step(said, row["step"])
    return kind.replace("_", " ")


def _told(kind: str, row: Metrics) -> str:
    if kind == "validation":
        return validation_line({"best": False, **row})
    if kind in ("verified", "unverified"):
        return verified_line(row)
    if kind in EVENTS:
        return "; ".join(EVENTS[kind](row))
    return SAID[kind](row) if kind in SAID else ""


SAID: dict[str, Callable[[Any], str]] = {
    "started": lambda row: f"started: {row['total_steps']:,} steps over {count(row['samples'], 'sample')}",
    "rescheduled": lambda row: f"now {row['total_steps']:,} steps in all",
    "checkpoint": lambda row: f"checkpoint saved, {size(row['bytes'])}",
    "skipped_step": lambda row: (
        f"a gradient that is not finite: {count(len(row['samples']), 'sample')} changed no weight"
    ),
    "sampled": lambda _: "fixed prompts answered",
    "data_changed": lambda row: f"{row['file']} had changed since it was tokenized: trained on what it was",
    "early_stopping": lambda row: f"early stopping: the last {row['evaluations']} evaluations were no better",
    "plan_against_real": lambda row: (
        f"the plan held against what became of it: {row['real_tokens_per_second']:,.0f} tokens/s"
    ),
    "finished": lambda row: "finished" + _best(row),
    "stopped": lambda row: "stopped, and saved to go on" + _best(row),
}


def _best(row: Metrics) -> str:
    return f"; best at step {row['best_step']}, loss {number(row['best_loss'], '.4f')}" if "best_step" in row else ""


def _without_step(said: str, step: Any) -> str:
    said = said.removeprefix(f"step {step}: ")
    return said[:1].upper() + said[1:]


def events_section(happened: Sequence[Happened]) -> Section:
    """Return what a page says of events: what is out of the common first, the routine where it is asked for."""
    rare = [one for one in happened if one.kind not in ROUTINE]
    routine = [one for one in happened if one.kind in ROUTINE]
    body = _table(rare) if rare else paragraph("Nothing but checkpoints and evaluations.")
    if routine:
        saved = sum(one.kind == "checkpoint" for one in routine)
        evaluated = sum(one.kind == "validation" for one in routine)
        body += details(f"{count(saved, 'checkpoint')}, {count(evaluated, 'evaluation')}", _table(routine))
    return Section("Events", body if happened else "")


def _table(happened: Sequence[Happened]) -> str:
    shown = happened if len(happened) <= MOST else [*happened[: MOST // 2], *happened[-MOST // 2 :]]
    left = len(happened) - len(shown)
    said = paragraph(f"The first and the last {MOST // 2} of {len(happened):,}.") if left else ""
    return said + table(("step", "time", "what"), map(_row, shown), "events")


def _row(one: Happened) -> Sequence[str]:
    return (f"{one.step:,}", duration(one.seconds), told(one.row))
