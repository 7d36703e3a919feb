"""`chatlm report`: what a page says of runs and plans, and that a browser shows it, whole, everywhere."""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import facts
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_runs import PROMPT, a_course, data_summary, event, make_run, step_row, validation
from test_charts import Seen
from typer.testing import CliRunner

from autotune.errors import ConfigurationError, MachineError
from cli import chatlm
from cli.choices import planned_padding
from cli.history import History, RunData
from cli.render.console import print_json
from cli.report import report_command
from cli.report.events import course, told

STEPS = 60


def page_of(folder: Path, *named: Path) -> str:
    """Write a page and read it."""
    target = folder / "report.html"
    report_command([str(name) for name in named], str(target))
    return target.read_text(encoding="utf-8")


def twin(run: Path) -> Path:
    """The same run, in a folder of its own beside it."""
    return Path(shutil.copytree(run, run.with_name("twin"), dirs_exist_ok=True))


def words(page: str) -> str:
    return " ".join(Seen(page).said.split())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "运行", a_course(STEPS))


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    file = tmp_path / "plan.json"
    made = facts.plan(workload=facts.workload(cpu_allocator="tight"), hardware=facts.hardware(cores=1))
    file.write_text(made.to_json(), encoding="utf-8")
    return file


def test_a_page_says_first_in_words_what_a_run_came_to(run: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path, run)
    said = words(page)
    assert said.index("Fine-tuning of small") < said.index("The plan")
    assert "on 对话.parquet, 24,000 samples, 2 epochs; 240 samples a step" in said
    assert "Finished after 60 of 60 steps in 22 s: loss 7.7800 to" in said
    assert "on held-out data 4.0000 to 3.5000, best 3.5000 at step 60." in said
    assert "The plan said a peak of at most 5.00 GiB, really 5.00 GiB (+0 %)" in said
    tokens = sum(History(run).columns["tokens"]) / STEPS
    assert f"{tokens / 0.3:,.0f} tokens/s, really" in said, "the forecast's epoch has 100 steps in 30 s"
    assert "18 s, really 22 s (+2" in said
    assert "of which 2 s went into answers" in said
    for heading in ("The plan", "The run", "The data", "Samples over time", "Events", "Configuration"):
        assert f"<h2>{heading}</h2>" in page


def test_events_are_told_in_words_with_their_step_and_time(run: Path, tmp_path: Path) -> None:
    said = words(page_of(tmp_path, run))
    for line in (
        "Verified: packed rows have the gradient",
        "Started: 60 steps over 2,010 samples",
        "Going on from c, step 30",
        "changed since it was saved: learning_rate 1 -> 2",
        "A gradient that is not finite: 2 samples changed no weight",
        "A leap in loss 9 (mean 4)",
        "taken again in micro-batches of 10 rows instead of 20",
        "1 checkpoint, 2 evaluations",
        "Checkpoint saved, 17.8 MiB",
        "Finished; best at step 60, loss 3.5000",
    ):
        assert line in said
    for marked in ("resumed", "a leap", "skipped step", "memory ran out"):
        assert f"</svg>{marked}</li>" in page_of(tmp_path, run)


def test_time_is_that_of_steps_and_of_all_between_them(run: Path) -> None:
    history = History(run)
    made = course(history)
    steps = sum(history.columns["seconds"])
    assert made.seconds[-1] == pytest.approx(steps + 1.5 + 0.04)
    assert made.happened[-1].seconds == pytest.approx(steps + 3.04)
    assert [one.step for one in made.happened] == sorted(one.step for one in made.happened)


@pytest.mark.parametrize("row", [{"step": 3, "event": "spike", "loss": None}, {"step": 3, "event": "new_kind"},
                                 {"step": 3, "event": "resumed"}, {"step": 3}])  # fmt: skip
def test_an_event_that_does_not_tell_all_is_told_by_its_name(row: dict[str, Any]) -> None:
    assert told(row) == row.get("event", "validation").replace("_", " ")


def test_settings_that_were_given_come_first_and_defaults_are_folded(run: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path, run)
    configuration = page[page.index("<h2>Configuration</h2>") :]
    shown, _, folded = configuration.partition("<details>")
    assert "command line" in shown
    assert "epochs" in shown
    assert "default" not in shown
    assert "seed" in folded


def test_text_of_the_data_is_shown_and_never_obeyed(run: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path, run)
    assert html.escape(PROMPT.replace("\u202e", "\\u202e")) in page
    assert "\u202e" not in page
    assert "script" not in Seen(page).tags
    assert "10 of 29 answers" in words(page)


