"""How fast our trainer is beside those that people use: real tokens (template included, no padding) a second.

    CHATLM_REAL_DATA=FOLDER python benchmarks/train.py           all cases, median of 5; half an hour on two cores
    CHATLM_REAL_DATA=FOLDER python benchmarks/train.py tiny-t5   those whose name begins so
    python benchmarks/train.py --repeats 1 --steps 3             on the demo's dialogues, to see that it runs

The folder is that of `epochs.py`. Every trainer begins with the same weights, and goes once through the same samples in
optimizer steps of the same effective batch (of packed rows of TRL: in as many steps), with AdamW of the same betas,
decay, clip and rate. Each run is a process of its own, they take turns, and the first step of each is not timed. A
run of a minute is too short for `--auto` to compile: that is a row of its own, which goes twice through the samples,
and is timed the second time, when its kernels are there. What each of the others learned is told by one function: the
loss on samples that none trained on, in fp32.

Prints one table, and writes benchmarks/results/train-DEVICE.json, each case in the place of its older one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from math import ceil, nan
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from autotune.errands import Preprocess
from autotune.hardware import read_hardware
from autotune.plan import Hardware, Plan, Precision
from cli.wiring import make_workload
from profiles import Settings
from trainer.data import TokenStore
from trainer.model import build_for, save_model
from trainer.preprocess import preprocess
from trainer.rate import matrix_flops
from trainer.records import demo_files, demo_records
from trainer.step import BETAS

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
PROGRAM = "import sys; from cli import chatlm; chatlm(sys.argv[1:])"
LEARNING_RATE, WEIGHT_DECAY, CLIP = 5e-4, 0.1, 1.0
WARM_UP = 1
TRIAL_STEPS = 3
MICRO_BATCHES = (8, 16, 32)
"""Of rows, of which the fastest is taken for "well set"."""
PACKED_MICRO_BATCHES = (1, 2)
"""The same of packed rows: without flash attention TRL lays them all in one, whose attention grows with its square."""
OURS, OURS_FP32, COMPILED, SMALL = "chatlm", "chatlm, fp32", "chatlm, compiled", "chatlm, profile small"
DEFAULT, WELL_SET, PACKING, LOOP = "Trainer, its defaults", "Trainer, well set", "SFTTrainer, packing", "plain loop"


@dataclass(frozen=True)
class Case:
    """A model, and the first samples of some data."""

    name: str
    model: str
    data: tuple[str, ...]
    samples: int
    held_out: int
    tokenizer: str | None = "minimind/tokenizer"
    """None: one trained on the data."""
    effective_batch_size: int = 32
    max_seq_len: int = 512
    without: tuple[str, ...] = (SMALL,)
    """Trainers that are left out."""


INSTRUCTIONS, PAIRS = ("dialogue/alpaca_zh_en_2k.jsonl",), ("chatlm_mini/my_train_dataset_3k.parquet",)
FIVE_THOUSAND = (*PAIRS, "chatlm_mini/my_test_dataset_2k.parquet")
CASES = {
    "cpu": (
        Case("tiny, instructions", "tiny", INSTRUCTIONS, 192, 64),
        Case("tiny, conversations", "tiny", ("dialogue/chitchat_400.jsonl",), 128, 64),
        Case("tiny-t5, pairs", "tiny-t5", PAIRS, 192, 64, None),
        Case("minimind-26m, instructions", "minimind-26m", INSTRUCTIONS, 96, 32),
        Case(
            "minimind-26m, twice as many",
            "minimind-26m",
            INSTRUCTIONS,
            192,
            32,
            without=(SMALL, OURS_FP32, DEFAULT, LOOP, PACKING),
        ),
    ),
    "cuda": (
        Case("minimind-26m, instructions", "minimind-26m", INSTRUCTIONS, 1920, 64),
        Case("minimind-104m, instructions", "minimind-104m", INSTRUCTIONS, 1920, 64),
        Case("chatlm-t5, pairs", "chatlm-t5", FIVE_THOUSAND, 4936, 64, None, without=()),
    ),
}


@dataclass
class Run:
    """One training."""

    case: str
    trainer: str
    repeat: int
    seconds: float
    """Of the steps after the first."""
    tokens: int
    computed_tokens: int
    """Padding included."""
    steps: int
    peak_bytes: int
    held_out_loss: float | None
    """None of a trial, and of a second epoch."""
    whole_seconds: float
    """Of the process, imports included."""
    cpu_seconds: float
    """The same, of all its threads: what other work on the machine changes least."""
    how: dict[str, Any]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Row:
    """One trainer in one case."""

    case: str
    trainer: str
    how: str
    steps: int
    tokens_per_second: float
    """Median of the runs."""
    slowest: float
    fastest: float
    ours_over_it: float
    """Of the medians."""
    ours_fp32_over_it: float | None
    padding: float
    """Share of what was computed."""
    peak_bytes: int
    held_out_loss: float | None
    of_matmul_rate: float


@dataclass(frozen=True)
class Prepared:
    """What all trainers begin with, in a folder."""

    case: Case
    folder: Path
    typed: list[str]
    task: str
    tokens: int
    held_out: list[dict[str, list[int]]]
    useful_flops_per_token: float

    @property
    def steps(self) -> int:
        return ceil(self.case.samples / self.case.effective_batch_size)


def prepare(case: Case, hardware: Hardware, folder: Path) -> Prepared:
    """Save the model that all begin with and the samples as tokens; what we are told is the same, as text."""
    data, tokenizer = sources(case, folder)
    settings = Settings(
        model=case.model, tokenizer=tokenizer, data=data, max_seq_len=case.max_seq_len,
        limit=case.samples + case.held_out,
    )  # fmt: skip
    facts = preprocess(
        Preprocess(
            model=case.model, tokenizer=tokenizer, dropout=None, freeze=(), data=data, validation=(),
            validation_split=None, show=0, stage=None,
            max_seq_len=case.max_seq_len, max_target_len=case.max_seq_len, limit=settings.limit,
            cache_dir=str(folder / "cache" / "chatlm"),
        ),
        lambda *_: None,
    )  # fmt: skip
    assert facts.data is not None
    assert facts.tokenizer_dir is not None
    whole_steps = (facts.data.samples - case.held_out) // case.effective_batch_size * case.effective_batch_size
    case = replace(case, samples=min(case.samples, whole_steps))
    torch.manual_seed(settings.seed)
    model = build_for(make_workload(settings, facts, hardware), facts.ids, torch.device("cpu"))
    save_model(model, Path(facts.tokenizer_dir), folder / "model")
    store, seq2seq = TokenStore(Path(facts.data.store)), facts.model.task == "seq2seq"
    rows = [row_of(store, i, seq2seq=seq2seq) for i in range(len(store))]
    trained = rows[: case.samples]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trained), encoding="utf-8")
    tokens = sum(len(row["input_ids"]) + seq2seq * len(row["labels"]) for row in trained)
    typed = [
        "--model", str(folder / "model"), "--data", *" --data ".join(data).split(), "--limit", str(case.samples),
        "--max-seq-len", str(case.max_seq_len),
    ]  # fmt: skip
    flops = useful_flops(model, trained) / tokens
    held_out = rows[case.samples :][: case.held_out]
    return Prepared(case, folder, typed, facts.model.task, tokens, held_out, flops)


def sources(case: Case, folder: Path) -> tuple[tuple[str, ...], str | None]:
    """Return the files of a case and its tokenizer; without real data those of the demo, as one file."""
    if real := os.environ.get("CHATLM_REAL_DATA"):
        tokenizer = str(Path(real) / case.tokenizer) if case.tokenizer else None
        return tuple(str(Path(real) / file) for file in case.data), tokenizer
    rows = [[asdict(turn) for turn in record.turns] for record in demo_records(demo_files())]
    file = folder / "demo.jsonl"
    file.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows), encoding="utf-8")
    return (str(file),), None


def row_of(store: TokenStore, i: int, *, seq2seq: bool) -> dict[str, list[int]]:
    tokens = store.tokens(i).tolist()
    if seq2seq:
        border = int(store.spans(i)[0, 0])
        return {"input_ids": tokens[:border], "labels": tokens[border:]}
    labels = [-100] * len(tokens)
    for start, end in store.spans(i):
        labels[start:end] = tokens[start:end]
    return {"input_ids": tokens, "labels": labels}


def useful_flops(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Count 6 a weight and real token, the head's where there is a target (2001.08361, section 2.1).

    What attention multiplies beside its weights is left out.
    """
    inputs = sum(len(row["input_ids"]) for row in rows)
    targets = sum(label != -100 for row in rows for label in row["labels"])
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}

    def matrices(part: Any) -> int:
        return sum(p.numel() for p in part.parameters() if p.ndim >= 2 and id(p) not in tables)

    head: int = model.get_output_embeddings().weight.numel()
    if not model.config.is_encoder_decoder:
        return 6.0 * (matrices(model) * inputs + head * targets)
    encoder, decoder = matrices(model.get_encoder()), matrices(model.get_decoder())
    return 6.0 * (encoder * inputs + (decoder + head) * targets)


