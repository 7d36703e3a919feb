"""What a sample costs: random beside DuckDB's reservoir of the same file, and --smart with what was planted in it.

    python benchmarks/sample.py                             10 million rows, and 1 million; ten minutes, 10 GB of disk
    python benchmarks/sample.py --rows 200000 --smart 50000 --repeats 1      to see that it runs

Rows are made of pairs of CHATLM_REAL_DATA/chatlm_mini, each with words of its own, else of random letters. Ways
alternate; a ratio is the median of the pairs. Memory is the most that the process held, pages of libraries too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import string
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
CHATLM = "from cli import app; app()"
DUCKDB = """
import sys, duckdb
source, target, rows = sys.argv[1:]
duckdb.sql(f"COPY (SELECT * FROM '{source}' USING SAMPLE reservoir({rows} ROWS) REPEATABLE (1)) "
           f"TO '{target}' (FORMAT parquet, COMPRESSION zstd)")
"""
DRAWN = 0.3
PLANTED = 0.02
"""Share of rows that are copies, and again that are nearly such."""
PART = 50_000
LETTERS = string.ascii_lowercase + "的一是在不了有和人这中大为上个国我以要他时来用们生到作地"


def pairs() -> list[tuple[str, str]]:
    folder = os.environ.get("CHATLM_REAL_DATA")
    if not folder:
        generator = random.Random(0)
        texts = ["".join(generator.choices(LETTERS, k=generator.randint(20, 300))) for _ in range(6000)]
        return list(zip(texts[::2], texts[1::2], strict=True))
    table = pq.read_table(Path(folder) / "chatlm_mini" / "my_train_dataset_3k.parquet")
    found = zip(table["prompt"].to_pylist(), table["response"].to_pylist(), strict=True)
    return [(prompt, response) for prompt, response in found if response.endswith("。")]


def varied(pair: tuple[str, str], generator: random.Random) -> tuple[str, str]:
    """Put other letters in the places of two in three: as long, and no longer like the row it is made of."""

    def other(text: str) -> str:
        return "".join(c if not c.isalnum() or generator.random() < 1 / 3 else generator.choice(LETTERS) for c in text)

    return other(pair[0]), other(pair[1])


def make(file: Path, rows: int, *, planted: float = 0.0) -> dict[str, list[int]]:
    """Write rows; of those that are planted, return where they stand."""
    generator, source = random.Random(1), pairs()
    # Made one after another once, then put together anew: what differs is what a row is made of.
    base = [varied(pair, generator) for pair in source for _ in range(8)]
    where: dict[str, list[int]] = {"exact": [], "near": []}
    writer = None
    for start in range(0, rows, PART):
        made: list[tuple[str, str]] = []
        for number in range(start, min(start + PART, rows)):
            kind = generator.random() if made else 1.0
            earlier = generator.choice(made) if made else ("", "")
            if kind < planted:
                where["exact"].append(number)
                made.append(earlier)
            elif kind < 2 * planted and len(earlier[1]) >= 100:
                where["near"].append(number)
                at = generator.randrange(20, 80)
                made.append((earlier[0].upper(), earlier[1][:at] + "x" + earlier[1][at + 1 :] + " "))
            elif planted:
                made.append(varied(generator.choice(source), generator))
            else:
                prompt, response = generator.choice(base)
                made.append((prompt, f"{response} {number}"))
        part = pa.table({"prompt": [p for p, _ in made], "response": [r for _, r in made]})
        writer = writer or pq.ParquetWriter(file, part.schema)
        writer.write_table(part)
    assert writer is not None
    writer.close()
    return where


def timed(command: list[str]) -> tuple[float, int, float]:
    """Return wall seconds, the most bytes that it held, and processor seconds."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - began, used.ru_maxrss * 1024, used.ru_utime + used.ru_stime


def ours(source: Path, target: Path, rows: int, *more: str) -> list[str]:
    return [sys.executable, "-c", CHATLM, "sample", "--input", str(source), "--output", str(target),
            "--num-samples", str(rows), *more]  # fmt: skip


def at_random(folder: Path, rows: int, repeats: int) -> dict[str, Any]:
    source, wanted = folder / "rows.parquet", int(rows * DRAWN)
    make(source, rows)
    theirs = [str(PEERS), "-c", DUCKDB, str(source), str(folder / "duckdb.parquet"), str(wanted)]
    runs = [(timed(ours(source, folder / "ours.parquet", wanted)), timed(theirs)) for _ in range(repeats)]
    assert pq.read_metadata(folder / "ours.parquet").num_rows == wanted
    found = {
        "rows": rows, "drawn": wanted, "file_bytes": source.stat().st_size,
        "text_bytes": sum(c.total_uncompressed_size for c in columns(source)),
        "chatlm_seconds": median(mine[0] for mine, _ in runs), "duckdb_seconds": median(its[0] for _, its in runs),
        "ratio": median(mine[0] / its[0] for mine, its in runs),
        "chatlm_peak_bytes": max(mine[1] for mine, _ in runs), "duckdb_peak_bytes": max(its[1] for _, its in runs),
        "runs": runs,
    }  # fmt: skip
    source.unlink()
    return found


def columns(file: Path) -> list[Any]:
    metadata = pq.read_metadata(file)
    return [
        metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(metadata.num_columns)
    ]


def rows_of(file: Path) -> list[tuple[str, str]]:
    table = pq.read_table(file)
    return list(zip(table["prompt"].to_pylist(), table["response"].to_pylist(), strict=True))


def of_the_best(folder: Path, rows: int, repeats: int) -> dict[str, Any]:
    source, target, report = folder / "planted.parquet", folder / "best.parquet", folder / "report.json"
    where = make(source, rows, planted=PLANTED)
    runs = [timed(ours(source, target, rows, "--smart", "--report", str(report))) for _ in range(repeats)]
    told = json.loads(report.read_text())
    every, kept = (rows_of(file) for file in (source, target))
    left = set(kept)
    planted = np.zeros(rows, bool)
    planted[where["exact"] + where["near"]] = True
    distinct = [row for row, is_planted in zip(every, planted.tolist(), strict=True) if not is_planted]
    seconds = median(run[0] for run in runs)
    return {
        "rows": rows, "rows_per_second": rows / seconds, "seconds": seconds,
        "peak_bytes": max(run[1] for run in runs), "gone": told["gone"],
        "exact_planted": len(where["exact"]), "exact_removed": 1 - (len(kept) - len(left)) / len(where["exact"]),
        "near_planted": len(where["near"]),
        "near_removed": 1 - sum(every[i] in left for i in where["near"]) / len(where["near"]),
        "distinct_lost": sum(row not in left for row in distinct) / len(distinct),
        "runs": runs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--smart", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "command": " ".join(["python", "benchmarks/sample.py", *sys.argv[1:]]),
            "random": at_random(Path(name), asked.rows, asked.repeats),
            "smart": of_the_best(Path(name), asked.smart, asked.repeats),
        }
    for kind in ("random", "smart"):
        print(kind, {key: value for key, value in found[kind].items() if key != "runs"})
    (asked.results / "sample.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
