"""Generation: the same tokens in any batch, no setting of a checkpoint's, nothing drawn, within so many bytes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import facts
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import MODELS, VOCABULARY, build, workload
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from autotune.errands import TokenIds
from trainer.generate import Generator, in_batches, room_to_generate

IDS = TokenIds(pad=0, eos=1, bos=None)
ENDLESS = TokenIds(pad=0, eos=VOCABULARY, bos=None)
"""Ends at a token that there is not."""
ROOM = float(2**30)
FP32, BF16 = workload("llama"), workload("llama", precision="bf16")
"""Of a workload, generation knows the precision and whether its layers are compiled."""


NOISE = {"t5": 0.05, "bart": 1.0}


def prompts_of(count: int) -> list[list[int]]:
    random = np.random.Generator(np.random.PCG64(3))
    return [random.integers(2, VOCABULARY, random.integers(1, 20)).tolist() for _ in range(count)]


def model_of(family: str) -> Any:
    """A model with something to say: as made, these small ones repeat their input for ever."""
    model = build(family)
    if family == "bart":
        model.config.decoder_start_token_id = 2
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * NOISE.get(family, 0.3))
    return model


def by_hand(model: Any, prompt: list[int], most: int) -> list[int]:
    """The plainest greedy loop: the whole forward for each token, without a cache."""
    model.eval()
    answer: list[int] = []
    while len(answer) < most:
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                given = {"decoder_input_ids": torch.tensor([[model.config.decoder_start_token_id, *answer]])}
                logits = model(input_ids=torch.tensor([prompt]), **given).logits
            else:
                logits = model(input_ids=torch.tensor([prompt + answer])).logits
        token = int(logits[0, -1].argmax())
        if token == IDS.eos:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("family", MODELS)
def test_a_batch_gives_each_prompt_what_it_gets_alone_and_by_hand(family: str) -> None:
    model, prompts = model_of(family), prompts_of(9)
    most = [3, 30, 9, 30, 1, 30, 30, 12, 30]
    generator = Generator(model, IDS, FP32, ROOM)
    together = generator.generate(model, prompts, most)
    assert together == [by_hand(model, prompt, new) for prompt, new in zip(prompts, most, strict=True)]
    assert together == [generator.generate(model, [p], [n])[0] for p, n in zip(prompts, most, strict=True)]
    assert len({tuple(answer or ()) for answer in together}) > 3, "they do not all say the same"


def test_an_answer_ends_before_any_of_the_end_tokens() -> None:
    model, prompts = model_of("llama"), prompts_of(4)
    whole = Generator(model, ENDLESS, FP32, ROOM).generate(model, prompts, [20] * 4)
    assert all(answer and len(answer) == 20 for answer in whole)
    first, second = (whole[i] or [] for i in (0, 1))
    ends = (first[5], second[7])
    cut = Generator(model, TokenIds(pad=0, eos=ends, bos=None), FP32, ROOM).generate(model, prompts, [20] * 4)
    for before, after in zip(whole, cut, strict=True):
        assert before is not None
        assert after == before[: next((i for i, token in enumerate(before) if token in ends), 20)]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_a_checkpoint_says_of_generation_is_put_aside_and_left(family: str) -> None:
    model, prompts = model_of(family), prompts_of(3)
    plain = Generator(model, IDS, FP32, ROOM).generate(model, prompts, [12] * 3)
    own = model.generation_config
    own.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=4, min_new_tokens=2, num_beams=3)
    assert Generator(model, IDS, FP32, ROOM).generate(model, prompts, [12] * 3) == plain
    assert model.generation_config is own
    assert (own.temperature, own.num_beams) == (5.0, 3)


@pytest.mark.parametrize("family", ["llama", "t5", "bart", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_drawn_said_or_differentiated(
    family: str, precision: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(family).train()
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    before = torch.random.get_rng_state()
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    generator = Generator(model, IDS, FP32.model_copy(update={"precision": precision}), ROOM)
    calls.clear()
    lengths = [len(answer or ()) for answer in generator.generate(model, prompts_of(5), [6] * 5)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(calls) == min(6, max(lengths) + 1), "one forward a token: the cache is in use"
    assert all(p.grad is None for p in model.parameters())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_row_that_has_no_room_is_not_answered_and_the_others_are(family: str) -> None:
    model = model_of(family)
    prompts = [[5] * 4, [6] * 30, [7] * 3]
    roomy = Generator(model, IDS, FP32, ROOM)
    whole = roomy.generate(model, prompts, [8] * 3)
    tight = Generator(model, IDS, FP32, roomy.row_bytes(4, 8))
    assert tight.generate(model, prompts, [8] * 3) == [whole[0], None, whole[2]]


class Live(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in (t for t in tree_iter(made) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return made

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("prompt", "new"), [(30, 4), (2, 30), (16, 16)])
def test_what_a_batch_holds_is_never_more_than_was_counted(family: str, prompt: int, new: int) -> None:
    model = model_of(family)
    generator = Generator(model, ENDLESS, FP32, ROOM)
    gc.collect()
    with Live() as live:
        generator.generate(model, [[5 + i] * prompt for i in range(8)], [new] * 8)
    counted = 8 * generator.row_bytes(prompt, new)
    assert 0.1 * counted < live.most < counted


def test_the_cache_is_counted_as_it_is() -> None:
    """Llama: 2 layers x keys and values x 2 heads x 8 wide; T5: 2 layers x keys and values x 4 heads x 8 wide."""
    llama = Generator(model_of("llama"), IDS, FP32, ROOM).row_bytes
    assert (llama.prompt_cache, llama.new_cache) == (2 * 2 * 2 * 8 * 4, 2 * 2 * 2 * 8 * 4)
    t5 = Generator(model_of("t5"), IDS, FP32, ROOM).row_bytes
    assert (t5.prompt_cache, t5.new_cache) == (2 * 2 * 4 * 8 * 4, 2 * 2 * 4 * 8 * 4)
    half = Generator(model_of("t5"), IDS, BF16, ROOM).row_bytes
    assert (half.prompt_cache, half.new_cache) == (t5.prompt_cache / 2, t5.new_cache / 2)


ROWS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=20)


@given(ROWS, st.integers(0, 3000), st.integers(20, 120))
def test_each_row_that_fits_is_in_one_batch_and_no_batch_is_over_the_room(
    rows: list[tuple[int, int]], room: int, positions: int
) -> None:
    def cost(prompt: int, new: int) -> float:
        return 3 * prompt + new

    batches = list(in_batches(rows, room, positions, cost))
    fits = [i for i, (prompt, new) in enumerate(rows) if prompt + new <= positions and cost(prompt, new) <= room]
    assert sorted(i for batch in batches for i in batch) == fits
    for batch in batches:
        prompt, new = (max(rows[i][side] for i in batch) for side in (0, 1))
        assert prompt + new <= positions
        assert len(batch) * cost(prompt, new) <= room
    longest = [max(rows[i][0] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_a_decoder_with_so_many_positions_is_never_led_beyond_them() -> None:
    """GPT-2's 64: a short prompt that may say much, beside a long one."""
    model = model_of("gpt2")
    prompts = [[5] * 60, [6] * 4, [7] * 30]
    most = [64 - len(prompt) for prompt in prompts]
    answers = Generator(model, ENDLESS, FP32, ROOM).generate(model, prompts, most)
    assert [len(answer or ()) for answer in answers] == most


def test_what_is_free_between_two_steps_is_what_a_step_makes_and_leaves() -> None:
    plan = facts.plan()
    items = {"weights": 40, "gradients": 40, "optimizer_state": 80, "activations": 7, "logits_and_loss": 5,
             "temporaries": 3, "inputs": 1, "process": 100, "allocator": 9}  # fmt: skip
    memory = plan.memory.model_copy(update={"items": items, "budget_bytes": plan.memory.measured_peak_bytes})
    full = plan.workload.model_copy(update={"precision": "fp32", "parameters": 10})
    half = full.model_copy(update={"precision": "bf16"})
    made = [plan.model_copy(update={"memory": memory, "workload": work}) for work in (full, half)]
    assert [room_to_generate(p) for p in made] == [56, 36]
    for beyond, room in ((5, 61), (2**40, 56 + 32 * 2**20)):
        ample = memory.model_copy(update={"budget_bytes": memory.budget_bytes + beyond})
        assert room_to_generate(made[0].model_copy(update={"memory": ample})) == room
