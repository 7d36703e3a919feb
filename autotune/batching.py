"""Exact arithmetic of the effective batch: shares of ranks, and balanced cuts of a share. Pure.

Because the loss of a step is (sum of token losses) / (target tokens of the whole step over all ranks), any cut gives
the gradient of one big batch; so no size has to divide another.
"""

from __future__ import annotations

from math import ceil

from autotune.plan import Batching, Device, LimitedBy

PADDING_MULTIPLE = 8
"""Rows are padded to one: few shapes, and whole tiles for the matrix units."""
STARTING_TOKENS: dict[Device, int] = {"cpu": 256, "cuda": 4096}
"""What a micro-batch costs to begin, in tokens: a card could compute on thousands while its kernels are started."""


def share_of(samples: int, world_size: int, rank: int) -> int:
    """Return how many of a step's samples this rank takes; shares differ by at most one, the first ranks take more."""
    each, left = divmod(samples, world_size)
    return each + (rank < left)


def largest_share(samples: int, world_size: int) -> int:
    """Return the most samples that any rank takes of a step."""
    return share_of(samples, world_size, 0)


def balanced_cuts(samples: int, largest: int) -> list[int]:
    """Cut a share into the fewest micro-batches of at most `largest` rows, their sizes differing by at most one.

    Zero samples give no micro-batch.
    """
    if samples == 0:
        return []
    count = ceil(samples / largest)
    each, left = divmod(samples, count)
    return [each + (i < left) for i in range(count)]


def reach(
    effective_batch_size: int,
    world_size: int,
    micro_batch_size: int,
    largest_safe_micro_batch_size: int,
    limited_by: LimitedBy,
) -> Batching:
    """Say how micro-batches of at most `micro_batch_size` rows reach the effective batch on every rank."""
    cuts = balanced_cuts(largest_share(effective_batch_size, world_size), micro_batch_size)
    return Batching(
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=len(cuts),
        expected_micro_batches_per_step=float(len(cuts)),
        world_size=world_size,
        effective_batch_size=effective_batch_size,
        largest_safe_micro_batch_size=largest_safe_micro_batch_size,
        limited_by=limited_by,
    )


def balanced_size(share: int, largest: int) -> int:
    """Return the largest micro-batch of the balanced cut: 120 samples at most 23 at a time go 20 at a time."""
    return balanced_cuts(share, largest)[0]


def useful_sizes(share: int) -> list[int]:
    """Return the micro-batches worth having, rising: the largest of each balanced cut of a share.

    A size between two of them needs as many micro-batches as the smaller one. For 10: 1, 2, 3, 4, 5, 10.
    """
    sizes, size = [], share
    while size >= 1:
        sizes.append(size := balanced_size(share, size))
        size -= 1
    return sizes[::-1]
