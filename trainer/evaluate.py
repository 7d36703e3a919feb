"""Loss and perplexity of a data set: the true mean over its target tokens, whatever the batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from autotune.plan import Workload
from trainer.compiled import eagerly
from trainer.loss import loss_sum
from trainer.microbatch import MicroBatch
from trainer.step import autocast


@torch.no_grad()
def total_loss(model: Any, batches: Iterable[MicroBatch], workload: Workload, device: torch.device) -> Tensor:
    """Return the sum of the losses of all targets, in fp64; the model is in evaluation mode afterwards."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        with autocast(device, workload.precision), eagerly(workload.compile):
            total += loss_sum(model, batch.to(device), workload.loss_head)
    return total


def perplexity(loss: float) -> float:
    """Return e to the loss, infinite where that is no number of the machine's."""
    return math.exp(loss) if loss < 700 else math.inf