def refers_to(page: str) -> list[str]:
    """What a browser would fetch."""
    fetched = ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "background")
    named = [value for name, value in Seen(page).attributes if name in fetched]
    return named + re.findall(r"url\(([^)]*)|@import", page[: page.index("</style>")])


def test_a_page_needs_no_network_and_runs_nothing(run: Path, plan_file: Path, tmp_path: Path) -> None:
    for page in (page_of(tmp_path, run), page_of(tmp_path, plan_file), page_of(tmp_path, run, twin(run))):
        assert refers_to(page) == ["data:,"]
        assert "default-src 'none'" in page


def test_a_page_of_a_plan_has_the_plan_alone(plan_file: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path, plan_file)
    assert "Plan: small on NVIDIA GeForce RTX 3080" in words(page)
    assert "free, 1 core" in words(page)
    assert "1 cores" not in words(page)
    assert page.count("<h2>") == 1
    for name in ("chosen, measured", "measured", "predicted", "tried, did not fit"):
        assert f"</svg>{name}</li>" in page
    assert "budget 18.55 GiB" in page


def test_runs_that_have_not_come_far_are_told_too(tmp_path: Path) -> None:
    begun = make_run(tmp_path / "begun", a_course(STEPS)[:20])
    assert "Ended without a word after 18 of 60 steps in 6 s" in words(page_of(tmp_path, begun))
    none = make_run(tmp_path / "none", [])
    assert "no step was taken yet" in words(page_of(tmp_path, none))
    bare = make_run(tmp_path / "bare", [step_row(1, loss=None)])
    for file in ("plan.json", "config.toml", "data.json", "samples.jsonl"):
        (bare / file).unlink()
    said = words(page_of(tmp_path, bare))
    assert "loss not finite to not finite" in said
    assert "The folder has no plan that can be read." in said
    assert "side by side" in words(page_of(tmp_path, none, begun, bare))


def test_a_run_that_is_still_written_is_told_as_far_as_it_is(run: Path, tmp_path: Path) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 61, "lo')
    (run / "plan.json").write_text("{", encoding="utf-8")
    assert "after 60 of 60 steps" in words(page_of(tmp_path, run))


def test_several_runs_stand_side_by_side_with_what_differs(run: Path, tmp_path: Path) -> None:
    rows = [step_row(step, seconds=0.1, tokens_per_second=140_000) for step in range(1, 31)]
    fast = make_run(tmp_path / "fast", [event("started", 0, total_steps=30, samples=9), *rows, validation(30, 3.1)],
                    batching=facts.batching(micro_batch_size=23))  # fmt: skip
    page = page_of(tmp_path, run, fast)
    cells = re.findall(r"<td>([^<]*)</td>", page.replace("<wbr>", ""))
    table = {cells[i]: cells[i + 1 : i + 3] for i in range(0, len(cells) - 2, 3)}
    tokens = [sum(14_000 + step % 7 * 100 for step in range(1, steps + 1)) for steps in (60, 30)]
    factor = (tokens[1] / 3.0) / (tokens[0] / sum(0.31 + 0.02 * math.sin(step) for step in range(1, 61)))
    assert table["tokens/s beside the first"] == ["1.00 x", f"{factor:.2f} x"]
    assert table["tokens/s"][1] == f"{tokens[1] / 3.0:,.0f}"
    assert table["steps"] == ["60", "30"]
    assert table["rows in a micro-batch, at most"] == ["20", "23"]
    assert f"fast took {factor:.2f} times the tokens of 运行 each second" in words(page)
    assert page.count('class="line c1 d1" d=') == 2 * 5
    assert table["batch_size_per_gpu"] == ["20", "23"]


def drawn(page: str, title: str, look: str) -> list[tuple[float, float]]:
    """A line of the wide drawing of a figure, read off against its ticks as a person would."""
    figure = page[page.index(f"<figcaption><b>{title}</b>") :]
    svg = figure.partition('<svg class="wide"')[2].partition("</svg>")[0]
    number, plain = r"(-?[\d.]+)", r">([\d.,]+)</text>"

    def scale(found: list[tuple[str, ...]]) -> tuple[float, float]:
        (a, at_a), (b, at_b) = ((float(p), float(said.replace(",", ""))) for p, said in (found[0], found[-1]))
        return (at_b - at_a) / (b - a), at_a - a * (at_b - at_a) / (b - a)

    across = scale(re.findall(rf'class="tick" x="{number}" y="[\d.]+" text-anchor="middle"{plain}', svg))
    up = scale(re.findall(rf'class="tick" x="[\d.]+" y="{number}" text-anchor="end"{plain}', svg))
    line = re.search(rf'<path class="line {look}" d="([^"]*)"', svg)
    assert line, (title, look)
    points = re.findall(rf"[ML]{number} {number}", line[1])
    return [(float(x) * across[0] + across[1], (float(y) + 4) * up[0] + up[1]) for x, y in points]


