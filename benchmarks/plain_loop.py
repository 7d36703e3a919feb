"""A plain loop, without any of our features: padded rows, autocast, AdamW; compiled on a card. Run by `train.py`.

python plain_loop.py ERRAND     the errand is JSON: see `train.their_errand`
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

sys.path.append(str(Path(__file__).parent.parent))
from trainer.memory import PeakMeter


def main() -> None:
    errand, meter = json.loads(sys.argv[1]), PeakMeter(device := torch.device(DEVICE))
    rows = [json.loads(line) for line in Path(errand["rows"]).read_text("utf-8").splitlines()]
    kind = AutoModelForSeq2SeqLM if errand["task"] == "seq2seq" else AutoModelForCausalLM
    model: Any = kind.from_pretrained(errand["model"], dtype=torch.float32)
    model = model.to(device).train()
    run = torch.compile(model, dynamic=True) if device.type == "cuda" else model
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": errand["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, errand["learning_rate"], errand["betas"], fused=True)
    warm_up, precision = errand["warm_up"], errand["precision"]
    effective, size = errand["effective_batch_size"], errand["micro_batch_size"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(42)).tolist()
    steps = [order[i : i + effective] for i in range(0, len(rows), effective)][: errand["steps"]]
    ends, tokens, computed = [], [], []
    meter.reset()
    for ids in steps:
        targets = sum(label != -100 for i in ids for label in rows[i]["labels"])
        tokens.append(sum(len(rows[i]["input_ids"]) + seq2seq(errand) * len(rows[i]["labels"]) for i in ids))
        computed.append(0)
        for i in range(0, len(ids), size):
            batch = padded([rows[j] for j in ids[i : i + size]], device)
            computed[-1] += batch["input_ids"].numel() + seq2seq(errand) * batch["labels"].numel()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = run(**batch, use_cache=False).loss  # a mean: back to a sum by what this micro-batch predicts
            (loss * predicted(batch, errand) / targets).backward()
        clip_grad_norm_(model.parameters(), errand["clip"])
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    model.save_pretrained(errand["folder"])
    print(json.dumps({
        "seconds": ends[-1] - ends[warm_up - 1], "tokens": sum(tokens[warm_up:]),
        "computed_tokens": sum(computed[warm_up:]), "all_tokens": sum(tokens), "steps": len(ends),
        "peak_bytes": meter.peak_bytes(),
        "how": {"micro_batch_size": size, "precision": precision, "compiled": run is not model},
    }))  # fmt: skip


def seq2seq(errand: dict[str, Any]) -> bool:
    return bool(errand["task"] == "seq2seq")


def predicted(batch: dict[str, torch.Tensor], errand: dict[str, Any]) -> torch.Tensor:
    """A causal model predicts what is to the right, so its first label counts for nothing."""
    return batch["labels"][:, 0 if seq2seq(errand) else 1 :].ne(-100).sum()


def padded(rows: list[dict[str, list[int]]], device: torch.device) -> dict[str, torch.Tensor]:
    columns = {name: [torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels")}
    fill = {"input_ids": 0, "labels": -100}
    batch = {name: pad_sequence(parts, True, fill[name]) for name, parts in columns.items()}
    batch["attention_mask"] = pad_sequence([torch.ones_like(part) for part in columns["input_ids"]], True)
    return {name: tensor.to(device) for name, tensor in batch.items()}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if __name__ == "__main__":
    main()
