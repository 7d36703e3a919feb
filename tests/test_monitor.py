"""What is seen of a machine and its runs: the same on the screen, in a picture and as JSON, and nothing is written."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import facts
import psutil
import pytest
from conftest import CommandRunner, chatlm_path
from fake_nvml import GIB, SLICED, FakeCard, FakeNvml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from autotune.process import held_bytes
from cli.history import History
from cli.lock import hold
from cli.monitor.curves import Curve, Point
from cli.monitor.facts import DiskFacts, Glance, GroupFacts, LeftFacts, MemoryFacts, SwapFacts
from cli.monitor.watch import Watch
from cli.render.monitor import draw, plain
from cli.render.screen import LiveScreen
from cli.render.units import duration
from cli.report.events import course

ENCODINGS = ("ascii", "gbk", "cp1252", "utf-8")
NO_CARDS = FakeNvml([])
HELD_BY_US = FakeCard(
    "NVIDIA GeForce RTX 3080", "GPU-1", 20 * GIB, 4 * GIB, computing={os.getpid(): 12 * GIB, 1: 3 * GIB},
    busy_percent=97, celsius=72, milliwatts=312_000, limit_milliwatts=320_000, reasons=0x24,
)  # fmt: skip
IDLE = FakeCard("NVIDIA T4", "GPU-2", 15 * GIB, 14 * GIB)
HOSTILE = "\x1b[2J\x1b]0;title\x07\ttick ✔ \U0001f525 你好世界 \x07\x9b" * 5


def step(number: int, **more: Any) -> dict[str, Any]:
    row = {
        "kind": "train", "step": number, "epoch": 1, "loss": 8 / number, "learning_rate": 1e-4, "tokens": 4000,
        "seconds": 0.5, "tokens_per_second": 8000.0, "peak_memory_bytes": 6 * GIB, "model_flops_utilization": 0.295,
    }  # fmt: skip
    return row | more


def drawn(glance: Glance, label: str, width: int = 80) -> list[str]:
    """The words of each line with that label."""
    return [line for line in picture(glance, width, "utf-8").splitlines() if line.startswith(label)]


def event(name: str, number: int = 0, **more: Any) -> dict[str, Any]:
    return {"kind": "event", "event": name, "step": number} | more


def append(folder: Path, *rows: dict[str, Any], torn: str = "") -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + torn)


def make_run(folder: Path, steps: int = 12, log: str = "loading\nfirst words\n") -> Path:
    """A run of 200 steps that was validated once and has two checkpoints."""
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(facts.plan().to_json(), encoding="utf-8")
    (folder / "log.txt").write_text(log, encoding="utf-8")
    append(folder, event("started", total_steps=200), *(step(number) for number in range(1, steps + 1)))
    append(folder, {"kind": "validation", "step": steps, "loss": 2.5, "seconds": 1.0})
    for number in (5, 10):
        saved = folder / "checkpoints" / f"step-{number:08}"
        saved.mkdir(parents=True)
        (saved / "manifest.json").write_bytes(b"x" * 2**20)
    return folder


@contextmanager
def watching(*folders: Path, nvml: FakeNvml = NO_CARDS, **how: Any) -> Iterator[Watch]:
    watch = Watch([str(folder) for folder in folders], nvml, **how)
    yield watch
    watch.close()


def picture(glance: Glance, width: int = 80, encoding: str = "ascii") -> str:
    return plain(draw(glance, width, None, encoding))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """One that this process holds, so that it is running."""
    folder = make_run(tmp_path / "runs" / "live")
    with hold(folder):
        yield folder


def test_memory_of_a_run_is_that_of_its_process_and_all_below_it_and_the_rest_is_others(run: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    card = replace(HELD_BY_US, computing={**HELD_BY_US.computing, child.pid: GIB})
    with watching(run, nvml=FakeNvml([card, IDLE])) as watch:
        first, second = watch.look().machine.gpus
    child.communicate(b"\n")
    assert (first.memory_of_runs_bytes, first.memory_of_others_bytes) == (13 * GIB, 3 * GIB)
    assert first.memory_budget_bytes == facts.plan().memory.budget_bytes
    assert (second.memory_of_runs_bytes, second.memory_of_others_bytes) == (0, GIB)
    assert second.memory_budget_bytes is None, "no run is on it"


def test_the_picture_and_the_json_say_the_same(run: Path) -> None:
    append(run, event("spike", 12), event("save_failed", 12, message="no room"))
    with watching(run, nvml=FakeNvml([HELD_BY_US, SLICED])) as watch:
        glance = watch.look()
    told, words = json.loads(glance.to_json()), picture(glance, 160)
    machine, (live,) = told["machine"], told["runs"]
    assert told["schema"] == "chatlm.monitor/1"
    said = [
        f"run {live['name']}  {live['state']}", f"{live['step']} of {live['total_steps']}",
        f"loss     {live['loss']:.4f}",
        f"validation {live['validation_loss']:.4f} at step {live['validation_step']}",
        f"{live['tokens_per_second']:,.0f} tokens/s", f"MFU {100 * live['model_flops_utilization']:.1f} %",
        f"learning rate {live['learning_rate']:g}",
        f"{live['peak_memory_bytes'] / GIB:.2f} GiB of budget {live['memory_budget_bytes'] / GIB:.2f}",
        f"planned {live['planned_peak_memory_bytes'] / GIB:.2f}", f"ETA      {live['left']['seconds'] // 60:.0f} min",
        "save failed at step 12, 2 such in all: no room", *live["log"],
    ]  # fmt: skip
    said += [f"step {saved['step']} {saved['held_bytes'] / 2**20:.1f} MiB" for saved in live["checkpoints"]]
    for card in machine["gpus"]:
        sizes = (card["memory_of_runs_bytes"], card["memory_of_others_bytes"], card["memory_total_bytes"])
        said += [card["name"], *(f"{size / GIB:.2f}" for size in sizes if size is not None)]
        said += [f"slowed: {', '.join(card['slowed_by'])}"] if card["slowed_by"] else []
    said += ["97 % busy   72 C   312 of 320 W   slowed: power limit, heat"]
    said += [f"{machine['memory'][name] / GIB:.2f}" for name in ("total_bytes", "available_bytes", "of_runs_bytes")]
    said += [f"{disk['free_bytes'] / GIB:.2f}" for disk in machine["disks"]]
    assert [sentence for sentence in said if sentence not in words] == []


def test_units_stand_in_the_names_of_what_is_measured(run: Path) -> None:
    with watching(run, nvml=FakeNvml([HELD_BY_US])) as watch:
        told = json.loads(watch.look().to_json())
    assert {"temperature_celsius", "power_watts", "memory_used_bytes"} <= told["machine"]["gpus"][0].keys()
    assert {"silent_seconds", "peak_memory_bytes"} <= told["runs"][0].keys()
    assert told["runs"][0]["left"].keys() == {"seconds", "low_seconds", "high_seconds"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_picture_fits_80_columns_of_any_console_whatever_a_log_says(tmp_path: Path, encoding: str) -> None:
    folder = make_run(tmp_path / "你好\U0001f525", log="".join(f"{number} {HOSTILE}\n" for number in range(9)))
    with hold(folder), watching(folder, nvml=FakeNvml([HELD_BY_US, SLICED, FakeCard(HOSTILE, "GPU-9", 0, 0)])) as watch:
        words = picture(watch.look(), 80, encoding)
    assert words.encode(encoding).decode(encoding) == words
    assert max(map(cell_len, words.splitlines())) <= 80
    assert all(character.isprintable() for line in words.splitlines() for character in line)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (40, 5), (200, 60)])
@pytest.mark.parametrize("runs", [0, 1, 2])
def test_what_is_drawn_fills_the_screen_and_is_higher_only_where_facts_need_it(
    tmp_path: Path, runs: int, width: int, height: int
) -> None:
    folders = [make_run(tmp_path / f"run-{number}", log="word\n" * 50) for number in range(runs)]
    with ExitStack() as stack:
        if not folders:
            stack.enter_context(_inside(tmp_path))
        glance = stack.enter_context(watching(*folders, nvml=FakeNvml([IDLE]))).look()
    lines = draw(glance, width, height, "utf-8")
    least = len(draw(glance, width, 0, "utf-8"))
    assert least <= len(lines) <= max(least, height)
    assert all(cell_len("".join(words for words, _ in line)) <= width for line in lines)
    if runs and height - least > 10:
        assert "tokens/s, to step 12" in plain(lines)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def test_a_run_that_cut_its_rows_and_went_on_is_shown_without_the_stale_ones(run: Path) -> None:
    with watching(run) as watch:
        append(run, *(step(number, loss=99.0) for number in range(13, 40)), event("spike", 39))
        before = watch.look().runs[0]
        assert (before.step, before.loss) == (39, 99.0)
        (run / "metrics.jsonl").unlink()
        append(run, event("started", total_steps=200), *map(step, range(1, 11)))
        append(run, event("resumed", 10), event("started", 10, total_steps=300), step(11))
        after = watch.look().runs[0]
    assert (after.step, after.total_steps, after.notice) == (11, 300, None)
    assert max(point.value for point in after.loss_curve) <= 8
    assert after.loss_curve[-1].step == 11


def test_a_line_that_is_half_written_is_neither_lost_nor_doubled(run: Path) -> None:
    words = json.dumps(step(13)) + "\n"
    with watching(run) as watch:
        append(run, torn=words[:40])
        assert watch.look().runs[0].step == 12
        append(run, torn=words[40:])
        for _ in range(2):
            live = watch.look().runs[0]
    assert [point.step for point in live.loss_curve] == list(range(1, 14))


def test_a_loss_that_is_not_finite_is_said_and_is_no_number_in_json(run: Path) -> None:
    append(run, step(13, loss=None))
    with watching(run) as watch:
        glance = watch.look()
    assert json.loads(glance.to_json())["runs"][0]["loss"] is None
    assert "loss     not finite" in picture(glance)


def test_without_a_card_or_a_run_there_is_the_machine(tmp_path: Path) -> None:
    with _inside(tmp_path), watching() as watch:
        glance = watch.look()
        assert glance.runs == ()
        assert [disk.folder for disk in glance.machine.disks] == ["."]
    words = picture(glance)
    assert "no runs" in words
    assert "GPU      none found" in words
    assert f"{glance.machine.memory.total_bytes / GIB:.2f}" in words


def test_a_run_whose_plan_cannot_be_read_is_shown_with_what_is_there(run: Path) -> None:
    (run / "plan.json").write_text('{"schema": "chatlm.plan/9"}', encoding="utf-8")
    with watching(run, nvml=FakeNvml([HELD_BY_US])) as watch:
        glance = watch.look()
    assert glance.runs[0].memory_budget_bytes is None
    assert "peak     6.00 GiB" in picture(glance)


def test_where_none_is_named_those_that_run_are_taken_else_the_newest_and_one_that_ends_stays(tmp_path: Path) -> None:
    for age, name in enumerate(("newest", "older", "oldest")):
        os.utime(make_run(tmp_path / "runs" / name), (1e9 - age, 1e9 - age))
    with _inside(tmp_path):
        with watching() as watch:
            assert [live.name for live in watch.look().runs] == ["newest"]
        with ExitStack() as held, watching(slow_seconds=0.0) as watch:
            held.enter_context(hold(Path("runs/older")))
            assert [live.name for live in watch.look().runs] == ["older", "newest"]
            held.close()
            assert {live.name: live.state for live in watch.look().runs} == {"older": "died", "newest": "died"}


def test_a_run_that_died_is_said_to_have_with_how_long_ago_it_wrote_and_no_eta(run: Path, tmp_path: Path) -> None:
    dead = tmp_path / "dead"
    shutil.copytree(run, dead, ignore=shutil.ignore_patterns(".lock"))
    os.utime(dead / "metrics.jsonl", (1e9, 1e9))
    with watching(dead) as watch:
        glance = watch.look()
    words = picture(replace(glance, at_seconds=1e9 + 200))
    assert "ETA" not in words
    silent = glance.runs[0].silent_seconds
    assert silent == pytest.approx(glance.at_seconds - 1e9)
    assert silent is not None
    assert f"DIED, wrote last {duration(silent)} ago, no process holds it" in words
    with hold(dead), watching(dead) as watch:
        assert "running" in picture(watch.look())


def test_two_runs_are_shown_one_below_the_other(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", steps=7)
    append(other, event("finished", 7))
    with watching(run, other) as watch:
        glance = watch.look()
    assert [(live.name, live.state, live.step) for live in glance.runs] == [
        ("live", "running", 12),
        ("other", "finished", 7),
    ]
    words = picture(glance)
    assert words.index("run live  running") < words.index("run other  finished")


def test_over_budget_is_said_in_words(run: Path) -> None:
    with watching(run) as watch:
        glance = watch.look()
    (live,) = glance.runs
    assert "OVER" not in picture(glance)
    over = replace(live, peak_memory_bytes=19_000 * GIB, left=LeftFacts(200_000.0, 1.0, 3e5))
    words = picture(replace(glance, runs=(over,)))
    assert "19000.00 GiB OVER budget 18.55" in words
    assert "ETA      2 d 7 h" in words


RECORDER = """
import os, sys
folder, *arguments = sys.argv[1:]
changes = ("mkdir", "rename", "remove", "rmdir", "utime", "truncate", "chmod", "link", "symlink")
def watch(event, given):
    opened = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
    if (opened or event.removeprefix("os.") in changes) and str(given[0]).startswith(folder):
        os._exit(99)
sys.addaudithook(watch)
from cli import app
sys.argv[1:] = arguments
app()
"""


def test_nothing_is_written_into_a_run_and_a_pipe_gets_one_picture(run: Path) -> None:
    def there() -> dict[Path, tuple[int, int]]:
        return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in [run, *run.rglob("*")]}

    before, home = there(), str(Path(__file__).resolve().parents[1])
    environ = {**os.environ, "PYTHONPATH": home, "PYTHONIOENCODING": "gbk", "COLUMNS": "80"}
    command = [sys.executable, "-P", "-c", RECORDER, str(run), "monitor", str(run)]
    done = subprocess.run(command, env=environ, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert there() == before
    assert "run live  running" in done.stdout.decode("gbk")


def test_a_name_that_is_no_run_is_told_and_json_is_one_object(chatlm: CommandRunner, run: Path) -> None:
    told = json.loads(chatlm("monitor", run, "--json").stdout)
    assert [live["state"] for live in told["runs"]] == ["running"]
    assert 0 <= told["machine"]["processor_utilization"] <= 1
    refused = chatlm("monitor", "nothing", "--once")
    assert refused.returncode == 2
    assert "nothing: no such folder" in refused.stderr


def shown(screen: LiveScreen) -> str:
    """What stands on the screen now, line by line."""
    return "\n".join(screen.board.render_line(y).text for y in range(screen.board.size.height))


def test_the_screen_shows_step_and_state_follows_the_run_to_its_death_and_q_leaves(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "live")

    async def drive(watch: Watch, held: ExitStack) -> None:
        screen = LiveScreen(watch, "utf-8")
        async with screen.run_test(size=(80, 24)) as pilot:
            await pilot.pause()
            assert "run live  running, wrote last" in shown(screen)
            assert "6 %  12 of 200" in shown(screen)
            append(folder, step(13, loss=0.1234))
            screen.look()
            assert "13 of 200" in shown(screen)
            assert "0.1234" in shown(screen)
            held.close()
            screen.look()
            assert "run live  DIED, wrote last" in shown(screen)
            await pilot.press("q")
        assert screen.return_code == 0

    with ExitStack() as held, watching(folder) as watch:
        held.enter_context(hold(folder))
        asyncio.run(drive(watch, held))


def test_the_screen_looks_once_a_second_and_draws_only_lines_that_changed(run: Path) -> None:
    async def drive(watch: Watch) -> None:
        screen = LiveScreen(watch, "utf-8")
        async with screen.run_test(size=(80, 24)) as pilot:
            await pilot.pause()
            append(run, step(13))
            for _ in range(50):
                await pilot.pause(0.2)
                if "13 of 200" in shown(screen):
                    break
            assert "13 of 200" in shown(screen), "by itself"
            strips = [screen.board.render_line(y) for y in range(24)]
            assert screen.glance is not None
            (live,) = screen.glance.runs
            lines = draw(
                replace(screen.glance, runs=(replace(live, loss=0.1234),)), 80, 24, "utf-8", "arrows scroll, q quits"
            )
            screen.board.show(lines)
            after = [screen.board.render_line(y) for y in range(24)]
            changed = [new.text for old, new in zip(strips, after, strict=True) if old is not new]
            assert len(changed) == 1
            assert "0.1234" in changed[0]

    with watching(run) as watch:
        asyncio.run(drive(watch))


def test_a_small_screen_scrolls_to_the_second_run(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other")

    async def drive(watch: Watch) -> None:
        screen = LiveScreen(watch, "ascii")
        async with screen.run_test(size=(60, 12)) as pilot:
            await pilot.pause()
            assert "run other" not in shown(screen)
            await pilot.press("end")
            await pilot.pause()
            assert "run other" in shown(screen)
            await pilot.resize_terminal(90, 50)
            await pilot.pause()
            assert "run live" in shown(screen)
            assert "run other" in shown(screen)

    with watching(run, other) as watch:
        asyncio.run(drive(watch))


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=300), st.sampled_from([2, 8, 120]))
def test_a_curve_has_at_most_so_many_points_and_ends_at_the_last_step(values: list[float], most: int) -> None:
    curve = Curve(most)
    for number, value in enumerate(values, 1):
        curve.add(number, value)
    points, told = curve.points(), [value for value in values if value == value]
    assert len(points) <= most
    assert bool(points) == bool(told)
    if len(values) <= most:
        assert [point.value for point in points] == told
    if values and values[-1] == values[-1]:
        assert points[-1].step == len(values)
    if told:
        slack = 1e-6
        assert min(told) - slack <= min(point.value for point in points)
        assert max(point.value for point in points) <= max(told) + slack
        assert [point.step for point in points] == sorted({point.step for point in points})


@pytest.mark.parametrize("steps", [1, 8, 9, 100, 1000])
def test_the_points_of_a_curve_stand_for_stretches_of_one_length(steps: int) -> None:
    curve = Curve(8)
    for number in range(1, steps + 1):
        curve.add(number, float(number))
    points = curve.points()
    lengths = {after.step - before.step for before, after in pairwise([Point(0, 0.0), *points[:-1]])}
    assert len(lengths) <= 1
    assert all(point.value == point.step - (length - 1) / 2 for point in points[:-1] for length in lengths)
    assert len(points) > 4 or len(points) == steps


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=6)
    | st.sampled_from([10**400, 10**18, 1e-320, 0, "many"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=3,
)  # fmt: skip
NAMES = sorted({
    *step(1), "total_steps", "evaluates_every", "saves_every", "saves_every_seconds", "saves_best", "bytes", "message",
    "generation_seconds", "real_tokens_per_second",
})  # fmt: skip
kinds = st.sampled_from(
    [step(3), event("started", 2, total_steps=9), event("checkpoint", 3, seconds=1), event("spike", 3),
     {"kind": "validation", "step": 3, "loss": 1.0, "seconds": 1.0}, event("rescheduled", 3, total_steps=7)]
)  # fmt: skip
rows = st.builds(lambda row, odd: row | odd, kinds, st.dictionaries(st.sampled_from(NAMES), json_values, max_size=4))


@settings(max_examples=30)
@given(st.lists(rows, max_size=5))
@example([step(1), step(2), {"kind": "validation", "step": 2, "loss": 10**400}])
@example([event("started", total_steps=10**12), *(step(number, seconds=0.0) for number in range(1, 40))])
@example([event("started", total_steps=10**12, saves_every_seconds=1e-320), *map(step, range(1, 9))])
@example([event("started", total_steps="many", evaluates_every=0), step(1), step(2, seconds=1e-320), step(3)])
def test_whatever_rows_say_the_run_is_seen_drawn_and_told(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    append(folder, *rows)
    with hold(folder), watching(folder) as watch:
        glance = watch.look()
    json.loads(glance.to_json())
    for width in (40, 100):
        lines = draw(glance, width, None, "utf-8")
        assert max(cell_len("".join(words for words, _ in line)) for line in lines) <= width
    course(History(folder))


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's own files, but for what it says of memory, and for groups: there is one mount for these."""
    made = tmp_path / "proc"
    made.mkdir()
    for there in Path("/proc").iterdir():
        if there.name not in ("meminfo", "self", str(os.getpid())):
            (made / there.name).symlink_to(there)
    sizes = {"MemTotal": 16, "MemFree": 1, "MemAvailable": 9, "Cached": 3, "SwapTotal": 8, "SwapFree": 5}
    sizes |= dict.fromkeys(("Buffers", "Shmem", "Active", "Inactive", "Slab"), 0)
    (made / "meminfo").write_text("".join(f"{name}: {size * 2**20} kB\n" for name, size in sizes.items()))
    for name, group in (("self", "ours"), (str(os.getpid()), "job/run")):
        (made / name).mkdir()
        (made / name / "cgroup").write_text(f"0::/{group}\n")
    for file in ("stat", "status", "cmdline"):
        (made / str(os.getpid()) / file).symlink_to(f"/proc/{os.getpid()}/{file}")
    groups = tmp_path / "groups"
    (made / "self" / "mountinfo").write_text(f"1 2 0:3 / {groups} rw - cgroup2 cgroup2 rw\n")
    for name, limit, held in (("ours", 2, 1), ("job", 6, 4), ("job/run", 12, 3)):
        (groups / name).mkdir(parents=True)
        (groups / name / "memory.max").write_text(f"{limit * GIB}\n")
        (groups / name / "memory.current").write_text(f"{held * GIB}\n")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(made))
    return made