def held_out_loss(ready: Prepared, folder: Path) -> float:
    """Return the mean loss of the target tokens held out: one sample at a time, in fp32, by the model's own forward."""
    kind = AutoModelForSeq2SeqLM if ready.task == "seq2seq" else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in ready.held_out:
            labels = torch.tensor([row["labels"]])
            targets = int(labels.ne(-100).sum())
            total += targets * float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss)
            count += targets
    return total / count


def chatlm(arguments: list[str], ready: Prepared, **pipes: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(ready.folder / "cache")}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, check=True, text=True, env=environment, **pipes)


def plan_of(ready: Prepared, trainer: str) -> Path:
    """Plan as the command does, once: the runs then train that plan."""
    file = ready.folder / f"{trainer}.json"
    effective = ["--effective-batch-size", str(ready.case.effective_batch_size)]
    wishes = {
        OURS: effective,
        OURS_FP32: [*effective, "--precision", "fp32"],
        COMPILED: [*effective, "--compile", "on"],
        SMALL: ["--batch-size-per-gpu", "1", "--effective-batch-size", "16", "--layout", "fixed"],
    }
    done = chatlm(["plan", "--json", *ready.typed, *wishes[trainer]], ready, stdout=subprocess.PIPE)
    file.write_text(done.stdout, encoding="utf-8")
    return file


