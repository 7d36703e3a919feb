"""Answers conversations word by word as they come: a model's own template, whole oldest turns dropped first."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from autotune.errands import Answered, Chat, Choosing, Conversation, TokenIds
from autotune.errors import ConfigurationError, DataError
from trainer.encode import Encoder, ids_of
from trainer.generate import Asked
from trainer.model import task_of
from trainer.records import Turn
from trainer.saved import open_model
from trainer.tokenizer import load_tokenizer

UNLIMITED = 2**30
PROMPT_TOKENS = 512
"""Of a source at most, for a model that does not say how long its own were."""


class Chatter:
    """A model that answers, on its device."""

    def __init__(self, errand: Chat) -> None:
        self._choosing, self._device = errand.choosing, torch.device(errand.device)
        if errand.saved.tokenizer is None:
            raise ConfigurationError(
                f"{errand.saved.place}: a model without a tokenizer.json", "put its tokenizer there"
            )
        self._tokenizer = load_tokenizer(errand.saved.tokenizer)
        self.model = open_model(errand.saved, self._device)
        self._task = task_of(self.model.config)
        self._encoder = Encoder(self._tokenizer, self._task, errand.saved.stage, PROMPT_TOKENS, PROMPT_TOKENS)
        if self._task == "causal":
            self._encoder.template.check()
        self._ids = ids_of(self._tokenizer, self._task, errand.saved.stage)
        self._room = self._room_of_prompts(errand.longest_prompt)
        # In place of the model's own, of which generate() would take what is not said here: beams, penalties, lengths.
        self.model.generation_config = _how(self._choosing, self._ids, self.model.config)

    def answer(self, asked: Conversation, tell: Callable[[str], None], stop: Callable[[], bool]) -> Answered:
        """Answer, telling the words as they come, until an end token, the most tokens, or a stop that is asked for."""
        began, turns = time.perf_counter(), [Turn(*turn) for turn in asked.turns]
        try:
            prompt, dropped = self._encoder.question(turns, self._room)
        except DataError as error:  # of its template, which takes no such roles
            raise ConfigurationError(error.message) from None
        words = Words(self._tokenizer, tell)
        torch.manual_seed(self._choosing.seed)
        row = torch.tensor([prompt], device=self._device)
        with torch.no_grad():
            self.model.generate(
                input_ids=row,
                attention_mask=torch.ones_like(row),
                streamer=words,
                stopping_criteria=StoppingCriteriaList([Asked(stop)]),
            )
        ends = self._ids.eos if isinstance(self._ids.eos, tuple) else (self._ids.eos,)
        return Answered(
            text=words.text,
            tokens=len(words.tokens),
            seconds=time.perf_counter() - began,
            dropped=dropped,
            ended=bool(words.tokens) and words.tokens[-1] in ends,
        )

    def _room_of_prompts(self, longest: int | None) -> int:
        """Return the tokens that a prompt may have; raises ConfigurationError where an answer would leave none."""
        positions = getattr(self.model.config, "max_position_embeddings", None) or UNLIMITED
        room = int(positions) - self._choosing.max_new_tokens
        if self._task == "seq2seq" and room > 0:
            return min(longest or PROMPT_TOKENS, int(positions))
        if room < 1:
            raise ConfigurationError(
                f"{self._choosing.max_new_tokens} new tokens, and the model has {positions} positions in all",
                f"give --max-new-tokens {positions // 2}",
            )
        return room


def _how(choosing: Choosing, ids: TokenIds, config: Any) -> GenerationConfig:
    sampling = {"temperature": choosing.temperature, "top_p": choosing.top_p, "top_k": choosing.top_k}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=choosing.max_new_tokens,
        num_beams=1,
        use_cache=True,
        do_sample=choosing.temperature > 0,
        repetition_penalty=choosing.repetition_penalty,
        disable_compile=True,
        pad_token_id=ids.pad,
        bos_token_id=ids.bos,
        eos_token_id=list(ids.eos) if isinstance(ids.eos, tuple) else ids.eos,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        **(sampling if choosing.temperature > 0 else {}),
    )


class Words(BaseStreamer):
    """Takes tokens as they are generated, and tells their text: a character of several tokens when it is whole."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        self._tokenizer, self._tell = tokenizer, tell
        self._prompt_passed = False
        self.tokens: list[int] = []
        self.text = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then one token after the other."""
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        self.tokens += value.flatten().tolist()
        text = self._decoded()
        if not text.endswith("\ufffd"):
            self._say(text)

    def end(self) -> None:
        """Tell what is left."""
        self._say(self._decoded())

    def _say(self, text: str) -> None:
        if new := text[len(self.text) :]:
            self._tell(new)
        self.text = text

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))
