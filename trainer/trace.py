"""The trace: the real step under fake tensors. Peak bytes of each phase, of what, and the work, without hardware.

Every operator runs as it will in training, on tensors that have a shape and no memory; a storage is counted from when
it is made to when it is freed. Tensors are fake ones of the processor, whatever the device: a torch without CUDA cannot
differentiate fake `cuda` tensors. What hardware and libraries hold besides tensors is not the trace's affair.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from autotune.batching import PADDING_MULTIPLE
from autotune.errands import Trace, TraceReport
from autotune.plan import Traced, Work, Workload
from trainer.attention import attention_of_processors
from trainer.attention_of_cards import attention_of_cards
from trainer.evaluate import totals
from trainer.memory import PeakMeter
from trainer.microbatch import MicroBatch, SpecialTokens, WorstCase, collate
from trainer.model import build_for
from trainer.step import TrainState, accumulate, start, update

CPU = torch.device("cpu")
aten = torch.ops.aten
# torch counts attention for the kernels of cards alone; shapes are those of query, key and value.
register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)(
    lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
)
register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)(
    lambda out, query, key, value, *_, **__: sdpa_backward_flop_count(out, query, key, value)  # type: ignore[no-untyped-call]
)
# Ours, as if each block saw all keys: what it sees is not known of fake tensors.
register_flop_formula(torch.ops.chatlm.attend)(
    lambda query, key, value, *_, **__: sdpa_flop_count(query, *_for_each_head(query, key, value))  # type: ignore[no-untyped-call]
)
register_flop_formula(torch.ops.chatlm.attend_backward)(
    lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(  # type: ignore[no-untyped-call]
        [gradient[at] for at in (0, 2, 1, 3)], query, *_for_each_head(query, key, value)
    )
)
RATE, CLIP = 1e-4, 1.0


def _for_each_head(query: Sequence[int], *shared: Sequence[int]) -> list[list[int]]:
    """Return the shapes of keys or values as if no heads shared them."""
    return [[rows, query[1], *rest] for rows, _, *rest in shared]


def trace(errand: Trace) -> Iterator[TraceReport]:
    """Trace each workload's step at each size, and say what this process held before there was a model."""
    process = PeakMeter(CPU).held_bytes()
    for workload in errand.workloads:
        ledger = Ledger()
        of_cards = errand.device == "cuda"
        attention = attention_of_cards(workload, errand.fast_bf16) if of_cards else attention_of_processors()
        with attention, FakeTensorMode() as fake, ledger:
            step = _TracedStep(workload, fake, ledger)
            traced = tuple(step.at(rows) for rows in errand.micro_batch_sizes)
        yield TraceReport(process_bytes=process, traced=traced)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live storages by what they are for, and remembers the most there were since the last reset.

    Beside them it counts the work. `kind` is what is being made; what a backward makes is temporary, unless it is said
    to be a gradient.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = "weights"
        self._entries: dict[int, tuple[str, int]] = {}
        self._live: Counter[str] = Counter()
        self._total = self.peak_bytes = 0
        self.items: dict[str, int] = {}
        self.operators = self.flops = self.moved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count what it made and what there was to do."""
        made = func(*args, **kwargs or {})
        results = [value for value in tree_iter(made) if isinstance(value, Tensor)]
        fresh = [self.count(tensor) for tensor in results]
        if any(fresh) or func._schema.is_mutable:  # else it is a view, or a question
            self._add_work(func.overloadpacket, args, kwargs or {}, made, results)
        return made

    def _add_work(self, operator: Any, args: Any, kwargs: Any, made: Any, results: list[Tensor]) -> None:
        """Add flops where they are known to dominate (as torch.utils.flop_counter counts them), else bytes moved."""
        self.operators += 1
        if operator in flop_registry:
            self.flops += flop_registry[operator](*args, **kwargs, out_val=made)
        else:
            read = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
            # An operator that returns nothing has written what it was given.
            self.moved_bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*read, *(results or read)))

    def count(self, tensor: Tensor) -> bool:
        """Enter a tensor's storage; say whether it is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries:
            return False
        # In a backward no code of ours runs that could say what is made.
        kind = self.kind if torch._C._current_graph_task_id() == -1 else "temporaries"
        self._enter(key, kind, storage.nbytes())
        weakref.finalize(storage, self._strike, key).atexit = False
        if self._total > self.peak_bytes:
            self._note_peak()
        return True

    def reset(self) -> None:
        """Start a new peak at what is live now, and a new account of work."""
        self.operators = self.flops = self.moved_bytes = 0
        self._note_peak()

    def work(self) -> Work:
        """Return the work since the last reset."""
        return Work(operators=self.operators, flops=self.flops, moved_bytes=self.moved_bytes)

    def _note_peak(self) -> None:
        self.peak_bytes, self.items = self._total, {kind: size for kind, size in self._live.items() if size}

    def rename(self, tensor: Tensor, kind: str) -> None:
        """Say what a tensor has turned out to be for."""
        key = tensor.untyped_storage()._cdata
        self._enter(key, kind, self._strike(key))

    def _enter(self, key: int, kind: str, size: int) -> None:
        self._entries[key] = (kind, size)
        self._live[kind] += size
        self._total += size

    def _strike(self, key: int) -> int:
        kind, size = self._entries.pop(key)
        self._live[kind] -= size
        self._total -= size
        return size

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Count what is made inside as this."""
        before, self.kind = self.kind, kind
        yield
        self.kind = before


@dataclass
class _TracedStep:
    """A model and its optimizer as in a run that goes on: moments are made, and a micro-batch's gradients are held."""

    workload: Workload
    fake: FakeTensorMode
    ledger: Ledger

    def __post_init__(self) -> None:
        model = build_for(self.workload, None, CPU, weights=False)
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.register_post_accumulate_grad_hook(lambda p: self.ledger.rename(p.grad, "gradients"))
        model.get_output_embeddings().register_forward_pre_hook(self._at_the_head)
        self.state: TrainState = start(model, self.workload, weight_decay=0.1)
        longest = max(self.workload.max_seq_len, self.workload.max_target_len)
        self._short = self._batch(1, PADDING_MULTIPLE / longest)
        self._accumulate(self._short)
        self._update(making="optimizer_state")

    def at(self, rows: int) -> Traced:
        """Trace one size: the micro-batch that meets gradients, the optimizer, an evaluation batch."""
        batch = self._batch(rows, 1.0)
        phases: dict[str, int] = {}
        items: dict[str, int] = {}
        work: dict[str, Work] = {}
        self._accumulate(self._short)  # whose gradients the batch meets
        runs: dict[str, Callable[[], None]] = {
            "forward_backward": lambda: self._accumulate(batch),
            "optimizer": self._update,
            "evaluation": lambda: self._evaluate(batch),
        }
        for name, run in runs.items():
            self.ledger.reset()
            run()
            if self.ledger.peak_bytes >= max(phases.values(), default=0):
                items = self.ledger.items
            phases[name], work[name] = self.ledger.peak_bytes, self.ledger.work()
        return Traced(
            micro_batch_size=rows,
            phases=phases,
            items=items,
            work=work["forward_backward"],
            update=work["optimizer"],
        )

    def _accumulate(self, batch: MicroBatch) -> None:
        with self.ledger.making("activations"):
            self._loss = accumulate(self.state, [batch], 1, self.workload)

    def _update(self, making: str = "temporaries") -> None:
        with self.ledger.making(making):
            update(self.state, self._loss, self.workload, RATE, CLIP)

    def _evaluate(self, batch: MicroBatch) -> None:
        with self.ledger.making("activations"):
            totals(self.state.model, [batch], self.workload, CPU)

    def _at_the_head(self, *_: Any) -> None:
        self.ledger.kind = "logits_and_loss"

    def _batch(self, rows: int, share: float) -> MicroBatch:
        whole = [[row] for row in range(rows)]
        real = collate(whole, WorstCase(self.workload, share), self.workload, SpecialTokens(0, 0))
        with self.ledger.making("inputs"):
            return replace(
                real,
                inputs={name: self._made(tensor) for name, tensor in real.inputs.items()},
                target_positions=self._made(real.target_positions),
                targets=self._made(real.targets),
            )

    def _made(self, tensor: Tensor) -> Tensor:
        made = self.fake.from_tensor(tensor)
        self.ledger.count(made)
        return made
