"""Blocks of rows -> shards of a store, in their order, by as many processes as there are cores. No torch.

A process does all that a block needs, so that reading JSON, templates and cuts are spread over the cores as tokenizing
is. The shards are the same for any number of processes.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from trainer.data import Packed, StoreFacts, StoreWriter, pack
from trainer.encode import Encoder
from trainer.records import Block, held_out, parse

AHEAD = 2
"""Blocks a process that are read before their turn: none waits, and memory is bounded."""
SMALL_BYTES = 2 * 2**20
"""Of files, up to which starting processes takes longer than they save."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Part:
    """Which rows a store takes: those that are held out by content, or the others."""

    share: float
    held_out: bool


@dataclass(frozen=True, slots=True)
class Shard:
    """What became of a block."""

    rows_read: int
    rows: int
    packed: Packed
    cuts: dict[str, int]
    longest: tuple[int, str]


def make_shard(encoder: Encoder, part: Part | None, block: Block) -> Shard:
    """Encode the rows of a block that belong to this part."""
    encoder.cuts.clear()
    encoder.longest = (0, "")
    records = [r for r in parse(block) if part is None or held_out(r, part.share) == part.held_out]
    packed = pack(list(encoder.encode(records)), len(encoder.tokenizer))
    return Shard(block.rows, len(records), packed, dict(encoder.cuts), encoder.longest)


def make_shards(encoder: Encoder, part: Part | None, blocks: Iterable[Block], processes: int) -> Iterator[Shard]:
    """Yield the shard of each block, in their order; raises the first error of a row."""
    if processes == 1:
        for block in blocks:
            yield make_shard(encoder, part, block)
        return
    waiting: deque[Future[Shard]] = deque()
    with ProcessPoolExecutor(processes, get_context("fork"), _begin, (encoder, part, os.getpid())) as pool:
        pool.submit(int).result()  # all are forked before a file is opened
        try:
            for block in blocks:
                waiting.append(pool.submit(_make, block))
                if len(waiting) > AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def useful_processes(size: int) -> int:
    """Return how many processes data of this size is worth; one where processes cannot be forked safely."""
    cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    return cores if sys.platform.startswith("linux") and size > SMALL_BYTES else 1


def append(writer: StoreWriter, shard: Shard) -> StoreFacts:
    """Write a shard behind what is there; returns what there is now."""
    facts = writer.facts
    writer.append(shard.packed)
    facts.rows_read += shard.rows_read
    facts.rows += shard.rows
    facts.cuts.update(shard.cuts)
    if shard.longest[0] > facts.longest[0]:
        facts.longest = shard.longest
    return facts


def _begin(encoder: Encoder, part: Part | None, parent: int) -> None:
    """Begin a process: it inherits the tokenizer, encodes on one core, and ends with its parent."""
    global _job
    _job = (encoder, part)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # what was inherited is no garbage, and need not be looked through
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


_job: tuple[Encoder, Part | None]
"""What a forked process was begun with: an executor hands over no more than a function and its arguments."""


def _make(block: Block) -> Shard:
    return make_shard(*_job, block)