def test_memory_swap_and_the_group_that_binds_the_run_are_what_the_kernel_says(
    run: Path, tmp_path: Path, proc: Path
) -> None:
    other = make_run(tmp_path / "other")
    with hold(other), watching(run, other, proc=proc) as watch:
        machine = watch.look().machine
    assert (machine.memory.total_bytes, machine.memory.available_bytes) == (16 * GIB, 9 * GIB)
    assert (machine.swap.total_bytes, machine.swap.used_bytes) == (8 * GIB, 3 * GIB)
    (group,) = machine.groups
    assert group.path.endswith("/job"), "the tightest of them, once for both runs"
    assert (group.memory.total_bytes, group.memory.available_bytes) == (6 * GIB, 2 * GIB)
    held = held_bytes(os.getpid())
    assert machine.memory.of_runs_bytes == pytest.approx(held, rel=0.5), "one process of two runs counts once"
    assert group.memory.of_runs_bytes == pytest.approx(machine.memory.of_runs_bytes, rel=0.01)
    with watching(make_run(tmp_path / "dead"), proc=proc) as watch:
        (group,) = watch.look().machine.groups
    assert (group.path.endswith("/ours"), group.memory.of_runs_bytes) == (True, None)


def test_two_groups_are_two_rows(run: Path) -> None:
    with watching(run) as watch:
        glance = watch.look()
    groups = tuple(GroupFacts(name, MemoryFacts(size * GIB, GIB, GIB, None)) for name, size in (("a", 4), ("b", 5)))
    rows = drawn(replace(glance, machine=replace(glance.machine, groups=groups)), "cgroup")
    assert [row.split()[-4:] for row in rows] == [["1.00", "2.00", "1.00", "4.00"], ["1.00", "3.00", "1.00", "5.00"]]