@dataclass(frozen=True)
class Stopwatch:
    """Wall time and processor time of the processes that were started and ended since it was made."""

    began: float
    children: float

    @classmethod
    def start(cls) -> Stopwatch:
        return cls(time.perf_counter(), cpu_of_children())

    def read(self) -> dict[str, float]:
        return {"whole_seconds": time.perf_counter() - self.began, "cpu_seconds": cpu_of_children() - self.children}


def cpu_of_children() -> float:
    spent = os.times()
    return spent.children_user + spent.children_system


def run_ours(ready: Prepared, trainer: str, plan: Path, repeat: int) -> Run:
    folder, watch = ready.folder / f"{trainer} {repeat}", Stopwatch.start()
    compiled = trainer == COMPILED
    recipe = [
        "--epochs", "2" if compiled else "1", "--learning-rate", str(LEARNING_RATE), "--schedule", "constant",
        "--warmup", "0", "--weight-decay", str(WEIGHT_DECAY), "--clip", str(CLIP), "--output-dir", str(folder),
    ]  # fmt: skip
    chatlm(["train", "--plan", str(plan), *ready.typed, *recipe], ready, stdout=sys.stderr)
    took = watch.read()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    assert sum(row["tokens"] for row in steps[-ready.steps :]) == ready.tokens, (
        "not every sample, or not as told to the others"
    )
    (verified,) = [row for row in map(json.loads, lines) if row.get("event") == "verified"]
    made = Plan.from_json(plan.read_text(encoding="utf-8"))
    timed = steps[ready.steps if compiled else WARM_UP :]
    return Run(
        case=ready.case.name,
        trainer=trainer,
        repeat=repeat,
        seconds=sum(row["seconds"] for row in timed),
        tokens=sum(row["tokens"] for row in timed),
        computed_tokens=sum(row["padded_tokens"] for row in timed),
        steps=len(steps),
        peak_bytes=max(row["peak_memory_bytes"] for row in steps),
        held_out_loss=None if compiled else held_out_loss(ready, folder / "model"),
        **took,
        how={
            "micro_batch_size": made.batching.micro_batch_size,
            "layout": verified["layout"],
            "precision": made.workload.precision,
            "compile": made.workload.compile,
            "cpu_allocator": made.workload.cpu_allocator,
            "plan_seconds": made.evidence.seconds,
        },
    )