def test_curves_stand_where_their_units_put_them(tmp_path: Path) -> None:
    rows = [step_row(i, peak_memory_bytes=3 * 2**30, seconds=4.0, tokens=2000) for i in range(1, 101)]
    run = make_run(tmp_path / "run", [event("started", 0, total_steps=100, samples=9), *rows])
    page = page_of(tmp_path, run)
    assert drawn(page, "Memory", "c0")[-1] == pytest.approx((100, 3), abs=0.1)
    assert drawn(page, "Speed", "c0")[-1] == pytest.approx((100, 500), rel=0.01)
    assert drawn(page, "Time", "c0")[-1] == pytest.approx((100, 400 / 60), rel=0.01), "minutes"
    assert drawn(page, "Time", "plan d4")[-1] == pytest.approx((200, 1.0), rel=0.03), "the forecast's 60 s"
    both = page_of(tmp_path, run, twin(run))
    assert drawn(both, "Memory", "c0")[-1] == pytest.approx((100, 3), abs=0.1)
    assert drawn(both, "Loss over time", "c0")[-1][0] == pytest.approx(400 / 60, rel=0.01)
    assert "500 tokens/s" in words(page), "2,000 tokens in 4 s"
    assert "In this run: 87 %." in words(page), "2,000 of 15,000"


def test_what_the_trace_said_stands_in_the_unit_of_its_chart(plan_file: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path, plan_file)
    assert "tried, did not fit: 21 GiB at 120 rows in a micro-batch" in page
    assert "the trace alone had said: 21 GiB at 120 rows in a micro-batch" in page


def test_what_a_peak_is_made_of_is_stacked(plan_file: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path, plan_file)
    part = page[page.index("<b>What the peak is made of</b>") :].partition("</svg>")[0]
    bars = re.findall(r'<rect class="bar [^"]*" x="([\d.]+)" y="\d+" width="([\d.]+)"', part)
    (x, width), (x2, width2) = (tuple(map(float, bar)) for bar in bars)
    assert x + width == pytest.approx(x2, abs=0.2)
    assert x2 + width2 == pytest.approx(588, abs=0.2), "together they are the peak, which the axis ends at"


def test_a_few_steps_of_next_to_no_time_flatten_no_curve_and_the_speed_is_one(tmp_path: Path) -> None:
    rows = [step_row(i, tokens=1000, seconds=1.0, tokens_per_second=1000.0) for i in range(1, 201)]
    rows[19] |= {"seconds": 3.0, "tokens_per_second": 1000 / 3}
    for row in rows[99:160:2]:
        row |= {"seconds": 1e-6, "tokens_per_second": 1e9}
    page = page_of(tmp_path, make_run(tmp_path / "run", rows))
    speeds = [y for _, y in drawn(page, "Speed", "c0")]
    slow = [1000] * 17 + [5000 / 7] * 5 + [1000] * 75
    assert speeds == pytest.approx([*slow, *[1250] * 65, *[1000] * 38], rel=0.01), "5,000 tokens in 7 s; on the edge"
    assert "92 values above the chart, drawn on its edge: up to 1,000,000,000." in words(page)
    assert "Smoothed: the mean of 5 steps." in words(page)


def test_a_leap_of_the_loss_hides_no_curve_of_one_run_or_of_several(tmp_path: Path) -> None:
    rows = [step_row(i, loss=1e6 if i in (100, 300) else 2.0) for i in range(1, 401)]
    run = make_run(tmp_path / "run", rows)
    alone, both = page_of(tmp_path, run), page_of(tmp_path, run, twin(run))
    for page, title, above in ((alone, "Loss", 2), (both, "Loss over steps", 4)):
        line = [y for _, y in drawn(page, title, "c0")]
        assert (line[0], max(line)) == pytest.approx((2.0, 2.5), abs=0.05)
        assert f"{above} values above the chart, drawn on its edge: up to 1,000,000." in words(page)
    assert "Smoothed: the mean of 11 steps" in words(alone), "five before each, five after"


