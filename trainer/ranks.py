"""What the ranks of a run agree on: gradients, verdicts, counts. Only this room and `launch` know torch.distributed.

No wrapper around the model: every rank accumulates by itself, all agree on the host how it went, then gradients are
added once, in flat buckets. So a rank without a sample, a parameter that is frozen and a step that is undone are no
special cases. One rank agrees with itself, at no cost.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from autotune.batching import share_of
from trainer.memory import first_line, is_memory_error

BUCKET_BYTES = 32 * 2**20
"""Of gradients that are added together: few enough to be held twice, enough to be worth a message."""


BEATS = 6
"""Within the time after which a rank that gives no sign of life is given up."""
PATIENCE_SECONDS = 1800.0
"""Of a message between ranks that live: one may save a large model, or answer many prompts, while the others wait."""
LEFT = "left"
Result = TypeVar("Result")
LAUNCHER_HAS_STORE = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class PeerLostError(Exception):
    """Another rank is gone: a message to it failed."""


class MemoryRanOutError(Exception):
    """Memory ran out on some rank; says what its allocator said. All ranks raise it together."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone unless it is told otherwise."""

    rank: int = 0
    world_size: int = 1
    host: Any = None
    """The group that agrees on the host; None for the default one."""

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes, saves and answers."""
        return self.rank == 0

    def share(self, samples: Sequence[int]) -> Any:
        """Return this rank's part of a step's samples; parts differ by at most one."""
        before = sum(share_of(len(samples), self.world_size, rank) for rank in range(self.rank))
        return samples[before : before + share_of(len(samples), self.world_size, self.rank)]

    def most(self, *values: float) -> list[float]:
        """Return of each value the greatest that any rank has."""
        return self._agree(values, dist.ReduceOp.MAX)

    def total(self, *values: float) -> list[float]:
        """Return of each value the sum over all ranks."""
        return self._agree(values, dist.ReduceOp.SUM)

    def any(self, *verdicts: bool) -> list[bool]:
        """Return of each verdict whether any rank has come to it."""
        return [value > 0 for value in self.most(*map(float, verdicts))]

    def tell(self, text: str) -> str:
        """Return what the first rank says."""
        if self.world_size == 1:
            return text
        said = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if self.leads else torch.empty(0)
        (length,) = self.most(len(said) if self.leads else 0)
        if not self.leads:
            said = torch.empty(int(length), dtype=torch.uint8)
        _send(lambda: dist.broadcast(said, 0, group=self.host))
        return bytes(said.numpy()).decode()

    def together(self, work: Callable[[], Result]) -> Result:
        """Do this rank's part of what may run out of memory; where it does so on any, raise MemoryRanOutError on all.

        The part itself may not talk to other ranks: one that failed would not answer.
        """
        failed = ""
        try:
            done = work()
        except (RuntimeError, MemoryError) as error:
            if not is_memory_error(error):
                raise
            failed = first_line(error)  # and not the error, which holds the frames and their tensors
        if self.any(bool(failed))[0]:
            raise MemoryRanOutError(failed or "on another rank")
        return done

    def _agree(self, values: Sequence[float], how: Any) -> list[float]:
        if self.world_size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.float64)
        _reduce(agreed, how, self.host)
        agreed_values: list[float] = agreed.tolist()
        return agreed_values

    @torch.no_grad()
    def add_gradients(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Add the gradients of all ranks in place, and return the sum of their losses.

        A rank without samples adds zeros; a parameter that had no gradient on any rank has none afterwards. Raises
        MemoryRanOutError, on all ranks and before anything was added, where one has no room for what it takes.
        """
        if self.world_size == 1:
            return loss
        held = self.any(*(p.grad is not None for p in parameters))
        reached = [p for p, anywhere in zip(parameters, held, strict=True) if anywhere]
        buckets = list(_buckets(reached))
        room = self.together(lambda: _room_to_add(buckets))
        for bucket in buckets:
            gradients = [p.grad for p in bucket if p.grad is not None]
            flat = room[: sum(p.numel() for p in bucket)]
            torch.cat([gradient.flatten() for gradient in gradients], out=flat)
            _reduce(flat)
            for gradient, added in zip(gradients, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                gradient.copy_(added.view_as(gradient))
        loss = loss.clone()
        _reduce(loss)
        return loss


ALONE = Ranks()


def _reduce(tensor: Tensor, how: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
    _send(lambda: dist.all_reduce(tensor, how, group=group))


def _send(message: Callable[[], object]) -> None:
    try:
        message()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's have no type of their own
        raise PeerLostError(str(error)) from error


@contextmanager
def join(
    device: torch.device, backend: str | None, heartbeat_seconds: float, lost: Callable[[int], None]
) -> Iterator[Ranks]:
    """Join the ranks that the environment names, as torchrun and accelerate set it; alone where it names none.

    Gradients go by `backend`, by default nccl between cards and gloo between processors; verdicts by gloo. From a
    thread of its own `lost` is told of a rank that has given no sign of life for so many seconds.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    own = backend or ("nccl" if device.type == "cuda" else "gloo")
    patience = timedelta(seconds=max(PATIENCE_SECONDS, heartbeat_seconds))
    store, rank, world_size = next(rendezvous("env://", timeout=patience))
    if device.type == "cuda":  # not before: the first rank may be measuring what its card has free
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(own, store=store, rank=rank, world_size=world_size, timeout=patience)
    ranks = Ranks(rank, world_size, None if own == "gloo" else dist.new_group(backend="gloo", timeout=patience))
    beats = Heartbeat(store.clone(), ranks, heartbeat_seconds, lost)
    beats.start()
    try:
        yield ranks
        ranks.any(False)  # the one that has the store may not leave before the others
    finally:
        beats.leave()


class Heartbeat(threading.Thread):
    """Gives a sign of life of this rank in the store that all share, and looks for those of the others."""

    def __init__(self, store: Any, ranks: Ranks, seconds: float, lost: Callable[[int], None]) -> None:
        super().__init__(daemon=True)
        self._store, self._ranks, self._seconds, self._lost = store, ranks, seconds, lost
        self._leaving = threading.Event()
        store.set_timeout(timedelta(seconds=seconds))
        self._beat(0)

    def run(self) -> None:
        """Beat and look until this rank leaves."""
        others = [rank for rank in range(self._ranks.world_size) if rank != self._ranks.rank]
        seen, since = dict.fromkeys(others, ""), dict.fromkeys(others, time.monotonic())
        count = 0
        while not self._leaving.wait(self._seconds / BEATS):
            try:
                count += 1
                self._beat(count)
                now = {rank: self._store.get(f"beat {rank}").decode() for rank in others}
            except RuntimeError:  # whoever has the store is gone, or does not answer
                if not self._leaving.is_set() and not LAUNCHER_HAS_STORE:
                    self._lost(0)  # a launcher that is gone has told its ranks to save and leave
                return
            for rank, beat in now.items():
                if beat != seen[rank] or beat == LEFT:
                    seen[rank], since[rank] = beat, time.monotonic()
                elif time.monotonic() - since[rank] > self._seconds:
                    self._lost(rank)
                    return

    def leave(self) -> None:
        """Say that this rank has done its part."""
        self._leaving.set()
        try:
            self._store.set(f"beat {self._ranks.rank}", LEFT)
        except RuntimeError:  # so has the rank that has the store
            return

    def _beat(self, count: int) -> None:
        self._store.set(f"beat {self._ranks.rank}", str(count))


def _room_to_add(buckets: Sequence[Sequence[Tensor]]) -> Tensor:
    """Give each parameter a gradient; return a flat tensor that the largest bucket fits in."""
    for p in chain.from_iterable(buckets):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    like = next(chain.from_iterable(buckets), torch.empty(0))
    return like.new_empty(max((sum(p.numel() for p in bucket) for bucket in buckets), default=0))


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut parameters, in their order, into pieces of so many bytes."""
    bucket: list[Tensor] = []
    for p in parameters:
        if bucket and sum(q.nbytes for q in bucket) + p.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket
