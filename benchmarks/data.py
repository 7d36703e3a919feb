"""What reading data costs: tokenizing beside the `tokenizers` library alone, memory by rows, seconds to a second start.

Needs CHATLM_REAL_DATA. Ways alternate; a figure is the median of the repeats, a share that of the pairs.
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
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from autotune.errands import Preprocess
from trainer.data import StoreWriter
from trainer.encode import Encoder, _answered
from trainer.preprocess import preprocess
from trainer.records import read_blocks, read_records
from trainer.shards import append, make_shards
from trainer.tokenizer import load_tokenizer

REPEATS, SECONDS = 5, 10.0
LENGTH = 8
BATCH = 4096
SETS = {
    "pairs, Llama": ("chatlm_mini/my_train_dataset_3k.parquet", "minimind", "causal", "sft"),
    "pairs, T5": ("chatlm_mini/my_train_dataset_3k.parquet", "chatlm_mini", "seq2seq", "sft"),
    "instructions": ("dialogue/alpaca_zh_en_2k.jsonl", "minimind", "causal", "sft"),
    "long conversations": ("dialogue/chitchat_400.jsonl", "minimind", "causal", "sft"),
    "documents": ("dialogue/pretrain_docs.jsonl", "minimind", "causal", "pretrain"),
}
TOKENIZE = ("tokenizers, encode_batch", "tokenizers, encode_batch_fast", "chatlm")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--repeats", type=int, default=REPEATS)
    arguments.add_argument("--seconds", type=float, default=SECONDS, help="of work in a set, about")
    arguments.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    asked = arguments.parse_args()
    data = Path(os.environ["CHATLM_REAL_DATA"])
    load = os.getloadavg()
    cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [tokenizing(data, folder, name, cores, asked.repeats, asked.seconds) for name in SETS]
        held = {samples: loading(folder, samples) for samples in (10_000, 10_000_000)}
        seconds = [second_start(data, folder) for _ in range(asked.repeats)]
    machine = {
        "processor": platform.processor() or platform.machine(),
        "load_before": load[0],
        "python": platform.python_version(),
    }
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "cores": cores,
        "repeats": asked.repeats,
        "tokenizing": rows,
        "held_bytes": held,
        "second_start": seconds,
    }
    show(rows, held, seconds, cores)
    asked.results.mkdir(parents=True, exist_ok=True)
    (asked.results / "data-cpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def show(rows: list[dict[str, Any]], held: dict[int, int], seconds: list[float], cores: int) -> None:
    table = Table(title=f"Tokenizing on {cores} cores: seconds, and what part of tokenizers' speed is reached")
    for column in ("", *TOKENIZE, "of encode_batch", "of encode_batch_fast"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["set"],
            *(f"{median(row['seconds'][way]):.2f}" for way in TOKENIZE),
            *(f"{row['share'][way]:.0%}" for way in TOKENIZE[:2]),
        )
    console = Console()
    console.print(table)
    few, many = held.values()
    console.print(f"anonymous memory of loading: {few / 2**20:.1f} MiB (10 k rows), {many / 2**20:.1f} MiB (10 M rows)")
    console.print(f"second start: {median(seconds):.2f} s beyond imports")


def tokenizing(data: Path, folder: Path, name: str, cores: int, repeats: int, seconds: float) -> dict[str, Any]:
    file, tokenizer_name, task, stage = SETS[name]
    tokenizer = load_tokenizer(str(data / tokenizer_name / "tokenizer"))
    encoder = Encoder(tokenizer, task, stage, 512, 512)
    texts = rendered(encoder, data / file)
    began = time.perf_counter()
    tokenizer.backend_tokenizer.encode_batch(texts)
    copies = max(1, round(seconds / (time.perf_counter() - began)))
    large = repeated(data / file, folder, copies)
    texts = rendered(encoder, large)
    backend = tokenizer.backend_tokenizer
    ways: dict[str, Callable[[], None]] = {
        TOKENIZE[0]: lambda: in_batches(backend.encode_batch, texts),
        TOKENIZE[1]: lambda: in_batches(backend.encode_batch_fast, texts),
        TOKENIZE[2]: lambda: ours(encoder, large, folder / "store", cores),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(repeats):
        for way in list(ways)[:: 1 if i % 2 else -1]:
            began = time.perf_counter()
            ways[way]()
            taken[way].append(time.perf_counter() - began)
    pairs = {way: median(a / b for a, b in zip(taken[way], taken["chatlm"], strict=True)) for way in TOKENIZE[:2]}
    return {"set": name, "texts": len(texts), "seconds": taken, "share": pairs}


def in_batches(encode: Callable[..., Any], texts: list[str]) -> None:
    for first in range(0, len(texts), BATCH):
        encode(texts[first : first + BATCH], add_special_tokens=False)


def ours(encoder: Encoder, file: Path, folder: Path, cores: int) -> None:
    """From the file to the store."""
    folder.mkdir(exist_ok=True)
    with StoreWriter(folder, encoder.task) as writer:
        for shard in make_shards(encoder, None, read_blocks([file]), cores):
            append(writer, shard)
        writer.finish()


def rendered(encoder: Encoder, file: Path) -> list[str]:
    """The very texts that ours tokenizes first."""
    records = read_records([file])
    if encoder.stage == "pretrain":
        return [str(record.text) for record in records]
    if encoder.task == "causal":
        return [encoder._template(record, _answered(record), prompt=False) for record in records]
    turns = [_answered(record) for record in records]
    return [text for t in turns for text in ("\n".join(turn.content for turn in t[:-1]), t[-1].content)]


def repeated(file: Path, folder: Path, copies: int) -> Path:
    """A file of as many copies, each row of which begins with the number of its copy."""
    large = folder / file.name
    rows = (
        pq.read_table(file).to_pylist() if file.suffix == ".parquet" else map(json.loads, file.open(encoding="utf-8"))
    )
    rows = list(rows)
    varied = (numbered(row, i) for i in range(copies) for row in rows)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(varied)), large)
    else:
        large.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in varied), encoding="utf-8")
    return large


def numbered(row: dict[str, Any], number: int) -> dict[str, Any]:
    if "conversations" in row:
        first, *others = row["conversations"]
        return {"conversations": [{**first, "content": f"{number} {first['content']}"}, *others]}
    name = "prompt" if "prompt" in row else "text"
    return row | {name: f"{number} {row[name]}"}


LOADING = """
import re, sys
from pathlib import Path
from trainer.data import Order, TokenStore