def a_glance(run: Path, **machine: Any) -> Glance:
    with watching(run) as watch:
        glance = watch.look()
    return replace(glance, machine=replace(glance.machine, **machine))


def test_a_row_of_memory_is_divided_and_marked_by_hand_computed_figures(run: Path) -> None:
    memory = MemoryFacts(16 * GIB, 9 * GIB, 2 * GIB, 8 * GIB)
    glance = a_glance(run, memory=memory, swap=SwapFacts(8 * GIB, 3 * GIB))
    width = 9 + 32 + 2 + 4 * 10
    (row,) = drawn(glance, "RAM", width)
    assert row.split()[-4:] == ["2.00", "5.00", "9.00", "16.00"]
    assert row[9:41] == "\u2588" * 4 + "\u2592" * 10 + "\u2591" + "\u2503" + "\u2591" * 16, "the budget is at a half"
    (row,) = drawn(glance, "swap", width)
    assert row.split()[-4:] == ["-", "3.00", "5.00", "8.00"]


def test_speed_is_that_of_steps_behind_the_first_and_the_best_evaluation_is_the_lowest(tmp_path: Path) -> None:
    steps = [step(1, seconds=90.0), *(step(number, tokens=1000 * number, seconds=number / 10) for number in (2, 3, 4))]
    checks = [{"kind": "validation", "step": 4, "loss": loss} for loss in (2.5, 1.5, 2.0)]
    append(tmp_path, event("started", total_steps=9), *steps, *checks)
    with watching(tmp_path) as watch:
        live = watch.look().runs[0]
    assert live.tokens_per_second == pytest.approx(9000 / 0.9)
    assert (live.validation_loss, live.best_validation_loss) == (2.0, 1.5)


