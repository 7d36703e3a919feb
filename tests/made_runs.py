"""Folders of runs as a trainer leaves them, made by hand: for what reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import facts

from autotune.errands import DataSummary
from cli.history import RunData
from cli.runs import write_run
from profiles import resolve

GIB = 2**30
PROMPT = "<script>alert('提示')</script> \u202egnp.exe & https://example.com/?q=1"
"""What data may hold: markup, what turns words around, an address."""


def data_summary(**changes: Any) -> DataSummary:
    """Two thousand short samples and a few long ones."""
    facts_ = {
        "files": ("对话.parquet",), "store": "store", "fingerprint": "a91b", "contents": "77", "stage": "sft",
        "rows": 2010, "samples": 2010, "tokens": 125_120, "target_tokens": 90_000,
        "lengths": (((37, 1000), (83, 1000), (512, 10)),), "longest_row": (700, "对话.parquet:5"),
        "cuts": {"answer_cut": 10}, "unknown_share": 0.0,
    }  # fmt: skip
    return DataSummary.model_validate(facts_ | changes)


def step_row(step: int, **changes: Any) -> dict[str, Any]:
    """A step of a run whose loss falls, with some noise."""
    seconds = 0.31 + 0.02 * math.sin(step)
    row = {
        "kind": "train", "step": step, "epoch": 1, "loss": 2 + 6 / (1 + step / 20) + 0.1 * math.sin(7 * step),
        "learning_rate": 1e-4 * math.exp(-step / 300), "gradient_norm": 1.2 + 0.4 * math.cos(3 * step), "samples": 240,
        "tokens": 14_000 + step % 7 * 100, "target_tokens": 11_000, "padded_tokens": 15_000, "micro_batches": 12,
        "data_seconds": 0.002, "peak_memory_bytes": min(4 + step / 20, 4.9) * GIB, "seconds": seconds,
        "tokens_per_second": (14_000 + step % 7 * 100) / seconds, "model_flops_utilization": 0.33,
    }  # fmt: skip
    return row | changes


def event(kind: str, step: int, **values: Any) -> dict[str, Any]:
    """An event as a run writes it."""
    return {"kind": "event", "event": kind, "step": step} | values


def validation(step: int, loss: float | None) -> dict[str, Any]:
    """An evaluation that took a second and a half."""
    return {
        "kind": "validation", "step": step, "loss": loss, "perplexity": loss and math.exp(loss), "accuracy": 0.31,
        "samples": 100, "bleu": 3.2, "bleu_rows": 64, "generation_seconds": 1.0, "peak_memory_bytes": 5 * GIB,
        "best": True, "seconds": 1.5,
    }  # fmt: skip


def a_course(steps: int) -> list[dict[str, Any]]:
    """All that may happen: a stop and going on, a leap, a step that was skipped, memory that ran out, an early end."""
    half = steps // 2
    rows: list[dict[str, Any]] = [
        event("verified", 0, layout="packed", asked="packed", errors={"packed": 2.6e-7}),
        event("started", 0, total_steps=steps, samples=2010),
    ]
    for step in range(1, steps + 1):
        rows.append(step_row(step))
        if step == half:
            rows += [
                validation(step, 4.0),
                event("checkpoint", step, checkpoint="checkpoints/step-1", bytes=18_713_089, seconds=0.04),
                event("resumed", step, weights_only=False, damaged=[], checkpoint="c", verified_bytes=9, given_up=[],
                      changed=["learning_rate 1 -> 2"], same_plan=True),
                event("started", step, total_steps=steps, samples=2010),
            ]  # fmt: skip
        if step == half + 2:
            rows[-1] |= {"loss": None, "gradient_norm": None}
            rows += [
                event("skipped_step", step, samples=[1, 2], seconds=0.0),
                event("spike", step, loss=9.0, mean_loss=4.0, seconds=0.0),
                event("out_of_memory", step, where="step", message="CUDA out of memory", rows=20, rows_now=10),
            ]
    return [
        *rows,
        validation(steps, 3.5),
        event("finished", steps, model="runs/a/model", best_step=steps, best_loss=3.5),
    ]


def make_run(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """Write a run: its plan, its configuration, its data, these rows, and answers to a prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    resolved, plan = resolve({"epochs": 2.0, "data": ("对话.parquet",)}, None, "small"), facts.plan(**changes)
    kept = RunData(
        data=data_summary(), validation=data_summary(), padding={"packed": 0.04, "sorted": 0.2, "fixed": 0.6}
    )
    write_run(folder, resolved, resolved.settings, plan, None, kept.model_dump_json())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    answers = [{"step": step, "prompt": PROMPT, "answer": f"<b>{step}</b>", "reference": "好"} for step in range(1, 30)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    return folder
