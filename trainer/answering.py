"""How long a model takes to answer rows of its data: what an evaluation's answers will cost, by a few tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from autotune.errands import TokenIds
from autotune.plan import Answering, Workload
from trainer.data import TokenStore
from trainer.evaluate import most_new, question
from trainer.generate import Generator, in_batches

TOKENS = (2, 10)
"""Of two answers: the second one's further tokens are what a token takes."""
REPEATS = 2
READING_SECONDS = 1.0
"""That the prompts of the rows which are timed together may take to be read."""


def measure_answering(
    model: Any, store: TokenStore, workload: Workload, rows: Sequence[int], room_bytes: float, seconds_per_token: float
) -> Answering | None:
    """Time the next token of one row and of many, halfway into their answers; None where not even one has room.

    `seconds_per_token` is what reading a token takes. The model is in evaluation mode afterwards.
    """
    never_ends = TokenIds(pad=0, eos=workload.vocabulary_size, bos=0)
    generator = Generator(model, never_ends, workload, room_bytes)
    asked = [question(store, i, workload) for i in rows]
    longest = max(len(q.reference or ()) for q in asked)
    lengths = [(len(q.prompt), most_new(workload, q, longest)) for q in asked]
    batches = list(in_batches(lengths, room_bytes, np.inf, generator.row_bytes))
    if not batches:
        return None
    prompt_tokens = float(np.mean([prompt for prompt, _ in lengths]))
    # What a token takes grows with those behind it; of a decoder the prompt is one of them.
    behind = longest // 2 + (0 if workload.task == "seq2seq" else max(lengths)[0])
    read = max(prompt_tokens, behind)
    several = max(1, min(len(batches[0]), int(READING_SECONDS / (seconds_per_token * read))))
    prompts = [q.prompt for q in asked[:several]]
    one = _seconds_of_token(generator, model, prompts[:1], behind)
    many = _seconds_of_token(generator, model, prompts, behind) if several > 1 else one + seconds_per_token
    return Answering(
        rows_at_once=max(len(batch) for batch in batches),
        prompt_tokens=prompt_tokens,
        longest_answer=max(1, max(new for _, new in lengths)),
        seconds_of_token=one,
        seconds_of_further_row=max(0.0, many - one) / max(1, several - 1),
    )


def _seconds_of_token(generator: Generator, model: Any, prompts: list[list[int]], behind: int) -> float:
    """Return what a further token of each of these rows takes, with so many behind it; the first time warms up."""
    few, many = (min(_seconds(generator, model, prompts, behind, new) for _ in range(REPEATS)) for new in TOKENS)
    return max(0.0, many - few) / (TOKENS[1] - TOKENS[0])


def _seconds(generator: Generator, model: Any, prompts: list[list[int]], behind: int, new: int) -> float:
    began = time.perf_counter()
    generator.go_on(model, prompts, max(1, behind), new)
    return time.perf_counter() - began