def test_a_point_of_the_curve_of_speed_is_all_tokens_by_all_seconds(tmp_path: Path) -> None:
    slow, fast = {"tokens": 1000, "seconds": 9.0}, {"tokens": 1000, "seconds": 1.0}
    append(tmp_path, *(step(number, **(slow if number % 2 else fast)) for number in range(1, 241)))
    with watching(tmp_path) as watch:
        points = watch.look().runs[0].tokens_per_second_curve
    assert {point.value for point in points} == {200.0}


@pytest.mark.parametrize("width", [20, 21, 40, 45, 50, 58, 59, 80])
def test_on_a_narrow_screen_columns_are_left_out_and_no_number_is_cut(run: Path, width: int) -> None:
    append(run, *(step(number, seconds=0.001) for number in range(13, 1300)))
    glance = a_glance(run, memory=MemoryFacts(16 * GIB, 9 * GIB, 2 * GIB, None))
    (row,) = drawn(glance, "RAM", width)
    shown = {2: ["2.00", "9.00"], 3: ["2.00", "9.00", "16.00"], 4: ["2.00", "5.00", "9.00", "16.00"]}
    assert row.split()[2:] == shown[2 if width < 49 else 3 if width < 59 else 4]
    whole = picture(glance, 300)
    numbers = {*re.findall(r"\d[\d.,:]*", whole)}
    lines = [line for line in picture(glance, width).splitlines() if "tokens/s" not in line and line[:1].isalpha()]
    assert {found for line in lines for found in re.findall(r"\d[\d.,:]*", line)} <= numbers
    assert max(map(len, lines)) <= max(40, width)


