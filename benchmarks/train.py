"""How fast a step trains, beside transformers' Trainer: real tokens (template included, no padding) per second.

    CHATLM_REAL_DATA=FOLDER python benchmarks/train.py          all workloads; about half an hour on two cores
    CHATLM_REAL_DATA=FOLDER python benchmarks/train.py t5       those whose name begins so

Same model, data, effective batch, optimizer and machine; runs take turns, and the median of each is compared. Trainer
is run twice: as its documentation sets it (8 rows, fp32), and as a person would who knows (length-grouped, bf16, the
micro-batch of our plan). Prints one table, and writes benchmarks/results/train-DEVICE.json.
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
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autotune.errands import Preprocess
from autotune.hardware import read_hardware
from autotune.plan import Hardware, Plan
from cli.wiring import choose_precision, make_workload
from profiles import Settings
from trainer.data import TokenStore
from trainer.model import build_for, save_model
from trainer.preprocess import preprocess

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
PROGRAM = "import sys; from cli import chatlm; chatlm(sys.argv[1:])"
REPEATS = 5
WORKLOADS: dict[str, tuple[dict[str, Any], int]] = {
    "llama-instructions": (
        {"model": "tiny", "tokenizer": "minimind/tokenizer", "data": ("dialogue/alpaca_zh_en_2k.jsonl",),
         "max_seq_len": 512, "effective_batch_size": 32}, 16,
    ),
    "llama-conversations": (
        {"model": "tiny", "tokenizer": "minimind/tokenizer", "data": ("dialogue/chitchat_400.jsonl",),
         "max_seq_len": 512, "effective_batch_size": 32}, 12,
    ),
    "t5-chat": (
        {"model": "tiny-t5", "data": ("chatlm_mini/my_train_dataset_3k.parquet",), "limit": 900, "max_seq_len": 512,
         "effective_batch_size": 32}, 16,
    ),
    "minimind-26m-instructions": (
        {"model": "minimind-26m", "tokenizer": "minimind/tokenizer", "data": ("dialogue/alpaca_zh_en_2k.jsonl",),
         "max_seq_len": 512, "effective_batch_size": 16}, 4,
    ),
}  # fmt: skip
"""Settings, and steps of a run; the first is not counted."""


@dataclass
class Run:
    """One training."""

    seconds: float
    tokens: float
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Row:
    """One workload in one trainer."""

    workload: str
    trainer: str
    how: str
    tokens_per_second: float
    """Median of the runs."""
    all_runs: list[float]
    ours_over_it: float
    peak_bytes: int


def run(name: str, settings: Settings, steps: int, hardware: Hardware, folder: Path) -> list[Row]:
    typed, rows_file, seq2seq = prepare(settings, hardware, folder)
    first = ours(typed, steps, folder / "run-0", folder)  # plans; what it measured is remembered
    plan = Plan.from_json((folder / "run-0" / "plan.json").read_text(encoding="utf-8"))
    rows = plan.batching.micro_batch_size
    knowing = {"bf16": plan.workload.precision == "bf16", "train_sampling_strategy": "group_by_length"}
    theirs = {
        "Trainer, its defaults": (8, {}),
        "Trainer, well set": (rows, knowing),
    }
    runs: dict[str, list[Run]] = {"chatlm": [first], **{trainer: [] for trainer in theirs}}
    for repeat in range(REPEATS):
        if repeat:
            runs["chatlm"].append(ours(typed, steps, folder / f"run-{repeat}", folder))
        for trainer, (size, arguments) in theirs.items():
            effective = plan.batching.effective_batch_size
            size = min(size, effective)
            errand = {
                "model": str(folder / "model"), "rows": str(rows_file), "seq2seq": seq2seq,
                "folder": str(folder / "hf"), "steps": steps, "effective_batch_size": effective // size * size,
                "arguments": {"per_device_train_batch_size": size, "gradient_accumulation_steps": effective // size,
                              **arguments},
            }  # fmt: skip
            runs[trainer].append(their_run(errand))
    medians = {trainer: median(run.tokens_per_second for run in made) for trainer, made in runs.items()}
    how = {
        "chatlm": f"{plan.workload.layout}, {plan.workload.precision}, {rows} rows",
        "Trainer, its defaults": "8 rows, fp32",
        "Trainer, well set": f"length-grouped, {plan.workload.precision}, {rows} rows",
    }
    return [
        Row(
            workload=name,
            trainer=trainer,
            how=how[trainer],
            tokens_per_second=medians[trainer],
            all_runs=[run.tokens_per_second for run in made],
            ours_over_it=medians["chatlm"] / medians[trainer],
            peak_bytes=max(run.peak_bytes for run in made),
        )
        for trainer, made in runs.items()
    ]


def prepare(settings: Settings, hardware: Hardware, folder: Path) -> tuple[list[str], Path, bool]:
    """Save the model that all begin with, and the samples as rows; return what we are told, and those."""
    facts = preprocess(
        Preprocess(
            model=settings.model, tokenizer=settings.tokenizer, dropout=0.0 if "t5" in settings.model else None,
            freeze=(), data=settings.data, validation=(), stage=None, max_seq_len=settings.max_seq_len,
            max_target_len=settings.max_seq_len, limit=settings.limit, cache_dir=str(folder / "cache" / "chatlm"),
        ),
        lambda *_: None,
    )  # fmt: skip
    assert facts.data is not None
    assert facts.tokenizer_dir is not None
    workload = make_workload(settings, facts, hardware)
    torch.manual_seed(settings.seed)
    save_model(build_for(workload, facts.ids, torch.device("cpu")), Path(facts.tokenizer_dir), folder / "model")
    store, seq2seq = TokenStore(Path(facts.data.store)), facts.model.task == "seq2seq"
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for i in range(len(store)):
            file.write(json.dumps(row_of(store, i, seq2seq=seq2seq)) + "\n")
    typed = ["--model", str(folder / "model"), "--max-seq-len", str(settings.max_seq_len)]
    typed += ["--effective-batch-size", str(settings.effective_batch_size), "--data", *settings.data]
    typed += ["--limit", str(settings.limit)] if settings.limit else []
    return typed, folder / "rows.jsonl", seq2seq


def row_of(store: TokenStore, i: int, *, seq2seq: bool) -> dict[str, list[int]]:
    tokens = store.tokens(i).tolist()
    if seq2seq:
        border = int(store.spans(i)[0, 0])
        return {"input_ids": tokens[:border], "labels": tokens[border:]}
    labels = [-100] * len(tokens)
    for start, end in store.spans(i):
        labels[start:end] = tokens[start:end]
    return {"input_ids": tokens, "labels": labels}


def ours(typed: list[str], steps: int, output: Path, folder: Path) -> Run:
    command = [sys.executable, "-c", PROGRAM, "train", "--auto", *typed, "--max-steps", str(steps)]
    subprocess.run(
        [*command, "--output-dir", str(output)], check=True, stdout=sys.stderr,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
    )  # fmt: skip
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    return Run(
        seconds=sum(row["seconds"] for row in trained[1:]),
        tokens=sum(row["tokens"] for row in trained[1:]),
        peak_bytes=max(row["peak_memory_bytes"] for row in trained),
    )


def their_run(errand: dict[str, Any]) -> Run:
    done = subprocess.run(
        [PEERS, HERE / "hf_trainer.py", json.dumps(errand)], check=True, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def print_table(rows: list[Row]) -> None:
    table = Table()
    for name in ("workload", "trainer", "how", "real tokens/s", "ours over it", "peak GiB"):
        table.add_column(name, justify="left" if name in ("workload", "trainer", "how") else "right")
    for r in rows:
        table.add_row(
            r.workload, r.trainer, r.how, f"{r.tokens_per_second:,.0f}", f"{r.ours_over_it:.2f}",
            f"{r.peak_bytes / 2**30:.2f}",
        )  # fmt: skip
    Console(width=140).print(table)


def main() -> None:
    wanted, data = tuple(sys.argv[1:]), Path(os.environ["CHATLM_REAL_DATA"])
    if not PEERS.exists():
        sys.exit(f"{PEERS} is not there: make bench sets it up")
    hardware, rows = read_hardware(Path()), []
    print("precision by rule:", choose_precision("auto", "llama", hardware))
    for name, (values, steps) in WORKLOADS.items():
        if not wanted or name.startswith(wanted):
            at = {key: str(data / values[key]) for key in ("tokenizer",) if key in values}
            settings = Settings(**{**values, **at, "data": tuple(str(data / file) for file in values["data"])})
            with tempfile.TemporaryDirectory() as temporary:
                rows += run(name, settings, steps, hardware, Path(temporary))
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
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / f"train-{hardware.device}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