def their_errand(ready: Prepared, trainer: str, size: int, precision: str, steps: int | None) -> dict[str, Any]:
    """Say what a peer is to do: what is the same for all, its size, and what it is told beside."""
    bf16 = precision == "bf16"
    told: dict[str, dict[str, Any]] = {
        DEFAULT: {},
        WELL_SET: {"train_sampling_strategy": "group_by_length", "bf16": bf16, "optim": "adamw_torch_fused"},
        PACKING: {"bf16": bf16, "gradient_checkpointing": False},
        LOOP: {},
    }
    return {
        "trainer": "SFTTrainer" if trainer == PACKING else "Trainer", "task": ready.task,
        "model": str(ready.folder / "model"), "rows": str(ready.folder / "rows.jsonl"),
        "folder": str(ready.folder / "theirs"), "max_seq_len": ready.case.max_seq_len, "precision": precision,
        "effective_batch_size": ready.case.effective_batch_size, "micro_batch_size": size,
        "steps": steps, "warm_up": WARM_UP, "learning_rate": LEARNING_RATE, "betas": BETAS,
        "weight_decay": WEIGHT_DECAY, "clip": CLIP, "arguments": told[trainer],
    }  # fmt: skip


def run_theirs(ready: Prepared, trainer: str, size: int, precision: str, repeat: int, steps: int | None = None) -> Run:
    """Run a peer; `steps` only for a trial."""
    errand, watch = their_errand(ready, trainer, size, precision, steps), Stopwatch.start()
    program = [sys.executable, HERE / "plain_loop.py"] if trainer == LOOP else [PEERS, HERE / "hf_trainer.py"]
    done = subprocess.run(
        [*map(str, program), json.dumps(errand)], check=False, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(ready.folder / "hf"), "OMP_NUM_THREADS": threads()},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{trainer} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1]) | watch.read()
    all_tokens = found.pop("all_tokens")
    assert steps or all_tokens == ready.tokens, f"{trainer} had {all_tokens} tokens, not {ready.tokens}"
    loss = None if steps else held_out_loss(ready, Path(errand["folder"]))
    return Run(case=ready.case.name, trainer=trainer, repeat=repeat, held_out_loss=loss, **found)


def threads() -> str:
    return os.environ.get("OMP_NUM_THREADS") or str(read_hardware(Path()).cores)


def try_sizes(ready: Prepared, trainer: str, sizes: tuple[int, ...], precision: str) -> list[Run]:
    """Try each size for a few steps; fastest first."""
    steps = min(TRIAL_STEPS, ready.steps)
    tried = [run_theirs(ready, trainer, size, precision, 0, steps) for size in sizes]
    return sorted(tried, key=lambda made: made.tokens_per_second, reverse=True)


def run(ready: Prepared, repeats: int) -> tuple[list[Run], list[Run]]:
    """Plan and choose, then let all take turns; return these turns, and the trials that sizes were chosen by."""
    plan = Plan.from_json((auto := plan_of(ready, OURS)).read_text(encoding="utf-8"))
    precision = plan.workload.precision
    without = {*ready.case.without}
    if precision == "fp32":
        without.add(OURS_FP32)
    if ready.task == "seq2seq":
        without.add(PACKING)
    plans = {OURS: auto}
    plans |= {trainer: plan_of(ready, trainer) for trainer in (OURS_FP32, COMPILED, SMALL) if trainer not in without}
    theirs = {DEFAULT: 8, LOOP: plan.batching.micro_batch_size}
    trials, runs = [], []
    for trainer, sizes in {WELL_SET: MICRO_BATCHES, PACKING: PACKED_MICRO_BATCHES}.items():
        if trainer not in without:
            tried = try_sizes(ready, trainer, sizes, precision)
            theirs[trainer] = tried[0].how["micro_batch_size"]
            trials += tried
    theirs = {trainer: size for trainer, size in theirs.items() if trainer not in without}
    for repeat in range(repeats):
        for trainer, file in plans.items():
            runs.append(run_ours(ready, trainer, file, repeat))
        for trainer, size in theirs.items():
            runs.append(run_theirs(ready, trainer, size, "fp32" if trainer == DEFAULT else precision, repeat))
    return runs, trials