def test_sizes_of_a_disk_of_any_size_stand_apart(run: Path) -> None:
    disks = tuple(DiskFacts("x", tib * 1024 * GIB, (tib - 1) * 1024 * GIB) for tib in (9, 11, 500, 99_999))
    rows = [row.split("  ", 1)[1] for row in drawn(a_glance(run, disks=disks), "disk")]
    assert [row.split(" ", 1)[1].split() for row in (row.strip() for row in rows)] == [
        ["-", "1024.00", "8192.00", "9216.00"],
        ["-", "1024.00", "10.00", "TiB", "11.00", "TiB"],
        ["-", "1024.00", "499.0", "TiB", "500.0", "TiB"],
        ["-", "1024.00", "99998", "TiB", "99999", "TiB"],
    ]


def test_a_card_of_which_nothing_is_told_gets_a_budget_only_where_it_is_the_only_one(run: Path) -> None:
    strangers = FakeCard("card", "GPU-1", 20 * GIB, 4 * GIB, computing={2**30: 3 * GIB})
    budget = facts.plan().memory.budget_bytes
    for cards, budgets in (([strangers], [budget]), ([strangers, IDLE], [None, None])):
        with watching(run, nvml=FakeNvml(cards)) as watch:
            assert [card.memory_budget_bytes for card in watch.look().machine.gpus] == budgets
    unsized = replace(strangers, computing={os.getpid(): None})
    with watching(run, nvml=FakeNvml([strangers, unsized])) as watch:
        assert [card.memory_budget_bytes for card in watch.look().machine.gpus] == [None, budget]


