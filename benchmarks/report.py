"""What a report costs: of a run of 20,000 steps, beside a command that does nothing, and how large its page is.

    python benchmarks/report.py                              half a minute
    python benchmarks/report.py --steps 2000 --repeats 1     to see that it runs

The run is made by hand, with rows as a trainer writes them: a step each, an evaluation and a checkpoint every 500,
three prompts answered at each evaluation, a leap every 700. The two commands alternate; seconds are medians of the
whole command, from its start to its end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))  # the facts and the rows that tests are made of

from made_runs import event, make_run, step_row, validation  # noqa: E402

CHATLM = "from cli import app; app()"
EVALUATED = 500
LEAPS = 700


def rows(steps: int) -> list[dict[str, Any]]:
    """Return what a run of so many steps writes, uneven as runs are."""
    generator, made = random.Random(0), [event("started", 0, total_steps=steps, samples=240 * 100)]
    for step in range(1, steps + 1):
        falling = 2 + 7 / (1 + step / 300)
        made.append(
            step_row(
                step,
                loss=falling + generator.gauss(0, 0.08),
                gradient_norm=abs(generator.gauss(1, 0.2)),
                seconds=0.31 + abs(generator.gauss(0, 0.01)),
                learning_rate=5e-5 * (1 + math.cos(math.pi * step / steps)),
            )
        )
        if step % LEAPS == 0:
            made.append(event("spike", step, loss=9.1, mean_loss=falling, seconds=0.0))
        if step % EVALUATED == 0:
            made += [
                validation(step, falling + 0.1),
                event("checkpoint", step, checkpoint=f"checkpoints/step-{step:08}", bytes=312_000_000, seconds=0.4),
            ]
    return [*made, event("finished", steps, model="model")]


def answers(steps: int) -> str:
    """Return what three prompts were answered at each evaluation."""
    told = [
        {
            "step": step,
            "prompt": f"问题 {prompt}：怎样学习？" * 5,
            "answer": f"第 {step} 步的回答。" * 40,
            "reference": "好",
        }
        for step in range(EVALUATED, steps + 1, EVALUATED)
        for prompt in range(3)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told)


def seconds_of(*arguments: str) -> float:
    """Run the command to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", CHATLM, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run, page = make_run(Path(name) / "run", rows(asked.steps)), Path(name) / "report.html"
        (run / "samples.jsonl").write_text(answers(asked.steps), encoding="utf-8")
        runs = [(seconds_of("report", str(run), "-o", str(page)), seconds_of("--help")) for _ in range(asked.repeats)]
        found = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "command": " ".join(["python", "benchmarks/report.py", *sys.argv[1:]]),
            "steps": asked.steps,
            "metrics_bytes": (run / "metrics.jsonl").stat().st_size,
            "page_bytes": page.stat().st_size,
            "report_seconds": median(report for report, _ in runs),
            "help_seconds": median(nothing for _, nothing in runs),
            "runs": runs,
        }
    for key, value in found.items():
        if key != "runs":
            print(f"{key:16} {value}")
    (asked.results / "report.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
