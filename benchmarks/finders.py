"""Other people's batch finders on one model, each as its documentation shows it. Run by `peers.py`, in a process each.

    python finders.py FINDER ERRAND     the errand is JSON: see `peers.prepare`

Stands in an environment of its own, so it imports nothing of chatlm. Reports each forward with its rows, each
optimizer step, each exception that the finder takes for a lack of memory, the size found, and the effective batch
that it left.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as t
from reports import Reports
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset

Errand = dict[str, Any]
ROWS_OF_DATA = 4096

report = Reports()


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Worst-case rows: all at full length, every token a target."""

    def __init__(self, errand: Errand) -> None:
        self.length, self.vocabulary = errand["max_seq_len"], errand["vocabulary_size"]

    def __len__(self) -> int:
        return ROWS_OF_DATA

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(self.vocabulary, (self.length,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def load(errand: Errand) -> Any:
    """The model, each forward of which is reported."""
    model = t.AutoModelForCausalLM.from_pretrained(errand["model"])
    model.train()
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: report("forward", len(kwargs["input_ids"])), with_kwargs=True
    )
    return model


def observe(module: Any, name: str) -> None:
    """Report each exception that a finder's own test takes for a lack of memory."""
    is_memory: Callable[[BaseException], bool] = getattr(module, name)

    def observed(error: BaseException) -> bool:
        if found := is_memory(error):
            report("out_of_memory")
        return found

    setattr(module, name, observed)


def loop(errand: Errand, batch_size: int) -> None:
    """A usual training function: a model, AdamW, so many steps."""
    model = load(errand)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches: Iterator[dict[str, torch.Tensor]] = iter(DataLoader(Rows(errand), batch_size=batch_size, shuffle=True))
    for _ in range(errand["steps"]):
        with torch.autocast("cpu", torch.bfloat16, enabled=errand["precision"] == "bf16"):
            loss = model(**next(batches)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def plain(errand: Errand) -> tuple[int, int]:
    """No finder: the size that the errand names."""
    loop(errand, errand["size"])
    return errand["size"], 1


def accelerate(errand: Errand, **start: int) -> tuple[int, int]:
    """https://huggingface.co/docs/accelerate/usage_guides/memory"""
    from accelerate import Accelerator
    from accelerate.utils import find_executable_batch_size, memory

    observe(memory, "should_reduce_batch_size")
    accelerator = Accelerator(cpu=True, mixed_precision=errand["precision"].replace("fp32", "no"))

    @find_executable_batch_size(**start)
    def inner_training_loop(batch_size: int) -> int:
        accelerator.free_memory()
        model = load(errand)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        batches = DataLoader(Rows(errand), batch_size=batch_size, shuffle=True)
        model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
        for _, batch in zip(range(errand["steps"]), batches, strict=False):
            optimizer.zero_grad()
            accelerator.backward(model(**batch).loss)
            optimizer.step()
        return batch_size

    return inner_training_loop(), accelerator.gradient_accumulation_steps


def lightning(errand: Errand, mode: str) -> tuple[int, int]:
    """https://lightning.ai/docs/pytorch/stable/advanced/training_tricks.html#batch-size-finder"""
    import lightning.pytorch as pl
    from lightning.pytorch.tuner import Tuner, batch_size_scaling

    observe(batch_size_scaling, "is_oom_error")

    class Module(pl.LightningModule):
        def __init__(self, batch_size: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.batch_size = batch_size
            self.model = load(errand)

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

        def train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
            return DataLoader(Rows(errand), batch_size=self.batch_size, shuffle=True)

    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=errand["steps"], logger=False, enable_checkpointing=False,
        precision={"bf16": "bf16-mixed", "fp32": "32-true"}[errand["precision"]], default_root_dir=errand["folder"],
    )  # fmt: skip
    size = Tuner(trainer).scale_batch_size(module, mode=mode)
    report("found", size)
    trainer.fit(module)
    return size, trainer.accumulate_grad_batches


def trainer(errand: Errand) -> tuple[int, int]:
    """https://huggingface.co/docs/transformers/main_classes/trainer, `auto_find_batch_size`"""
    from accelerate.utils import memory

    observe(memory, "should_reduce_batch_size")
    arguments = t.TrainingArguments(
        output_dir=errand["folder"], auto_find_batch_size=True, max_steps=errand["steps"],
        per_device_train_batch_size=errand["effective_batch_size"], bf16=errand["precision"] == "bf16",
        use_cpu=True, optim="adamw_torch", report_to="none", save_strategy="no",
    )  # fmt: skip
    run = t.Trainer(model=load(errand), args=arguments, train_dataset=Rows(errand))
    run.train()
    return run.state.train_batch_size, arguments.gradient_accumulation_steps


FINDERS: dict[str, Callable[[Errand], tuple[int, int]]] = {
    "plain": plain,
    "accelerate, from its 128": accelerate,
    "accelerate, from 64": lambda errand: accelerate(errand, starting_batch_size=errand["effective_batch_size"]),
    "Lightning power": lambda errand: lightning(errand, "power"),
    "Lightning binsearch": lambda errand: lightning(errand, "binsearch"),
    "Trainer auto_find, from 64": trainer,
}
"""Each gives the size it found and the accumulation it left."""


if __name__ == "__main__":
    torch.manual_seed(42)
    register_optimizer_step_post_hook(lambda *_: report("step"))
    size, accumulation = FINDERS[sys.argv[1]](json.loads(sys.argv[2]))
    report("found", size)
    report("effective", size * accumulation)
