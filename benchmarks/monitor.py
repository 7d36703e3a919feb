"""What `chatlm monitor` costs: its screen on runs that are being written, in a real terminal, by the kernel's count.

    python benchmarks/monitor.py                    a minute, Linux
    python benchmarks/monitor.py --seconds 10       to see that it runs

Each run is made up: 2,000 steps that were, then one a second, a line of log each five, a checkpoint each thirty.
All cases are measured at once, over the same minute. Beside them a textual app that shows one line a second, which is
what is left when all of ours is taken away. Memory is all that is resident, pages of libraries too.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import pty
import random
import select
import struct
import sys
import tempfile
import termios
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import facts  # noqa: E402

from cli.lock import hold  # noqa: E402

COLUMNS, LINES = 120, 40
WARM_SECONDS = 5.0
STEPS_BEFORE = 2000
LEAVE_SECONDS = 5.0
MOST_SHARE, MOST_BYTES = 0.01, 80 * 2**20
CHATLM = "from cli import app; app()"
BARE = """
import time
from textual.app import App
from textual.widgets import Static
class Bare(App):
    BINDINGS = [("q", "quit", "quit")]
    def compose(self):
        yield Static()
    def on_mount(self):
        self.set_interval(1.0, lambda: self.query_one(Static).update(time.ctime()))
Bare().run(mouse=False)
"""


class Run:
    """A made-up run that takes a step whenever it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.step = folder, 0
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "plan.json").write_text(facts.plan().to_json(), encoding="utf-8")
        self.write({"kind": "event", "event": "started", "step": 0, "total_steps": 10_000, "samples": 24_000})
        for _ in range(STEPS_BEFORE):
            self.take()

    def write(self, row: dict[str, Any]) -> None:
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def take(self) -> None:
        self.step += 1
        tokens = random.randint(20_000, 30_000)
        self.write({
            "kind": "train", "step": self.step, "epoch": 1 + self.step // 100, "learning_rate": 1e-4,
            "loss": 2 + 6 / (1 + self.step / 200) + random.gauss(0, 0.1), "gradient_norm": random.uniform(0.5, 2.0),
            "samples": 240, "tokens": tokens, "target_tokens": tokens // 2, "padded_tokens": 30_720, "micro_batches": 6,
            "data_seconds": 0.002, "peak_memory_bytes": 5 * 2**30, "seconds": random.uniform(0.98, 1.02),
            "tokens_per_second": float(tokens), "model_flops_utilization": random.uniform(0.3, 0.4),
        })  # fmt: skip
        if self.step % 5 == 0:
            with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"a word of the worker at step {self.step}\n")
        if self.step % 30 == 0:
            saved = self.folder / "checkpoints" / f"step-{self.step:08}"
            saved.mkdir()
            for name in ("model.safetensors", "manifest.json"):
                (saved / name).write_bytes(b"x" * 1000)


class Terminal:
    """A program in a terminal of its own, whose words are read and dropped."""

    def __init__(self, *command: str) -> None:
        self.written = 0
        self.process_id, self.descriptor = pty.fork()
        if self.process_id == 0:
            os.environ.update(TERM="xterm-256color", PYTHONPATH=str(HERE.parent))
            os.execv(sys.executable, [sys.executable, "-P", *command])
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))

    def drop(self) -> None:
        try:
            self.written += len(os.read(self.descriptor, 2**16))
        except OSError:  # it left
            raise SystemExit(f"process {self.process_id} left before it was measured") from None

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.process_id}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self) -> dict[str, int]:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self.process_id}/status").read_text().splitlines())
        names = {"resident": "VmRSS", "anonymous": "RssAnon", "of_files": "RssFile", "shared": "RssShmem"}
        return {f"{name}_bytes": int(status[field].split()[0]) * 1024 for name, field in names.items()}

    def leave(self) -> None:
        """Press q, and see that it goes."""
        os.write(self.descriptor, b"q")
        until = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < until:
            if select.select([self.descriptor], [], [], 0.1)[0]:
                try:
                    os.read(self.descriptor, 2**16)
                except OSError:
                    break
        else:
            os.kill(self.process_id, 9)
        os.waitpid(self.process_id, 0)


def pass_time(seconds: float, runs: list[Run], terminals: list[Terminal]) -> float:
    """Let runs take a step a second, and terminals be read; return what really passed."""
    began = time.monotonic()
    due = began
    while (now := time.monotonic()) < began + seconds:
        if now >= due:
            due += 1.0
            for run in runs:
                run.take()
        waits = max(0.0, min(due, began + seconds) - now)
        ready = select.select([terminal.descriptor for terminal in terminals], [], [], waits)[0]
        for terminal in terminals:
            if terminal.descriptor in ready:
                terminal.drop()
    return time.monotonic() - began


def measure(folder: Path, seconds: float) -> dict[str, dict[str, Any]]:
    runs = [Run(folder / f"run-{number}") for number in range(4)]
    with ExitStack() as held:
        for run in runs:
            held.enter_context(hold(run.folder))
        names = [str(run.folder) for run in runs]
        cases = {
            "monitor, one run": Terminal("-c", CHATLM, "monitor", names[0]),
            "monitor, four runs": Terminal("-c", CHATLM, "monitor", *names),
            "textual alone": Terminal("-c", BARE),
        }
        terminals = [*cases.values()]
        try:
            pass_time(WARM_SECONDS, runs, terminals)
            before = [(terminal.processor_seconds(), terminal.written) for terminal in terminals]
            passed = pass_time(seconds, runs, terminals)
            return {
                name: {
                    "seconds": passed,
                    "processor_share": (terminal.processor_seconds() - used) / passed,
                    "written_bytes_per_second": (terminal.written - written) / passed,
                    "startup_processor_seconds": used,
                    **terminal.memory_bytes(),
                }
                for (name, terminal), (used, written) in zip(cases.items(), before, strict=True)
            }
        finally:
            for terminal in terminals:
                terminal.leave()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        cases = measure(Path(name), asked.seconds)
    print(f"{'':20}{'of a core':>12}{'resident MiB':>14}{'anonymous':>12}{'bytes/s':>10}")
    for case, told in cases.items():
        mib = [told[f"{kind}_bytes"] / 2**20 for kind in ("resident", "anonymous")]
        print(
            f"{case:20}{told['processor_share']:>11.2%} {mib[0]:>13.1f} {mib[1]:>11.1f} "
            f"{told['written_bytes_per_second']:>9,.0f}"
        )
    one = cases["monitor, one run"]
    held = one["processor_share"] <= MOST_SHARE and one["resident_bytes"] <= MOST_BYTES
    print(f"at most {MOST_SHARE:.0%} of a core and {MOST_BYTES / 2**20:.0f} MiB: {'held' if held else 'NOT held'}")
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "command": " ".join(["python", "benchmarks/monitor.py", *sys.argv[1:]]),
        "textual": version("textual"),
        "columns": COLUMNS,
        "lines": LINES,
        "refresh_seconds": 1.0,
        "held": held,
        "cases": cases,
    }
    asked.results.mkdir(exist_ok=True)
    (asked.results / "monitor.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
