"""Tokens out of a model: greedy, with a cache of keys and values, many prompts at a time within so many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from autotune.errands import TokenIds
from autotune.plan import Plan, Workload
from trainer.compiled import eagerly
from trainer.step import autocast

FP32_BYTES = 4
WIDEST = 8
"""Activations of a layer's widest kind that live at once while a prompt is read: 4 were counted (Llama's gated MLP)."""
CACHES = 2
"""What a cache comes to at its peak: it is copied as it grows, and heads that share keys take them apart."""
LOGITS = 3
"""Of each row: as computed, in fp32, and what the choice makes of them."""

BEYOND_PEAK_BYTES = 32 * 2**20
"""Taken beyond the peak: the steps of a model of a few megabytes leave no room to speak of."""


def room_to_generate(plan: Plan) -> int:
    """Return the bytes of the plan's peak that are free between two steps, and a little more where the budget has it.

    Weights, moments and the process stay, and so does what an allocator keeps; gradients and activations are gone. In
    half precision the weights are held once more while they are used.
    """
    memory, staying = plan.memory, ("weights", "optimizer_state", "process", "allocator")
    free = sum(size for name, size in memory.items.items() if name not in staying)
    beyond = memory.budget_bytes - (memory.measured_peak_bytes or memory.predicted_peak_bytes or 0)
    copies = 0 if plan.workload.precision == "fp32" else 2 * plan.workload.parameters
    return free + max(0, min(beyond, BEYOND_PEAK_BYTES)) - copies


@dataclass(frozen=True)
class RowBytes:
    """What a row holds while it is generated, at most: counted from the model's widths and the cache that it keeps."""

    prompt_cache: float
    """Of a token of the prompt."""
    new_cache: float
    """Of a token of the answer."""
    width: int
    heads: int
    vocabulary_size: int

    def __call__(self, prompt: int, new: int) -> float:
        """Count a row of so many tokens of each: its cache, a layer's work on its prompt, scores, logits."""
        cache = CACHES * (self.prompt_cache * prompt + self.new_cache * new)
        reading = WIDEST * self.width * prompt + self.heads * prompt * prompt
        return cache + FP32_BYTES * (reading + LOGITS * self.vocabulary_size)


