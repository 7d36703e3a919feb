"""What is seen of machine and runs as lines of words, numbers and bars: the same for the screen and for one picture."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size

from cli.monitor.curves import Point
from cli.monitor.facts import CardFacts, Glance, MachineFacts, MemoryFacts, RunFacts
from cli.render.units import GIB, duration, fine_duration, gib, size

LABEL = 9
"""Columns of the words at the left."""
NUMBER = 10
"""Columns of a number of the table of memory, with a blank before it."""
LEAST_WIDTH = 40
LEAST_BAR = 8
SIZES = ("runs", "others", "free", "total")
LESS_NEEDED = ("others", "total")
"""Which of them go first where there is no room for all."""
MOST_GIB = 10_000
FAR_SECONDS = 300 * 86_400
"""From now, from which on a day needs its year."""
NUMBER_AT_END = re.compile(r"\(?[\d.,:]+ ?[A-Za-z/%]{0,4}$")
"""With its unit, or a part of it."""
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)")
PICTURE_CURVE, PICTURE_LOG = 4, 3
"""Lines of a picture that may be as high as it needs."""
MOST_CURVE, MOST_LOG = 12, 10
STATES = {"running": "good", "finished": "good", "stopped": "warn", "died": "bad", "removed": "bad"}

Span = tuple[str, str]
"""Text and its role: plain, title, dim, good, warn, bad, ours, others, mark. Words say all that a colour does."""
Line = list[Span]


class Glyphs(NamedTuple):
    """What bars and curves are drawn with."""

    ours: str
    others: str
    free: str
    mark: str
    rule: str
    levels: str
    """Of a column of a curve, from a little to the whole of a cell."""


class Columns(NamedTuple):
    """Of the table of memory: how wide its bars are, and which sizes it has."""

    bar: int
    sizes: tuple[str, ...]


BLOCKS = Glyphs("█", "▒", "░", "┃", "─", "▁▂▃▄▅▆▇█")
ASCII = Glyphs("#", "+", ".", "|", "-", ".:")


def glyphs_for(encoding: str) -> Glyphs:
    """Return block characters where the console has Unicode; elsewhere they are missing, or twice as wide."""
    return BLOCKS if encoding.lower().replace("-", "").startswith("utf") else ASCII


def plain(lines: list[Line]) -> str:
    """Return lines without their roles."""
    return "\n".join("".join(words for words, _ in line).rstrip() for line in lines)


def draw(glance: Glance, width: int, height: int | None, encoding: str, hint: str = "") -> list[Line]:
    """Draw all that is seen, so many columns wide; what height is left over goes to curves and logs.

    Without a height it is a picture that takes what it needs. All of it can be printed in that encoding. It is never
    narrower than 40 columns.
    """
    width = max(LEAST_WIDTH, width)
    glyphs = glyphs_for(encoding)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(glance.at_seconds))
    gap = max(1, width - len("chatlm monitor   ") - len(when) - len(hint))
    lines = [[("chatlm monitor", "title"), ("   " + when + " " * gap, "plain"), (hint, "dim")]]
    lines += _machine(glance.machine, width, glyphs)
    blocks = [_run(run, glance.at_seconds, width, glyphs) for run in glance.runs]
    spare = None if height is None else height - len(lines) - sum(map(len, blocks))
    airy: list[Line] = [[]] if spare is None or spare >= 8 * len(blocks) else []
    spare = None if spare is None else spare - len(airy) * len(blocks)
    for run, block in zip(glance.runs, blocks, strict=True):
        lines += airy
        curve, log = _heights(run, spare, len(blocks))
        lines += block + _curves(run, width, curve, glyphs) + _log(run, log)
    if not glance.runs:
        lines.append([("no runs", "title"), (" under runs/ here; name the folder of one to see it", "plain")])
    return [_cropped(line, width, encoding) for line in lines]


def _heights(run: RunFacts, spare: int | None, runs: int) -> tuple[int, int]:
    """Return the lines of a run's curves, their heading aside, and of its log."""
    if spare is None:
        return PICTURE_CURVE, min(PICTURE_LOG, len(run.log))
    each = max(0, spare // runs)
    log = min(len(run.log), MOST_LOG, max(1, each // 4)) if each else 0
    curve = min(MOST_CURVE, each - log - 1)
    return (curve, log) if curve >= 2 else (0, min(len(run.log), each))


def _cropped(line: Line, width: int, encoding: str) -> Line:
    """Cut a line to a width in cells, of which a Chinese character takes two; what cannot be printed is a `?`."""
    kept: Line = []
    for words, role in line:
        printed = words if words.isascii() else words.encode(encoding, "replace").decode(encoding)
        cells = cell_len(printed)
        kept.append((printed if cells <= width else _cut(printed, width), role))
        width = max(0, width - cells)
    return kept


def _cut(words: str, width: int) -> str:
    """Cut to a width; of a number that would be cut, nothing stays."""
    kept = set_cell_size(words, width)
    inside = words.startswith(kept) and not words[len(kept) : len(kept) + 1].isspace()
    return NUMBER_AT_END.sub("", kept) if inside else kept


def _clean(text: str) -> str:
    """Return text that moves no cursor and rings no bell."""
    return "".join(c if c.isprintable() else " " for c in ESCAPES.sub("", text))


def _heading(spans: Line, width: int, glyphs: Glyphs, right: Line | None = None) -> Line:
    right = right or []
    used = sum(cell_len(text) for text, _ in (*spans, *right))
    if right and used + 2 > width:
        return _heading(spans, width, glyphs)
    rule = glyphs.rule * max(0, width - used - 1 - bool(right))
    return [*spans, (f" {rule}" + " " * bool(right), "dim"), *right]


def _label(word: str) -> Span:
    return (f"{word:<{LABEL}}", "dim")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}".replace("%", " %")


def _machine(machine: MachineFacts, width: int, glyphs: Glyphs) -> list[Line]:
    cores = f"{machine.cores} core" + "s" * (machine.cores != 1)
    busy = "" if machine.processor_utilization is None else f" {_percent(machine.processor_utilization)} busy"
    title: Line = [(f"machine {_clean(machine.name)}", "title"), (f"  {cores}{busy}", "plain")]
    legend: Line = [
        (glyphs.ours, "ours"), (" runs  ", "dim"), (glyphs.others, "others"), (" others  ", "dim"),
        (glyphs.mark, "mark"), (" budget", "dim"),
    ]  # fmt: skip
    columns = _layout(width)
    heads = "".join(f"{name:>{NUMBER}}" for name in columns.sizes)
    lines = [_heading(title, width, glyphs, legend), [(f"{'GiB':<{LABEL + columns.bar + 2}}{heads}", "dim")]]
    if not machine.gpus:
        note = f"none can be asked ({_clean(machine.gpu_note)})" if machine.gpu_note else "none found"
        lines.append([_label("GPU"), (note, "plain")])
    for index, card in enumerate(machine.gpus):
        lines += _card(index, card, columns, glyphs)
    lines.append(_host("RAM", machine.memory, columns, glyphs))
    lines += [_host("cgroup", group.memory, columns, glyphs) for group in machine.groups]
    swap = machine.swap
    if swap.total_bytes:
        free = swap.total_bytes - swap.used_bytes
        lines.append(_table("swap", (None, swap.used_bytes, free, swap.total_bytes), None, columns, glyphs))
    else:
        lines.append([_label("swap"), ("none", "plain")])
    for disk in machine.disks:
        used = disk.total_bytes - disk.free_bytes
        lines.append(_table("disk", (None, used, disk.free_bytes, disk.total_bytes), None, columns, glyphs))
    return lines


def _layout(width: int) -> Columns:
    """Return what has room: each number whole, and a bar."""
    room = (width - LABEL - LEAST_BAR - 2) // NUMBER
    left_out = LESS_NEEDED[: max(0, len(SIZES) - room)]
    sizes = tuple(name for name in SIZES if name not in left_out)
    return Columns(width - LABEL - 2 - len(sizes) * NUMBER, sizes)


def _host(label: str, memory: MemoryFacts, columns: Columns, glyphs: Glyphs) -> Line:
    ours = memory.of_runs_bytes
    others = max(0, memory.total_bytes - memory.available_bytes - (ours or 0))
    return _table(
        label, (ours, others, memory.available_bytes, memory.total_bytes), memory.budget_bytes, columns, glyphs
    )


def _card(index: int, card: CardFacts, columns: Columns, glyphs: Glyphs) -> list[Line]:
    """Draw a card: its memory as a row of the table, then how it does."""
    label, total, used = f"GPU {index}", card.memory_total_bytes, card.memory_used_bytes
    if total is None or used is None:
        why = "shares the host's memory" if card.shares_host_memory else "does not tell of its memory"
        first: Line = [_label(label), (why, "plain")]
    else:
        ours, others = card.memory_of_runs_bytes, card.memory_of_others_bytes
        told = (ours, others, total - used, total)
        first = _table(label, told, card.memory_budget_bytes, columns, glyphs, unknown=used if ours is None else 0)
    second: Line = [_label(""), ("   ".join(_readings(card)) or "tells nothing of load, heat and power", "plain")]
    if card.slowed_by:
        second.append((f"   slowed: {', '.join(card.slowed_by)}", "warn"))
    if total is not None and card.memory_of_runs_bytes is None:
        second.append((f"   whose {gib(used)} are is not told", "dim"))
    elif card.memory_budget_bytes is not None:
        second.append((f"   budget {gib(card.memory_budget_bytes)}", "plain"))
    second.append((f"   {_clean(card.name)}", "dim"))
    return [first, second]


def _readings(card: CardFacts) -> list[str]:
    limit = "" if card.power_limit_watts is None else f" of {card.power_limit_watts:.0f}"
    told = (
        (card.utilization, f"{_percent(card.utilization)} busy"),
        (card.temperature_celsius, f"{card.temperature_celsius} C"),
        (card.power_watts, f"{_written(card.power_watts, '.0f')}{limit} W"),
    )
    return [words for value, words in told if value is not None]


def _table(
    label: str,
    told: tuple[int | None, int | None, int | None, int],
    budget: int | None,
    columns: Columns,
    glyphs: Glyphs,
    unknown: int = 0,
) -> Line:
    """Draw a row of memory: a bar of what runs and others hold, with a mark at the budget, then the numbers."""
    ours, others, _, total = told
    shown = (value for name, value in zip(SIZES, told, strict=True) if name in columns.sizes)
    numbers = "".join(f" {_amount(value):>{NUMBER - 1}}" for value in shown)
    drawn = _bar(ours or 0, (others or 0) + unknown, total, budget, columns.bar, glyphs)
    return [_label(label), *drawn, (f"  {numbers}", "plain")]


def _bar(ours: int, others: int, total: int, budget: int | None, width: int, glyphs: Glyphs) -> Line:
    """Draw shares of a whole; what is there at all has a cell."""
    cells = [(glyphs.free, "dim")] * width

    def until(held: float) -> int:
        return min(width, -(-int(held) * width // total)) if total else 0

    for i in range(until(ours + others)):
        cells[i] = (glyphs.others, "others")
    for i in range(until(ours)):
        cells[i] = (glyphs.ours, "ours")
    if budget is not None and 0 < budget <= total:
        cells[min(width, until(budget)) - 1] = (glyphs.mark, "mark")
    return _joined(cells)


def _joined(cells: Sequence[Span]) -> Line:
    """Put neighbours of one role together."""
    line: Line = []
    for text, role in cells:
        if line and line[-1][1] == role:
            line[-1] = (line[-1][0] + text, role)
        else:
            line.append((text, role))
    return line


def _run(run: RunFacts, now: float, width: int, glyphs: Glyphs) -> list[Line]:
    """Draw all of a run but its curves and its log."""
    lines = [_heading(_state(run), width, glyphs), _steps(run, width, glyphs)]
    if run.left:
        lines.append(_left(run, now))
    lines += [_losses(run), _speed(run), _peak(run, width, glyphs), _saved(run, width)]
    if run.notice:
        notice = run.notice
        what = f"{notice.event.replace('_', ' ')} at step {notice.step:,}"
        what += f", {notice.count} such in all" * (notice.count > 1) + f": {notice.message}" * bool(notice.message)
        lines.append([_label("notice"), (_clean(what), "warn")])
    return lines


def _state(run: RunFacts) -> Line:
    silent = [] if run.silent_seconds is None else [f"wrote last {fine_duration(run.silent_seconds)} ago"]
    said = {
        "running": ["running", *silent] if run.step else ["starting", "no step yet", *silent],
        "finished": ["finished", *silent],
        "stopped": ["stopped", *silent, "goes on with --resume"],
        "died": ["DIED", *silent, "no process holds it and no end was written"],
        "removed": ["REMOVED", "its folder is gone"],
    }[run.state]
    model = f"  model {_clean(run.model)}" if run.model else ""
    where = f" on {run.device}" if run.device and model else ""
    return [
        (f"run {_clean(run.name)}", "title"), ("  ", "plain"), (", ".join(said), STATES[run.state]),
        (model + where, "dim"),
    ]  # fmt: skip


def _steps(run: RunFacts, width: int, glyphs: Glyphs) -> Line:
    total = run.total_steps
    words = f"{run.step:,}" + (f" of {total:,}" if total else "")
    epoch = "" if run.epoch is None else f"epoch {run.epoch:g}" + (f" of {run.epochs:g}" if run.epochs else "")
    if not total:
        return [_label("step"), (f"{words}   {epoch}", "plain")]
    share = f"{run.step / total:4.0%}".replace("%", " %")
    bar = _bar(run.step, 0, max(total, run.step), None, _run_bar(width), glyphs)
    return _beside("step", bar, (f"{share}  {words}  {epoch}", "plain"), width)


def _run_bar(width: int) -> int:
    return max(LEAST_BAR, width // 2 - LABEL)


def _beside(label: str, bar: Line, said: Span, width: int) -> Line:
    """Return words beside a bar, where there is room for both."""
    if LABEL + sum(len(text) for text, _ in bar) + 2 + len(said[0].rstrip()) > width:
        return [_label(label), (said[0].lstrip(), said[1])]
    return [_label(label), *bar, ("  ", "plain"), said]


def _left(run: RunFacts, now: float) -> Line:
    assert run.left is not None
    left = run.left
    said = f"{fine_duration(left.seconds)}  ({fine_duration(left.low_seconds)} to {fine_duration(left.high_seconds)})"
    clock = _clock(now, left.seconds)
    return [_label("ETA"), (said + f", done at about {clock}" * bool(clock), "plain")]


def _clock(now: float, seconds: float) -> str:
    """Return when so many seconds are over; empty where no calendar goes so far."""
    how = "%H:%M" if seconds < 43_200 else "%d %b %H:%M" if seconds < FAR_SECONDS else "%d %b %Y"
    try:
        return time.strftime(how, time.localtime(now + seconds))
    except (OverflowError, OSError, ValueError):
        return ""


def _losses(run: RunFacts) -> Line:
    loss = "not finite" if run.loss is None and run.step else _written(run.loss, ".4f")
    line = [_label("loss"), (loss, "bad" if loss == "not finite" else "plain")]
    if run.validation_step is not None:
        said = "not finite" if run.validation_loss is None else f"{run.validation_loss:.4f}"
        line.append((f"   validation {said} at step {run.validation_step:,}", "plain"))
        if run.best_validation_loss is not None:
            line.append((f" (best {run.best_validation_loss:.4f})", "plain"))
    return line


def _speed(run: RunFacts) -> Line:
    words = f"{_written(run.tokens_per_second, ',.0f')} tokens/s"
    if run.model_flops_utilization is not None:
        words += f"   MFU {run.model_flops_utilization:.1%}".replace("%", " %")
    words += f"   learning rate {_written(run.learning_rate, '.3g')}"
    return [_label("speed"), (words, "plain")]


def _written(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def _peak(run: RunFacts, width: int, glyphs: Glyphs) -> Line:
    peak, budget, planned = run.peak_memory_bytes, run.memory_budget_bytes, run.planned_peak_memory_bytes
    if budget is None:
        return [_label("peak"), (f"{gib(peak)}; no plan of it can be read", "plain")]
    bar = _bar(peak or 0, 0, max(budget, peak or 0), budget, _run_bar(width), glyphs)
    over = peak is not None and peak > budget
    words = f"{_gib(peak)} GiB {'OVER' if over else 'of'} budget {_gib(budget)}, planned {_gib(planned)}"
    return _beside("peak", bar, (words, "bad" if over else "plain"), width)


def _gib(held: int | None) -> str:
    return "-" if held is None else f"{held / GIB:.2f}"


def _amount(held: int | None) -> str:
    """Render bytes for the table, as GiB; what has no room so as TiB."""
    if held is None or held < MOST_GIB * GIB:
        return _gib(held)
    tib = held / (1024 * GIB)
    return f"{tib:.{2 if tib < 100 else 1 if tib < 1000 else 0}f} TiB"


def _saved(run: RunFacts, width: int) -> Line:
    """Say which checkpoints there are, as many as have room; the newest first."""
    if not run.checkpoints:
        return [_label("saved"), ("no checkpoint" + " yet" * (run.state == "running"), "plain")]
    words = ""
    for found in run.checkpoints:
        said = f"step {found.step:,} {size(found.held_bytes)} {duration(found.age_seconds)} ago"
        if words and LABEL + len(words) + 3 + len(said) > width:
            break
        words += f"{'   ' * bool(words)}{said}"
    return [_label("saved"), (words, "plain")]


def _log(run: RunFacts, most: int) -> list[Line]:
    lines = run.log[-most:] if most > 0 else ()
    return [[_label("log" if i == 0 else ""), (_clean(line), "dim")] for i, line in enumerate(lines)]


def _curves(run: RunFacts, width: int, height: int, glyphs: Glyphs) -> list[Line]:
    """Draw loss and speed side by side."""
    losses, speeds = run.loss_curve, run.tokens_per_second_curve
    if height < 1 or min(len(losses), len(speeds)) < 2:
        return []
    each = (width - 2) // 2
    left = _curve("loss", losses, min(point.value for point in losses), ".4g", each, height, glyphs)
    right = _curve("tokens/s", speeds, 0.0, ",.0f", each, height, glyphs)
    return [[*first, ("  ", "plain"), *second] for first, second in zip(left, right, strict=True)]


def _curve(
    name: str, points: Sequence[Point], low: float, how: str, width: int, height: int, glyphs: Glyphs
) -> list[Line]:
    """Draw a curve as columns, its greatest and what it begins at on the left: a heading and so many lines."""
    values = _columns([point.value for point in points], width - LABEL)
    high, steps = max(values), len(glyphs.levels)
    span = (high - low) or 1.0
    tall = [1 + round((value - low) / span * (height * steps - 1)) for value in values]
    # Of what a column has above the foot of a line: nothing is blank, more than a line is a whole cell.
    empty = height * steps
    shades = " " * (empty + 1) + glyphs.levels + glyphs.levels[-1] * empty
    heading = f"{name}, to step {points[-1].step:,}"
    heading = heading if len(heading) <= width - LABEL else name
    lines: list[Line] = [[(f"{'':<{LABEL}}{heading:<{width - LABEL}}", "dim")]]
    for row in range(height):
        base = (height - 1 - row) * steps - empty
        cells = "".join([shades[level - base] for level in tall])
        mark = _mark(high, how) if row == 0 else _mark(low, how) if row == height - 1 else ""
        lines.append([(f"{mark:>{LABEL - 1}} ", "dim"), (cells, "ours")])
    return lines


def _mark(value: float, how: str) -> str:
    """Render a number so that it has room on the left of a curve."""
    said = format(value, how)
    return said if len(said) < LABEL else f"{value:.2g}"


def _columns(values: list[float], width: int) -> list[float]:
    """Return so many values: means of neighbours, or each one several times."""
    edges = [i * len(values) // width for i in range(width + 1)]
    parts = [values[low : max(high, low + 1)] for low, high in pairwise(edges)]
    return [sum(part) / len(part) for part in parts]
