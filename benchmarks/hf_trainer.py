"""transformers' Trainer on rows that are tokens already. Run by `train.py`, in an environment without chatlm.

    python hf_trainer.py ERRAND     the errand is JSON: see `train.errand_of`

Prints seconds and real tokens from the end of the first step to that of the last, and the most that was resident.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers as t

Row = dict[str, list[int]]


class Clock(t.TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def padded(rows: list[Row]) -> dict[str, torch.Tensor]:
    """What DataCollatorForSeq2Seq makes of rows: all as long as the longest, labels ignored where they are padding."""
    made = {}
    for name, fill in (("input_ids", 0), ("labels", -100)):
        longest = max(len(row[name]) for row in rows)
        made[name] = torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])
    longest = max(len(row["input_ids"]) for row in rows)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return made | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def main() -> None:
    errand = json.loads(sys.argv[1])
    rows = [json.loads(line) for line in Path(errand["rows"]).read_text(encoding="utf-8").splitlines()]
    kind = t.AutoModelForSeq2SeqLM if errand["seq2seq"] else t.AutoModelForCausalLM
    clock = Clock()
    trainer = t.Trainer(
        model=kind.from_pretrained(errand["model"], dtype=torch.float32),
        args=t.TrainingArguments(
            output_dir=errand["folder"], max_steps=errand["steps"], use_cpu=not torch.cuda.is_available(),
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, **errand["arguments"],
        ),
        train_dataset=rows,
        data_collator=padded,
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    # The order of samples is Trainer's own, so tokens are those of a mean step.
    tokens = sum(len(row["input_ids"]) + errand["seq2seq"] * len(row["labels"]) for row in rows) / len(rows)
    print(json.dumps({
        "seconds": clock.ends[-1] - clock.ends[0],
        "tokens": tokens * errand["effective_batch_size"] * (len(clock.ends) - 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