def summed_up(ready: Prepared, runs: list[Run], rate: float) -> list[Row]:
    by_trainer: dict[str, list[Run]] = {}
    for made in runs:
        by_trainer.setdefault(made.trainer, []).append(made)
    speed = {trainer: median(r.tokens_per_second for r in made) for trainer, made in by_trainer.items()}
    return [
        Row(
            case=ready.case.name,
            trainer=trainer,
            how=described(made[0]),
            steps=made[0].steps,
            tokens_per_second=speed[trainer],
            slowest=min(r.tokens_per_second for r in made),
            fastest=max(r.tokens_per_second for r in made),
            ours_over_it=speed[OURS] / speed[trainer],
            ours_fp32_over_it=speed[OURS_FP32] / speed[trainer] if OURS_FP32 in speed else None,
            padding=1 - sum(r.tokens for r in made) / sum(r.computed_tokens for r in made),
            peak_bytes=max(r.peak_bytes for r in made),
            held_out_loss=None if trainer == COMPILED else median(r.held_out_loss or nan for r in made),
            of_matmul_rate=speed[trainer] * ready.useful_flops_per_token / rate,
        )
        for trainer, made in by_trainer.items()
    ]


def described(made: Run) -> str:
    how = made.how
    if "layout" in how:
        compiled = ", compiled" * (how["compile"] == "on")
        return f"{how['layout']}, {how['precision']}, {how['micro_batch_size']} rows{compiled}"
    if made.trainer == LOOP:
        return f"{how['precision']}, {how['micro_batch_size']} rows" + (", compiled" if how["compiled"] else "")
    precision = "bf16" if how["bf16"] else "fp32"
    return f"{how['sampling']}, {precision}, {how['micro_batch_size']} x {how['accumulation']} rows"


def print_table(rows: list[Row]) -> None:
    table = Table()
    for name in ("case", "trainer", "how", "steps", "real tokens/s", "from", "to", "ours over it", "ours fp32 over it",
                 "padding", "peak GiB", "held-out loss", "of matmul"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("case", "trainer", "how") else "right")
    for r in rows:
        table.add_row(
            r.case, r.trainer, r.how, str(r.steps), f"{r.tokens_per_second:,.0f}", f"{r.slowest:,.0f}",
            f"{r.fastest:,.0f}", f"{r.ours_over_it:.2f}",
            "" if r.ours_fp32_over_it is None else f"{r.ours_fp32_over_it:.2f}", f"{r.padding:.0%}",
            f"{r.peak_bytes / 2**30:.2f}", "" if r.held_out_loss is None else f"{r.held_out_loss:.4f}",
            f"{r.of_matmul_rate:.1%}",
        )  # fmt: skip
    Console(width=190).print(table)


def versions(python: str | Path) -> dict[str, str]:
    """Return what a Python's libraries are; those that it has not are left out."""
    asked = (
        "import json; from importlib.metadata import distributions as d; "
        "print(json.dumps({x.name: x.version for x in d()}))"
    )
    found = json.loads(subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout)
    wanted = ("torch", "transformers", "accelerate", "trl", "datasets", "tokenizers")
    return {name: found[name] for name in wanted if name in found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="fewer than a case has, to see that it runs")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    if asked.steps is not None and asked.steps <= WARM_UP:
        parser.error(f"the first {WARM_UP} is not timed: more steps are needed")
    if not PEERS.exists():
        sys.exit(f"{PEERS} is not there: make bench sets it up")
    hardware = read_hardware(Path())
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        own: Precision = "bf16" if hardware.fast_bf16 else "fp32"
        rate = pool.submit(matrix_flops, torch.device(hardware.device), own).result()
    rows: list[Row] = []
    for case in CASES[hardware.device]:
        if asked.cases and not case.name.startswith(tuple(asked.cases)):
            continue
        if asked.steps:
            case = replace(case, samples=min(case.samples, asked.steps * case.effective_batch_size))
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            ready = prepare(case, hardware, Path(temporary))
            runs, trials = run(ready, asked.repeats)
        made = summed_up(ready, runs, rate)
        print_table(rows := rows + made)
        found = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{hardware.device_name}, {hardware.cores} cores, {platform.system()} {platform.machine()}",
            "command": " ".join(["python", "benchmarks/train.py", *sys.argv[1:]]),
            "data": "real" if os.environ.get("CHATLM_REAL_DATA") else "demo",
            "versions": {"ours": versions(sys.executable), "peers": versions(PEERS)},
            "threads": threads(),
            "matmul_flops_per_second": {own: rate},
            "seconds": time.perf_counter() - began,
            "rows": [asdict(row) for row in made],
            "trials": [asdict(trial) for trial in trials],
            "runs": [asdict(one) for one in runs],
        }
        write(asked.results / f"train-{hardware.device}.json", case.name, found)


def write(file: Path, case: str, found: dict[str, Any]) -> None:
    """Write a case in the place of its older one; the others stay, each with its own date."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(kept | {case: found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
