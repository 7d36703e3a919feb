"""What the ranks of a run agree on: gradients, verdicts, counts. The only room that knows torch.distributed.

No wrapper around the model: every rank accumulates by itself, all agree on the host how it went, then gradients are
added once, in flat buckets. So a rank without a sample, a parameter that is frozen and a step that is undone are no
special cases. One rank agrees with itself, at no cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.batching import share_of

BUCKET_BYTES = 32 * 2**20
"""Of gradients that are added together: few enough to be held twice, enough to be worth a message."""


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

    def _agree(self, values: Sequence[float], how: Any) -> list[float]:
        if self.world_size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(agreed, how, group=self.host)
        agreed_values: list[float] = agreed.tolist()
        return agreed_values

    @torch.no_grad()
    def add_gradients(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Add the gradients of all ranks in place, and return the sum of their losses.

        A rank without samples adds zeros; a parameter that had no gradient on any rank has none afterwards.
        """
        if self.world_size == 1:
            return loss
        held = self.any(*(p.grad is not None for p in parameters))
        reached = [p for p, anywhere in zip(parameters, held, strict=True) if anywhere]
        for p in reached:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets(reached):
            flat = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
            dist.all_reduce(flat)
            for p, added in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                assert p.grad is not None
                p.grad.copy_(added.view_as(p.grad))
        loss = loss.clone()
        dist.all_reduce(loss)
        return loss


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
