"""transformers' Trainer and TRL's SFTTrainer, on samples that are tokens already. Run by `train.py`, apart from chatlm.

    python hf_trainer.py ERRAND     the errand is JSON: see `train.their_errand`

Prints JSON: seconds and tokens of the steps after the first, the peak by chatlm's own meter, and what it was told.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
import transformers as t
from datasets import Dataset
from torch import Tensor
from transformers import trainer_pt_utils

sys.path.append(str(Path(__file__).parent.parent))
from trainer.memory import PeakMeter

Errand = dict[str, Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock(t.TrainerCallback):
    """When each step ended, and what the model was given until then."""

    def __init__(self, model: Any, warm_up: int) -> None:
        self.warm_up = warm_up
        self.meter = PeakMeter(DEVICE)
        self.given: list[tuple[int | Tensor, int]] = []
        self.ends: list[tuple[float, int]] = []
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _model: Any, _args: Any, inputs: dict[str, Any]) -> None:
        """Count real tokens, and all of them; on a card nothing is read back before the end."""
        seq2seq = "decoder_input_ids" in inputs
        computed = inputs["input_ids"].numel() + (inputs["labels"].numel() if seq2seq else 0)
        mask = inputs.get("attention_mask")
        real = computed if mask is None else mask.sum() + (inputs["labels"].ne(-100).sum() if seq2seq else 0)
        self.given.append((real, computed))

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.meter.reset()

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if DEVICE.type == "cuda" and state.global_step in (self.warm_up, state.max_steps):
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), len(self.given)))

    def measured(self) -> dict[str, Any]:
        """Return what is timed, and the tokens of the whole run, from which the caller sees that none is missing."""
        (began, first), (ended, last) = self.ends[self.warm_up - 1], self.ends[-1]
        real = [int(tokens) for tokens, _ in self.given]
        return {
            "seconds": ended - began,
            "tokens": sum(real[first:last]),
            "computed_tokens": sum(computed for _, computed in self.given[first:last]),
            "all_tokens": sum(real),
            "steps": len(self.ends),
            "peak_bytes": self.meter.peak_bytes(),
        }


def common(errand: Errand) -> dict[str, Any]:
    """Return what every trainer is told alike; all else is each one's own default."""
    return {
        "output_dir": errand["folder"], "num_train_epochs": 1, "max_steps": errand["steps"] or -1,
        "use_cpu": DEVICE.type == "cpu", "disable_tqdm": True, "save_strategy": "no",
        "learning_rate": errand["learning_rate"], "lr_scheduler_type": "constant", "adam_beta1": errand["betas"][0],
        "adam_beta2": errand["betas"][1], "weight_decay": errand["weight_decay"], "max_grad_norm": errand["clip"],
    }  # fmt: skip


def with_trainer(errand: Errand, model: Any, rows: Dataset) -> t.Trainer:
    """https://huggingface.co/docs/transformers/main_classes/trainer, with the padding collator of its examples."""
    tokenizer = t.AutoTokenizer.from_pretrained(errand["model"])
    size = errand["micro_batch_size"]
    sides = 2 if errand["task"] == "seq2seq" else 1
    lengths = [sum(map(len, (row["input_ids"], row["labels"])[:sides])) for row in rows]
    return t.Trainer(
        model=model,
        args=t.TrainingArguments(
            **common(errand), per_device_train_batch_size=size,
            gradient_accumulation_steps=errand["effective_batch_size"] // size, **errand["arguments"],
        ),
        train_dataset=rows.add_column("length", lengths),  # only `group_by_length` looks at it: of T5, both sides
        processing_class=tokenizer,
        data_collator=t.DataCollatorForSeq2Seq(tokenizer, model=model),
    )  # fmt: skip


def with_packing(errand: Errand, model: Any, rows: Dataset) -> t.Trainer:
    """https://huggingface.co/docs/trl/sft_trainer#packing, so many packed rows a step that there are as many steps.

    Its gradient checkpointing, on by default, is off, as ours is where memory is ample.
    """
    from trl import SFTConfig, SFTTrainer, pack_dataset

    packed = len(pack_dataset(rows, errand["max_seq_len"]))
    size = errand["micro_batch_size"]
    steps = ceil(len(rows) / errand["effective_batch_size"])
    accumulation = ceil(packed / steps / size)
    config = partial(
        SFTConfig, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, packing=True,
        max_length=errand["max_seq_len"], **errand["arguments"],
    )  # fmt: skip
    return SFTTrainer(
        model=model,
        args=config(**common(errand)),
        train_dataset=rows,
        processing_class=t.AutoTokenizer.from_pretrained(errand["model"]),
    )


def leak(trainer: t.Trainer, model: Any) -> float:
    """Return how far logits of samples that share a row are from those that each has alone, at most."""
    row = next(row for row in trainer.train_dataset if len(row["seq_lengths"]) > 1)
    batch = trainer.data_collator([row])
    batch.pop("labels")
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits[0].split(row["seq_lengths"])
        parts = torch.tensor(row["input_ids"]).split(row["seq_lengths"])
        alone = [model(input_ids=part[None], use_cache=False).logits[0] for part in parts]
    return max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True))


def group_as_on_large_data() -> None:
    """Have `group_by_length` sort 50 steps' samples at a time, as from 6400 on; of fewer it would sort fewer."""
    grouped = trainer_pt_utils.get_length_grouped_indices
    trainer_pt_utils.get_length_grouped_indices = partial(grouped, mega_batch_mult=50)


def main() -> None:
    errand = json.loads(sys.argv[1])
    group_as_on_large_data()
    rows = Dataset.from_list([json.loads(line) for line in Path(errand["rows"]).read_text("utf-8").splitlines()])
    kind = t.AutoModelForSeq2SeqLM if errand["task"] == "seq2seq" else t.AutoModelForCausalLM
    load = partial(kind.from_pretrained, errand["model"], dtype=torch.float32)
    model = load()
    packing = errand["trainer"] == "SFTTrainer"
    trainer = (with_packing if packing else with_trainer)(errand, model, rows)
    clock = Clock(model, errand["warm_up"])
    trainer.add_callback(clock)
    trainer.train()
    found = clock.measured()
    arguments = trainer.args
    found["how"] = {
        "micro_batch_size": arguments.per_device_train_batch_size,
        "accumulation": arguments.gradient_accumulation_steps,
        "samples_a_step": None if packing else errand["effective_batch_size"],
        "rows": len(trainer.train_dataset),
        "bf16": arguments.bf16,
        "optimizer": str(arguments.optim),
        "sampling": arguments.train_sampling_strategy,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "loader_workers": arguments.dataloader_num_workers,
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "leak": leak(trainer, load().eval()) if packing and errand["steps"] else None,
    }
    trainer.save_model(errand["folder"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
