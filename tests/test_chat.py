"""A conversation: what a model is given is what it was trained on, and its words come whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_encode import word_tokenizer
from test_tokenizer import some_records
from tiny_models import DECODER
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from autotune.errands import Chat, Choosing, Conversation, SavedModel
from autotune.errors import ConfigurationError
from cli.render.chat import printable
from trainer.chat import Chatter, Words
from trainer.tokenizer import load_tokenizer, train_tokenizer

GREEDY = Choosing(max_new_tokens=9, temperature=0, top_p=1, top_k=0, repetition_penalty=1, seed=1)


def chatter(folder: Path, family: str = "llama", **changes: Any) -> Chatter:
    """Save a small model with a tokenizer of words, and open it for a chat."""
    torch.manual_seed(0)
    size = len(word_tokenizer())
    if family == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**DECODER | {"vocab_size": size}))
    else:
        config = T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2)
        config.decoder_start_token_id = 0
        model = T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    saved = SavedModel(
        place="m", model=str(folder), vocabulary_size=None, checkpoint=None, tokenizer=str(folder), stage="sft"
    )
    choosing = GREEDY.model_copy(update=changes)
    return Chatter(Chat(saved=saved, device="cpu", longest_prompt=None, choosing=choosing))


def said(talker: Chatter, *turns: tuple[str, str]) -> Any:
    pieces: list[str] = []
    answered = talker.answer(Conversation(turns=turns), pieces.append, lambda: False)
    assert "".join(pieces) == answered.text
    return answered


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_answer_is_the_likeliest_token_after_the_other(family: str, tmp_path: Path) -> None:
    """As many forwards of all that there is so far say, without a cache."""
    talker = chatter(tmp_path, family)
    answered = said(talker, ("user", "1 2 3"))
    tokenizer = word_tokenizer()
    model = talker.model
    if family == "llama":
        ids = tokenizer.encode("<s> user 1 2 3 </s> <s> assistant")
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + answered.tokens:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    else:
        source, ids, start = torch.tensor([tokenizer.encode("1 2 3 </s>")]), [0], 1
        with torch.no_grad():
            while len(ids) < start + answered.tokens:
                ids.append(int(model(input_ids=source, decoder_input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert answered.text == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_how_a_checkpoint_says_that_it_be_generated_from_is_put_aside(tmp_path: Path) -> None:
    """Beams cannot be shown word by word, and a penalty would not be the likeliest."""
    plain = said(chatter(tmp_path, max_new_tokens=30), ("user", "1")).text
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    model.generation_config.update(num_beams=4, no_repeat_ngram_size=1, min_length=20, suppress_tokens=[9])
    chatter(tmp_path, max_new_tokens=30)
    model.generation_config.save_pretrained(tmp_path)
    saved = SavedModel(
        place="m", model=str(tmp_path), vocabulary_size=None, checkpoint=None, tokenizer=str(tmp_path), stage="sft"
    )
    choosing = GREEDY.model_copy(update={"max_new_tokens": 30})
    assert (
        said(Chatter(Chat(saved=saved, device="cpu", longest_prompt=None, choosing=choosing)), ("user", "1")).text
        == plain
    )


def test_what_is_sampled_is_the_same_for_a_seed(tmp_path: Path) -> None:
    asked = ("user", "1 2 3")
    first = said(chatter(tmp_path, temperature=2.0), asked).text
    assert first == said(chatter(tmp_path, temperature=2.0), asked).text
    assert first != said(chatter(tmp_path, temperature=2.0, seed=2), asked).text
    assert said(chatter(tmp_path, temperature=2.0, top_k=1), asked).text == said(chatter(tmp_path), asked).text


def test_a_penalty_shuns_what_was_said(tmp_path: Path) -> None:
    plain = said(chatter(tmp_path, max_new_tokens=30), ("user", "1")).text.split()
    shunned = said(chatter(tmp_path, max_new_tokens=30, repetition_penalty=50.0), ("user", "1")).text.split()
    assert len(set(shunned)) > len(set(plain))


def test_oldest_exchanges_go_where_there_is_no_room_and_the_system_turn_stays(tmp_path: Path) -> None:
    talker = chatter(tmp_path, max_new_tokens=30)  # of 64 positions
    turns = [("system", "a b"), *(pair for i in range(6) for pair in (("user", f"{i} 2 3"), ("assistant", "4 5")))]
    answered = said(talker, *turns, ("user", "9"))
    assert answered.dropped == 8
    assert said(talker, ("system", "a b"), *turns[9:], ("user", "9")).text == answered.text


def test_a_stop_that_is_asked_for_ends_an_answer(tmp_path: Path) -> None:
    talker = chatter(tmp_path, temperature=5.0)
    told: list[str] = []
    answered = talker.answer(Conversation(turns=(("user", "1"),)), told.append, lambda: bool(told))
    assert (len(told), answered.ended) == (1, False)
    assert answered.tokens < 9


def test_a_model_with_fewer_positions_than_new_tokens_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="64 new tokens, and the model has 64 positions in all"):
        chatter(tmp_path, max_new_tokens=64)


def test_a_character_of_several_tokens_comes_when_it_is_whole(tmp_path: Path) -> None:
    train_tokenizer(some_records(), 300, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    text = "鱼🐟 and 魚 at last"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)
    pieces: list[str] = []
    words = Words(tokenizer, pieces.append)
    words.put(torch.tensor([[1, 2, 3]]))
    for token in ids:
        words.put(torch.tensor([token]))
    words.end()
    assert "".join(pieces) == words.text == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_what_a_model_says_does_not_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\n\tc\u202e", "utf-8") == "a\ufffd[2Jb\n\tc\ufffd"
    assert printable("\u3000\u3000你好 👩\u200d🔬", "utf-8") == "\u3000\u3000你好 👩\u200d🔬"
    assert printable("你好", "gbk") == "你好"
    assert printable("你好", "ascii") == "??"