def test_a_run_whose_folder_goes_is_said_to_be_removed_in_a_whole_sentence(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "live")
    with watching(folder) as watch:
        assert watch.look().runs[0].state == "died"
        shutil.rmtree(folder)
        glance = watch.look()
    assert glance.runs[0].state == "removed"
    assert "run live  REMOVED, its folder is gone" in picture(glance)
    for state in ("running", "finished", "stopped", "died"):
        (run,) = (replace(run, state=state, silent_seconds=None, checkpoints=()) for run in glance.runs)
        words = picture(replace(glance, runs=(run,)))
        assert ", ," not in words
        assert ", :" not in words
        assert ("no checkpoint yet" in words) == (state == "running")


def test_an_end_that_is_far_has_its_year_and_one_beyond_the_calendar_no_day(run: Path) -> None:
    glance = a_glance(run)
    (live,) = glance.runs
    for days, said in ((1, True), (800, True), (10**15, False)):
        far = replace(live, left=LeftFacts(86_400.0 * days, 1.0, 86_400.0 * days))
        (eta,) = drawn(replace(glance, runs=(far,)), "ETA", 120)
        assert ("done at about" in eta) == said
        assert (time.strftime("%Y", time.localtime(glance.at_seconds + 86_400 * days)) in eta) if days == 800 else True


def test_a_terminal_that_cannot_move_its_cursor_gets_one_picture(run: Path) -> None:
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "dumb", "COLUMNS": "80"}
    shown = subprocess.Popen([chatlm_path(), "monitor", str(run)], env=environ, stdout=theirs, stdin=theirs)
    try:
        assert shown.wait(timeout=30) == 0
    finally:
        shown.kill()
    os.close(theirs)
    words = b""
    with suppress(OSError):  # the end of a terminal
        while more := os.read(ours, 2**16):
            words += more
    os.close(ours)
    assert b"run live  running" in words
    assert b"\x1b" not in words
