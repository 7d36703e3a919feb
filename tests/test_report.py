"""`chatlm report`: what a page says of runs and plans, and that a browser shows it, whole, everywhere."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import facts
import pytest
from made_runs import PROMPT, a_course, data_summary, event, make_run, step_row, validation
from test_charts import Seen
from typer.testing import CliRunner

from autotune.errors import ConfigurationError
from cli import chatlm
from cli.choices import planned_padding
from cli.history import History, RunData
from cli.report import report_command
from cli.report.events import course, told
from cli.report.told import Told

STEPS = 60


def page_of(folder: Path, *named: Path) -> str:
    """Write a page and read it."""
    target = folder / "report.html"
    report_command([str(name) for name in named], str(target))
    return target.read_text(encoding="utf-8")


def words(page: str) -> str:
    return " ".join(Seen(page).said.split())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "运行", a_course(STEPS))


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    file = tmp_path / "plan.json"
    file.write_text(facts.plan(workload=facts.workload(cpu_allocator="tight")).to_json(), encoding="utf-8")
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
    for page in (page_of(tmp_path, run), page_of(tmp_path, plan_file), page_of(tmp_path, run, run)):
        assert refers_to(page) == ["data:,"]
        assert "default-src 'none'" in page


def test_a_page_of_a_plan_has_the_plan_alone(plan_file: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path, plan_file)
    assert "Plan: small on NVIDIA GeForce RTX 3080" in words(page)
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
    factor = float(table["tokens/s beside the first"][1].split()[0])
    assert factor == pytest.approx(
        Told(History(fast), "").tokens_per_second / Told(History(run), "").tokens_per_second, abs=0.01
    )
    assert table["steps"] == ["60", "30"]
    assert table["rows in a micro-batch, at most"] == ["20", "23"]
    assert f"fast took {factor:.2f} times the tokens of 运行 each second" in words(page)
    assert page.count('class="line c1 d1" d=') == 2 * 5
    assert table["batch_size_per_gpu"] == ["20", "23"]


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
    assert not (tmp_path / "report.html").exists()


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
