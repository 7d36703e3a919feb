"""What plans promise of real data, against what became: one epoch each of `chatlm train --auto`, from the outside.

    CHATLM_REAL_DATA=FOLDER python benchmarks/epochs.py          all workloads; about a quarter of an hour on two cores
    CHATLM_REAL_DATA=FOLDER python benchmarks/epochs.py t5       those whose name begins so

The folder holds chatlm_mini/ (prompt and response, Chinese), dialogue/ (conversations, instructions and documents,
Chinese and English) and minimind/tokenizer. Prints one table, and writes benchmarks/results/epochs-DEVICE.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autotune.hardware import read_hardware
from autotune.plan import Hardware, Plan

RESULTS = Path(__file__).parent / "results"
PROGRAM = "import sys; from cli import chatlm; chatlm(sys.argv[1:])"
WORKLOADS = {
    "t5-chat": "--model tiny-t5 --data chatlm_mini/my_train_dataset_3k.parquet --limit 900 --effective-batch-size 30",
    "t5-chat-tight": "--model tiny-t5 --data chatlm_mini/my_train_dataset_3k.parquet --limit 900 "
    "--effective-batch-size 30 --memory-limit 0.72GiB",
    "llama-instructions": "--model tiny --tokenizer minimind/tokenizer --data dialogue/alpaca_zh_en_2k.jsonl "
    "--limit 1200 --max-seq-len 256 --effective-batch-size 32",
    "llama-instructions-tight": "--model tiny --tokenizer minimind/tokenizer --data dialogue/alpaca_zh_en_2k.jsonl "
    "--limit 1200 --max-seq-len 256 --effective-batch-size 32 --memory-limit 0.75GiB",
    "llama-conversations": "--model tiny --tokenizer minimind/tokenizer --data dialogue/chitchat_400.jsonl "
    "--max-seq-len 512 --effective-batch-size 16 --memory-limit 1GiB",
    "llama-documents": "--model tiny --tokenizer minimind/tokenizer --data dialogue/pretrain_docs.jsonl "
    "--max-seq-len 256 --effective-batch-size 16",
    "llama-validated": "--model tiny --tokenizer minimind/tokenizer --data dialogue/alpaca_zh_en_2k.jsonl "
    "--validation dialogue/chitchat_400.jsonl --limit 600 --max-seq-len 256 --effective-batch-size 24",
}
PATHS = ("chatlm_mini", "dialogue", "minimind")


@dataclass
class Row:
    """One epoch."""

    workload: str
    batch: str
    layout: str
    allocator: str
    steps: int
    planned_seconds: float
    real_seconds: float
    planned_tokens_per_second: float
    real_tokens_per_second: float
    worst_case_peak_bytes: int
    expected_peak_bytes: int
    real_peak_bytes: int
    limit_bytes: int


def run(name: str, arguments: str, folder: Path, data: Path) -> Row:
    typed = [str(data / word) if word.startswith(PATHS) else word for word in arguments.split()]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        "train",
        "--auto",
        "--epochs",
        "1",
        *typed,
        "--output-dir",
        str(folder / name),
    ]
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
    plan = Plan.from_json((folder / name / "plan.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (against,) = [row for row in rows if row.get("event") == "plan_against_real"]
    batching = plan.batching
    return Row(
        workload=name,
        batch=f"{batching.micro_batch_size} x {batching.gradient_accumulation_steps}",
        layout=plan.workload.layout,
        allocator=plan.workload.cpu_allocator,
        steps=against["step"],
        planned_seconds=against["planned_seconds"],
        real_seconds=against["real_seconds"],
        planned_tokens_per_second=against["planned_tokens_per_second"],
        real_tokens_per_second=against["real_tokens_per_second"],
        worst_case_peak_bytes=against["planned_peak_bytes"],
        expected_peak_bytes=against["expected_peak_bytes"],
        real_peak_bytes=against["real_peak_bytes"],
        limit_bytes=plan.memory.limit_bytes,
    )


def print_table(rows: list[Row]) -> None:
    table = Table()
    for name in ("workload", "batch", "layout", "malloc", "steps", "s planned", "s real", "real / planned", "tokens/s",
                 "real / planned", "peak expected", "real / expected", "real / worst case", "of limit"):  # fmt: skip
        table.add_column(name, justify="left" if name == "workload" else "right")
    for r in rows:
        table.add_row(
            r.workload, r.batch, r.layout, r.allocator, str(r.steps),
            f"{r.planned_seconds:.1f}", f"{r.real_seconds:.1f}",
            f"{r.real_seconds / r.planned_seconds - 1:+.1%}", f"{r.real_tokens_per_second:,.0f}",
            f"{r.real_tokens_per_second / r.planned_tokens_per_second - 1:+.1%}",
            f"{r.expected_peak_bytes / 2**30:.3f}",
            f"{r.real_peak_bytes / r.expected_peak_bytes - 1:+.1%}",
            f"{r.real_peak_bytes / r.worst_case_peak_bytes - 1:+.1%}", f"{r.real_peak_bytes / r.limit_bytes:.0%}",
        )  # fmt: skip
    Console(width=150).print(table)


def main() -> None:
    wanted, data = tuple(sys.argv[1:]), Path(os.environ["CHATLM_REAL_DATA"])
    hardware = read_hardware(Path())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, arguments in WORKLOADS.items():
            if not wanted or name.startswith(wanted):
                rows.append(run(name, arguments, Path(temporary), data))
                print_table(rows)
                write(rows, hardware)


def write(rows: list[Row], hardware: Hardware) -> None:
    """Write what there is, after each workload: a run that is cut short leaves something."""
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{hardware.device_name}, {hardware.cores} cores",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"epochs-{hardware.device}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