def test_a_run_that_went_on_with_more_epochs_is_held_against_as_many_steps(tmp_path: Path) -> None:
    rows = [event("started", 0, total_steps=200, samples=9), *(step_row(i) for i in range(1, 201))]
    rows += [event("started", 200, total_steps=400, samples=9), *(step_row(i) for i in range(201, 301))]
    run = make_run(tmp_path / "run", rows)
    config = run / "config.toml"
    config.write_text(config.read_text(encoding="utf-8").replace("epochs = 2.0", "epochs = 4.0"), encoding="utf-8")
    page = page_of(tmp_path, run)
    assert "24,000 samples, 4 epochs" in words(page)
    assert "The plan is of 200 steps, the run has 400" in words(page)
    assert drawn(page, "Time", "plan d4")[-1] == pytest.approx((400, 2.0), rel=0.02), "twice the 60 s, in minutes"
    assert "forecast, 2 min at the pace of the plan, which is of 200 steps" in words(page)


def test_what_a_run_does_not_say_counts_as_nothing(tmp_path: Path) -> None:
    rows = [{"kind": "train", "step": i, "loss": None} for i in range(1, 9)]
    page = page_of(tmp_path, make_run(tmp_path / "run", rows))
    said = words(page)
    assert "The plan said" not in said
    assert "Ended without a word after 8 steps: loss not finite" in said
    shown = dict(re.findall(r"<div><dt>([^<]*)</dt><dd>([^<]*)</dd></div>", page))
    assert shown == {"Loss": "not finite → not finite", "Steps": "8", "Time": "-", "Speed": "-",
                     "Peak, of 18.55 GiB": "-"}  # fmt: skip


@pytest.mark.parametrize("data", ["5", "[1]", "null", '["a", 1]', "[" * 9000, ""])
def test_data_that_a_configuration_does_not_name_is_not_the_demo_data(tmp_path: Path, data: str) -> None:
    run = make_run(tmp_path / "run", a_course(8))
    (run / "config.toml").write_text(f"data = {data}  # command line\n", encoding="utf-8")
    assert "on data that its configuration does not name, 24,000 samples" in words(page_of(tmp_path, run))


JSON = st.recursive(
    st.sampled_from(
        [None, True, -1, 0, 3, 1.5, 10**400, 1e299, -1e299, 1e-310, math.inf, math.nan, "", "nanochat", "8"]
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["bytes", "step"]), inner, max_size=2),
    max_leaves=3,
)
CHANGES = st.dictionaries(st.sampled_from(sorted({key for row in a_course(12) for key in row})), JSON, max_size=4)
CONFIG = st.dictionaries(st.sampled_from(["data", "epochs", "model"]), JSON, max_size=3)


@pytest.fixture(scope="module")
def any_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("any") / "run", [])


UNFIT = [
    (8, {"loss": 10**400, "peak_memory_bytes": "8", "generation_seconds": "nanochat", "seconds": math.inf}),
    (9, {"bytes": 10**400}),
    (10, {"event": "plan_against_real", "real_tokens_per_second": 10**400}),
]
"""An evaluation, a checkpoint and an event of a course of 12 steps."""


@example(UNFIT, {"data": 5, "epochs": None}, 1e299)
@given(st.lists(st.tuples(st.integers(0, 20), CHANGES), max_size=6), CONFIG, JSON)
@settings(max_examples=10, deadline=None)
def test_whatever_stands_in_rows_and_configuration_there_is_a_page(
    any_run: Path, changed: list[tuple[int, dict[str, Any]]], config: dict[str, Any], any_json: Any
) -> None:
    rows = a_course(12)
    for place, changes in changed:
        rows[place].update(changes)
    answers = [{"step": any_json, "prompt": "a", "answer": any_json, "reference": any_json}]
    for name, lines in (("metrics.jsonl", rows), ("samples.jsonl", answers)):
        (any_run / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    given_values = (f"{name} = {json.dumps(value)}  # command line\n" for name, value in config.items())
    (any_run / "config.toml").write_text("".join(given_values), encoding="utf-8")
    for named in ([any_run], [any_run, twin(any_run)]):
        page = page_of(any_run.parent, *named)
        of_numbers = re.split("<h2>(?:Samples|Events|Configuration)", page)[0]
        assert not re.search(r"\b(nan|inf)\b", words(of_numbers))


def test_a_name_with_nan_in_it_is_a_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", a_course(8), workload=facts.workload(model="nanochat"))
    assert "<td>model</td><td>nanochat</td><td>nanochat</td>" in page_of(tmp_path, run, twin(run))


def test_runs_are_told_apart_or_refused(tmp_path: Path) -> None:
    rows = [step_row(step) for step in range(1, 41)]
    runs = [make_run(tmp_path / f"run{i}", rows) for i in range(13)]
    page = page_of(tmp_path, *runs[:12])
    legend = page[page.index('<ul class="legend">') :].partition("</ul>")[0]
    swatches = [re.sub(r'"(c\d)', '"', swatch) for swatch in legend.split("<li>")[1:]]
    assert len({swatch.partition("</svg>")[0] for swatch in swatches}) == 12, "without their colours"
    with pytest.raises(ConfigurationError, match="13 runs are more than the 12 that a chart can tell apart"):
        page_of(tmp_path, *runs)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / place / "run", a_course(8)) for place in ("a", "b")]
    said = words(page_of(tmp_path, *runs))
    assert all(str(run) in said for run in runs)