class Generator:
    """Generates answers within `room_bytes`. Making one generates two tokens: a model that cannot is known at once.

    The model is in evaluation mode afterwards; nothing is drawn from a random generator.
    """

    def __init__(self, model: Any, ids: TokenIds, workload: Workload, room_bytes: float) -> None:
        self._ids, self._workload, self._room_bytes = ids, workload, room_bytes
        self._ends = {ids.eos} if isinstance(ids.eos, int) else set(ids.eos)
        self._seq2seq = bool(model.config.is_encoder_decoder)
        self.row_bytes = self._measure(model)

    def generate(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        most: Sequence[int],
        stop: Callable[[], bool] = lambda: False,
    ) -> list[list[int] | None]:
        """Return the answer to each prompt, in at most so many tokens, without its end; None where it has no room.

        Ends at the next token where a stop is asked for: answers are then cut off, or not there.
        """
        answers: list[list[int] | None] = [None] * len(prompts)
        # Decoders count the positions of a row's padding too, once it has ended.
        positions = inf if self._seq2seq else getattr(model.config, "max_position_embeddings", None) or inf
        lengths = [(len(prompt), new) for prompt, new in zip(prompts, most, strict=True)]
        for batch in in_batches(lengths, self._room_bytes, positions, self.row_bytes):
            if stop():
                break
            new = max(most[i] for i in batch)
            for i, row in zip(batch, self._run(model, [prompts[i] for i in batch], new, stop)[0], strict=True):
                answers[i] = self._until_end(row[: most[i]])
        return answers

    def _until_end(self, tokens: list[int]) -> list[int]:
        ended = next((at for at, token in enumerate(tokens) if token in self._ends), len(tokens))
        return tokens[:ended]

    def go_on(self, model: Any, prompts: Sequence[Sequence[int]], behind: int, new: int) -> None:
        """Give each row so many tokens more that has so many behind it, whatever they are: to see how long it takes."""
        if self._seq2seq:
            self._run(model, prompts, new, begun=behind)
        else:
            self._run(model, [np.resize(prompt, behind).tolist() for prompt in prompts], new)

    def _run(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        new: int,
        stop: Callable[[], bool] = lambda: False,
        begun: int = 0,
    ) -> tuple[list[list[int]], Any]:
        """Generate one batch; return what came after the prompts, and the cache. `begun` tokens go before, of T5."""
        model.eval()
        tokens, mask = self._padded(prompts)
        before = {"decoder_input_ids": torch.full((len(prompts), begun), self._ids.pad)} if begun else {}
        computed = autocast(model.device, self._workload.precision)
        with torch.no_grad(), _greedy(model, self._ids), computed, eagerly(self._workload.compile):
            made = model.generate(
                input_ids=tokens.to(model.device),
                attention_mask=mask.to(model.device),
                **{name: ids.to(model.device) for name, ids in before.items()},
                max_new_tokens=new,
                return_dict_in_generate=True,
                stopping_criteria=StoppingCriteriaList([Asked(stop)]),
            )
        start = 1 if self._seq2seq else tokens.shape[1]
        return made.sequences[:, start:].tolist(), getattr(made, "past_key_values", None)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Pad on the right for an encoder; on the left for a decoder, which goes on from the last position."""
        side = "right" if self._seq2seq else "left"

        def joined(rows: list[Tensor], fill: int) -> Tensor:
            return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)

        rows = [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompts]
        return joined(rows, self._ids.pad), joined([torch.ones_like(row) for row in rows], 0)

    def _measure(self, model: Any) -> RowBytes:
        """Look at the cache that one token and an answer of two leave: the last token generated is not in it."""
        _, cache = self._run(model, [[self._ids.pad]], 2)
        of_answer, of_prompt = (
            getattr(cache, "self_attention_cache", cache),
            getattr(cache, "cross_attention_cache", None),
        )
        new = _held(of_answer) / 2
        layers = [p for p in model.parameters() if p.ndim == 2 and len(p) != model.config.vocab_size]
        return RowBytes(
            prompt_cache=new if of_prompt is None else _held(of_prompt),
            new_cache=new,
            width=max((max(p.shape) for p in layers), default=0),
            heads=model.config.num_attention_heads,
            vocabulary_size=model.config.vocab_size,
        )


class Asked(StoppingCriteria):
    """Ends all rows at the next token, once a stop is asked for."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def __call__(self, ids: Any, _scores: Any, **_: Any) -> Any:
        """Say of each row whether it is at its end."""
        return torch.full((len(ids),), self._stop(), device=ids.device)


def in_batches(
    lengths: Sequence[tuple[int, int]], room_bytes: float, positions: float, row_bytes: Callable[[int, int], float]
) -> Iterator[list[int]]:
    """Yield indices of rows, given by the tokens of prompt and answer, to be generated together; longest prompts first.

    Each row is padded to the longest prompt, and goes on as long as the longest answer. Rows that do not fit by
    themselves are in no batch.
    """
    left = sorted(range(len(lengths)), key=lambda i: lengths[i][0], reverse=True)
    while left:
        batch: list[int] = []
        prompt, new = lengths[left[0]][0], 0
        for i in left:
            new = max(new, lengths[i][1])
            if prompt + new > positions or (len(batch) + 1) * row_bytes(prompt, new) > room_bytes:
                break
            batch.append(i)
        if batch:
            yield batch
        left = left[max(1, len(batch)) :]


def _held(cache: Any) -> int:
    """Return the bytes of a cache's tensors, over its layers."""
    layers = getattr(cache, "layers", ())
    return sum(t.nbytes for layer in layers for t in vars(layer).values() if isinstance(t, Tensor))


@contextmanager
def _greedy(model: Any, ids: TokenIds) -> Iterator[None]:
    """Put aside how a checkpoint says that it be generated from: sampling, penalties, lengths."""
    own = model.generation_config
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        use_cache=True,
        disable_compile=True,
        pad_token_id=ids.pad,
        bos_token_id=ids.bos,
        eos_token_id=list(ids.eos) if isinstance(ids.eos, tuple) else ids.eos,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    try:
        yield
    finally:
        model.generation_config = own