store = TokenStore(Path(sys.argv[1]))
order = Order(len(store), 42, 0)
for first in range(0, len(store), max(32, len(store) // 300)):
    for i in order[first : first + 32]:
        store.tokens(i), store.spans(i)
print(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def loading(folder: Path, samples: int) -> int:
    """Anonymous bytes of a process that takes samples of a store of so many, over all of it."""
    store = folder / f"store-{samples}"
    store.mkdir()
    np.zeros(samples * LENGTH, np.uint16).tofile(store / "tokens")
    np.arange(0, (samples + 1) * LENGTH, LENGTH).tofile(store / "offsets")
    np.full((samples, 2), (4, 8), np.int32).tofile(store / "spans")
    np.arange(samples + 1).tofile(store / "span_offsets")
    return 1024 * int(python(LOADING, str(store)))


SECOND_START = """
import sys, time
import trainer.worker, trainer.preprocess
from autotune.errands import ERRAND
began = time.perf_counter()
trainer.preprocess.preprocess(ERRAND.validate_json(sys.argv[1]), lambda doing, rows: None)
print(time.perf_counter() - began)
"""


def second_start(data: Path, folder: Path) -> float:
    """Seconds that a worker takes to find its store, after its imports."""
    errand = Preprocess(
        model="tiny",
        tokenizer=str(data / "minimind/tokenizer"),
        dropout=None,
        freeze=(),
        data=(str(folder / "my_train_dataset_3k.parquet"), str(folder / "alpaca_zh_en_2k.jsonl")),
        validation=(),
        validation_split=0.01,
        stage=None,
        max_seq_len=512,
        max_target_len=512,
        limit=None,
        show=0,
        cache_dir=str(folder / "cache"),
    )
    if not (folder / "cache").exists():
        preprocess(errand, lambda *_: None)
    return float(python(SECOND_START, errand.model_dump_json()))


def python(program: str, argument: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program, argument], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
