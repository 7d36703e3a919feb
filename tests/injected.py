"""What goes wrong while a small run trains: memory that is not there, numbers that are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from small_runs import VOCABULARY, Rows, going_on, of_kind, run, stopping_at

from autotune.errands import Train
from trainer import checkpoint
from trainer import ranks as ranks_module
from trainer.loop import train
from trainer.ranks import ALONE, Ranks

Condition = Callable[[Rows], AbstractContextManager[object]]


def run_while(errand: Train, condition: Condition, ranks: Ranks = ALONE) -> Rows:
    """Train under a condition that sees the rows that there are; they are all there after an error too."""
    Path(errand.output_dir).mkdir(exist_ok=True)
    rows: Rows = []
    with condition(rows):
        for row in train(errand, lambda: False, ranks):
            rows.append(row)  # the condition looks at them
    return rows


@contextmanager
def memory_runs_out(when: Callable[[int, bool], bool], *, backward: bool = False) -> Iterator[list[int]]:
    """Have the allocator fail as a model embeds, or in the backward; `when` is told of rows, and of training."""
    failed: list[int] = []

    def fail(count: int) -> None:
        failed.append(count)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def pass_by(module: Any, args: Any, output: Any) -> None:
        if type(module) is not torch.nn.Embedding or module.num_embeddings != VOCABULARY:
            return
        count = len(args[0])
        if when(count, module.training):
            if backward:
                output.register_hook(lambda _: fail(count))
            else:
                fail(count)

    hook = torch.nn.modules.module.register_module_forward_hook(pass_by)
    try:
        yield failed
    finally:
        hook.remove()


@dataclass(frozen=True)
class Shortage:
    """Memory that is not there on some ranks after so many steps of a run.

    In forward, backward and evaluation there is none for more than four rows from then on; in the sum over ranks and
    in a save there is none once.
    """

    where: str
    after: int
    ranks: tuple[int, ...] = (0,)

    def on(self, rank: int, before: Rows) -> Condition:
        """What it is on one rank, in a run that goes on from one whose rows these are."""
        return lambda rows: self._strike(rank, lambda: len(of_kind([*before, *rows], "train")), rows)

    @contextmanager
    def _strike(self, rank: int, done: Callable[[], int], rows: Rows) -> Iterator[None]:
        if rank not in self.ranks:
            yield
        elif self.where in ("sum", "save"):
            owner, name = (ranks_module, "_room_to_add") if self.where == "sum" else (checkpoint, "save_file")
            with patch.object(owner, name, self._once(getattr(owner, name), done)):
                yield
        else:

            def when(count: int, training: bool) -> bool:
                began = bool(of_kind(rows, "started"))
                return began and count > 4 and training == (self.where != "evaluation") and done() >= self.after

            with memory_runs_out(when, backward=self.where == "backward"):
                yield

    def _once(self, work: Callable[..., Any], done: Callable[[], int]) -> Callable[..., Any]:
        failed: list[int] = []

        def fail_once(*arguments: Any) -> Any:
            if done() < self.after or failed:
                return work(*arguments)
            failed.append(done())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        return fail_once


def run_struck(errand: Train, shortage: Shortage, resumed_at: int = 0, ranks: Ranks = ALONE) -> Rows:
    """Train, first to a stop at a step if there is one, and from then on with less memory."""
    before = run(errand, stopping_at(resumed_at), ranks) if resumed_at else []
    return before + run_while(going_on(errand) if before else errand, shortage.on(ranks.rank, before), ranks)


@contextmanager
def not_a_number(step: int, where: str, rows: Rows, until: int = 1) -> Iterator[None]:
    """Put NaN into an activation, the loss, or one gradient of so many steps."""

    def poison(module: Any, args: Any, output: Any) -> Any:
        now = len(of_kind(rows, "train")) + 1
        wanted = torch.nn.Linear if where != "activation" else torch.nn.Embedding
        if type(module) is not wanted or not module.training or not step <= now < step + until:
            return None
        if where == "gradient":
            output.register_hook(lambda gradient: gradient * float("nan"))
            return None
        return output * float("nan")

    hook = torch.nn.modules.module.register_module_forward_hook(poison)
    try:
        yield
    finally:
        hook.remove()