def test_a_file_that_is_none_of_ours_is_left_as_it_is(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("<p>mine</p>", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="is no report of chatlm: it is left as it is") as error:
        page_of(tmp_path, run)
    assert error.value.hint == "give another --output FILE"
    assert target.read_text(encoding="utf-8") == "<p>mine</p>"
    target.unlink()
    assert page_of(tmp_path, run) == page_of(tmp_path, run), "one of ours is written over"
    with pytest.raises(ConfigurationError, match="no such folder"):
        report_command([str(run)], str(tmp_path / "none" / "report.html"))
    with pytest.raises(ConfigurationError, match="is no file"):
        report_command([str(run)], str(run))


def test_what_is_neither_a_run_nor_a_plan_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(ConfigurationError, match=r"not a plan of chatlm\.plan/1"):
        page_of(tmp_path, tmp_path / "notes.txt")
    with pytest.raises(ConfigurationError, match="holds no run"):
        page_of(tmp_path, tmp_path)
    (tmp_path / "plan.json").write_text('{"schema": 1}')
    with pytest.raises(ConfigurationError) as error:
        page_of(tmp_path, tmp_path / "plan.json")
    assert error.value.message.endswith("not a plan of chatlm.plan/1: schema: Input should be 'chatlm.plan/1'")
    with pytest.raises(ConfigurationError, match="is a file: side by side stand runs"):
        page_of(tmp_path, tmp_path / "plan.json", tmp_path / "plan.json")
    assert not (tmp_path / "report.html").exists()


def test_a_file_of_a_run_names_the_run(run: Path, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "config.toml"):
        with pytest.raises(ConfigurationError, match=f"{name} is a part of a run") as error:
            page_of(tmp_path, run / name)
        assert error.value.hint == f"give its folder: chatlm report {run}"


def test_a_page_goes_where_a_link_leads_and_to_files_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").symlink_to(tmp_path / "real.html")
    page = page_of(tmp_path, run)
    assert (tmp_path / "report.html").is_symlink()
    assert (tmp_path / "real.html").read_text(encoding="utf-8") == page
    with pytest.raises(ConfigurationError, match="- is none"):
        report_command([str(run)], "-")
    with pytest.raises(MachineError, match=r"/proc/x\.html cannot be written: No such file"):
        report_command([str(run)], "/proc/x.html")


def test_a_console_without_letters_is_shown_their_numbers(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "报告.html"
    done = subprocess.run(
        [sys.executable, "-c", "import cli; cli.app()", "report", str(run), "-o", str(target)],
        capture_output=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert target.is_file()
    assert b"\\u62a5\\u544a.html (" in done.stdout


def test_json_stays_json_on_a_console_without_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"name": "é中🙂", "plain": 'a"b'}
    for encoding in ("ascii", "cp1252", "utf-8"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, "backslashreplace"))
        print_json(json.dumps(said, ensure_ascii=False))
        assert json.loads(raw.getvalue().decode(encoding)) == said


def test_the_command_says_where_it_wrote_and_what_is_refused(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    done = CliRunner().invoke(chatlm, ["report", str(run), "-o", str(target)])
    assert done.exit_code == 0
    assert done.stdout.startswith(f"report: {target} (")
    refused = CliRunner().invoke(chatlm, ["report", str(run), "-o", str(run / "plan.json")])
    assert refused.exit_code == 2
    assert "hint: give another --output FILE" in refused.stderr
    refused = CliRunner().invoke(chatlm, ["plan", "--plot", "--json"])
    assert refused.exit_code == 2
    assert "--plot draws one plan, for people" in refused.stderr


def test_padding_is_that_of_the_plan_and_a_run_keeps_it(run: Path) -> None:
    padding = planned_padding(facts.plan(), data_summary())
    assert padding.keys() == {"packed", "sorted", "fixed"}
    assert padding["packed"] < padding["sorted"] < padding["fixed"]
    kept = History(run).data()
    assert kept is not None
    assert kept == RunData.model_validate_json(kept.model_dump_json())
    (run / "data.json").write_text("{}", encoding="utf-8")
    assert History(run).data() is None


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """
const box = (e) => e.getBoundingClientRect();
const isDrawn = (e) => box(e).width + box(e).height > 0;
const found = [];
for (const frame of document.querySelectorAll('iframe')) {
  const page = frame.contentDocument, root = page.scrollingElement;
  const drawn = [...page.querySelectorAll('svg[role=img]')].filter((s) => box(s).width > 0);
  const clipped = [], overlapping = [];
  for (const svg of drawn) {
    const texts = [...svg.querySelectorAll('text')];
    for (const [i, text] of texts.entries()) {
      const a = box(text), whole = box(svg);
      if (a.left < whole.left - 1 || a.right > whole.right + 1 || a.bottom > whole.bottom + 1)
        clipped.push(text.textContent);
      for (const b of texts.slice(i + 1).map(box))
        if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
          overlapping.push(text.textContent);
    }
  }
  found.push({
    name: frame.title, scroll: root.scrollWidth, client: root.clientWidth, clipped, overlapping,
    smallest: Math.min(...drawn.flatMap((s) => [...s.querySelectorAll('text')]).map((t) => box(t).height)),
    paper: getComputedStyle(page.body).backgroundColor, figures: page.querySelectorAll('figure').length,
    marks: drawn.map((s) => [...s.querySelectorAll('.line, .mark, .bar')].filter(isDrawn).length),
  });
}
document.body.innerHTML = '<pre id="found">' + JSON.stringify(found).replace(/[<&]/g, '?') + '</pre>';
"""


def look_at(pages: dict[str, str], folder: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Show pages in a browser, narrow and wide, light and dark; return what is seen, by page, width and scheme."""
    frames = "".join(
        f'<iframe title="{name} {width} {scheme}" style="width: {width}px; height: 900px; border: 0; '
        f'color-scheme: {scheme}" srcdoc="{html.escape(page)}"></iframe>'
        for name, page in pages.items()
        for width in (360, 1400)
        for scheme in ("light", "dark")
    )
    harness = folder / "harness.html"
    harness.write_text(
        f"<!doctype html><meta charset=utf-8><body>{frames}<script>onload = () => {{{LOOK}}}</script>", encoding="utf-8"
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               f"--user-data-dir={folder / 'browser'}", "--dump-dom", harness.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True)
    assert not [line for line in done.stderr.splitlines() if ":CONSOLE" in line], done.stderr
    told = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told, done.stdout[-2000:]
    seen = {}
    for one in json.loads(html.unescape(told[1])):
        name, width, scheme = one["name"].split()
        seen[name, int(width), scheme] = one
    return seen


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, so no page is looked at in a browser")
def test_a_browser_shows_every_chart_whole_wide_and_narrow_light_and_dark(
    run: Path, plan_file: Path, tmp_path: Path
) -> None:
    rows = [step_row(step * 900, loss=1e6 / step) for step in range(1, 900)]
    long = make_run(tmp_path / "long", [event("started", 0, total_steps=2_000_000, samples=9), *rows])
    pages = {
        "run": page_of(tmp_path, run),
        "plan": page_of(tmp_path, plan_file),
        "several": page_of(tmp_path, run, long),
        "long": page_of(tmp_path, long),
    }
    (long / "samples.jsonl").write_text('{"step": 1e299, "prompt": "a", "answer": "b"}\n', encoding="utf-8")
    pages["long"] = page_of(tmp_path, long)
    charts = {"run": 12, "plan": 4, "several": 5, "long": 12}
    seen = look_at(pages, tmp_path)
    assert len(seen) == 16
    for (name, width, scheme), one in seen.items():
        where = f"{name} at {width} pixels, {scheme}"
        assert one["scroll"] <= one["client"] <= width, where
        assert one["clipped"] == [], where
        assert one["overlapping"] == [], where
        assert one["smallest"] >= 11, where
        assert one["figures"] == len(one["marks"]) == charts[name], where
        assert all(one["marks"]), where
        assert one["paper"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme], where
