"""Tokens and targets: what is trained is the answers with their end token, whatever the template; cuts go by rule."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from autotune.errors import ConfigurationError, DataError
from trainer.encode import BATCH, Encoder, Sample, end_ids
from trainer.records import Record, Turn, read_records
from trainer.template import ChatTemplate, limited
from trainer.tokenizer import load_tokenizer, train_tokenizer

UNLIMITED = 10**6
CHAT_FILES = ("dialogue/alpaca_zh_en_2k.jsonl", "dialogue/chitchat_400.jsonl")

# A tokenizer of whole words, so that every law can be read off the tokens.

PLAIN = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@cache
def word_tokenizer(template: str = PLAIN, begin: str | None = "<s>", end: str | None = "</s>") -> Any:
    """One token for each word: special ones, roles, two letters, and the numbers to 499."""
    known = ["<pad>", "</s>", "<s>", "<unk>", "<|im_end|>", "system", "user", "assistant", "a", "b"]
    known += map(str, range(500))
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=begin, eos_token=end, pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def words(ids: list[int]) -> str:
    return " ".join(word_tokenizer().convert_ids_to_tokens(ids))


def targets(sample: Sample) -> list[str]:
    return [words(sample.tokens[start:end]) for start, end in sample.spans]


def chat(*turns: tuple[str, str], place: str = "file: row 1") -> Record:
    roles = {"s": "system", "q": "user", "a": "assistant"}
    return Record(place, tuple(Turn(roles[role], content) for role, content in turns))


def encode(record: Record, max_seq_len: int = UNLIMITED, tokenizer: Any = None) -> Sample:
    encoder = Encoder(tokenizer or word_tokenizer(), "causal", "sft", max_seq_len, 0)
    (sample,) = encoder.encode([record])
    return sample


# What is trained.


def test_one_answer_is_trained_with_its_end_token_and_nothing_else() -> None:
    sample = encode(chat(("s", "1"), ("q", "2 3"), ("a", "4 5")))
    assert words(sample.tokens) == "<s> system 1 </s> <s> user 2 3 </s> <s> assistant 4 5 </s>"
    assert targets(sample) == ["4 5 </s>"]


def test_every_answer_of_a_conversation_is_trained() -> None:
    sample = encode(chat(("q", "1"), ("a", "2"), ("q", "3"), ("a", "4"), ("a", "5")))
    assert targets(sample) == ["2 </s>", "4 </s>", "5 </s>"]


def test_what_follows_the_last_answer_is_left_out() -> None:
    answered = chat(("q", "1"), ("a", "2"))
    assert encode(chat(("q", "1"), ("a", "2"), ("q", "3"), ("s", "4"))) == encode(answered)


def test_an_answer_that_also_stands_in_the_question_is_found_in_its_own_place() -> None:
    sample = encode(chat(("q", "1 assistant 1"), ("a", "1"), ("q", "1"), ("a", "1")))
    assert targets(sample) == ["1 </s>", "1 </s>"]
    assert [start for start, _ in sample.spans] == [8, 16]


def test_an_empty_answer_trains_its_end_token() -> None:
    assert targets(encode(chat(("q", "1"), ("a", "")))) == ["</s>"]


TEMPLATES = {
    "trims": (PLAIN.replace("m.content", "m.content | trim"), "4 5 </s>"),
    "breaks the line before the end": (PLAIN.replace("{{ m.content }} </s>", "{{ m.content }}\n\n</s>"), "4 5 </s>"),
    "ends with a token of its own": (PLAIN.replace("</s>", "<|im_end|>"), "4 5 <|im_end|>"),
    "has no end": (PLAIN.replace(" </s>", ""), "4 5"),
    "puts a thought before the answer": (
        PLAIN.replace("{{ m.content }}", "{% if m.role == 'assistant' %}9 {% endif %}{{ m.content }}"),
        "9 4 5 </s>",
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("answer", ["4 5", "  4 5\n"])
def test_the_target_is_what_the_template_makes_of_an_answer(template: str, answer: str) -> None:
    text, expected = TEMPLATES[template]
    sample = encode(chat(("s", "1"), ("q", "2"), ("a", answer)), tokenizer=word_tokenizer(text))
    assert targets(sample) == [expected]


def test_a_template_that_hides_the_answer_is_an_error_with_the_place() -> None:
    tokenizer = word_tokenizer(PLAIN.replace("m.content", "m.content | length"))
    with pytest.raises(ConfigurationError, match="turn 2 of file: row 1"):
        encode(chat(("q", "1"), ("a", "2 3")), tokenizer=tokenizer)


def test_a_template_whose_generation_prompt_is_no_prefix_is_an_error_with_the_place() -> None:
    tokenizer = word_tokenizer(PLAIN.replace("<s> assistant {% endif %}", "<s> assistant 7 {% endif %}"))
    with pytest.raises(ConfigurationError, match="turn 2 of file: row 1"):
        encode(chat(("q", "1"), ("a", "2 3")), tokenizer=tokenizer)


REFUSED = {
    "no system turn": chat(("s", "1"), ("q", "2"), ("a", "3"), place="x.jsonl: line 7"),
    "no answer first": chat(("a", "1"), ("q", "2"), ("a", "3"), place="x.jsonl: line 7"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_a_conversation_that_the_template_refuses_is_an_error_with_the_place(refused: str) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    with pytest.raises(DataError, match=r"x\.jsonl: line 7: the tokenizer's chat template refuses this conversation"):
        encode(REFUSED[refused], tokenizer=word_tokenizer(refuses + PLAIN))


ENDLESS = (
    "{% if messages[0].content == 'b' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}" + PLAIN
)


def test_one_conversation_that_takes_a_template_too_long_is_an_error_and_many_that_take_as_long_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer.template.SECONDS", 0.4)
    template, began = ChatTemplate(word_tokenizer(ENDLESS)), time.process_time()
    with limited():
        while time.process_time() - began < 1:
            template.render([Turn("user", "1")], "file: row 1", prompt=True)
    for around in (limited, nullcontext):
        with around(), pytest.raises(ConfigurationError, match=r"x\.jsonl: line 7: .* takes more time than"):
            template.render([Turn("user", "b")], "x.jsonl: line 7", prompt=True)


@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_a_row_without_an_answer_is_an_error_with_the_place(task: Any) -> None:
    encoder = Encoder(word_tokenizer(), task, "sft", 8, 8)
    with pytest.raises(DataError, match=r"^file: row 1: no assistant turn to train on"):
        list(encoder.encode([chat(("s", "1"), ("q", "2"))]))
    with pytest.raises(DataError, match=r"^file: row 9: a document of plain text has no answers"):
        list(encoder.encode([Record("file: row 9", text="1 2")]))


def test_a_tokenizer_without_an_end_token_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="no end token"):
        Encoder(word_tokenizer(end=None), "causal", "sft", 8, 0)


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_samples_keep_the_order_of_their_records(stage: Any) -> None:
    count = 2 * BATCH + 3
    if stage == "sft":
        records = [chat(("q", "1"), ("a", str(i % 500))) for i in range(count)]
    else:
        records = [Record("", text=str(i % 500)) for i in range(count)]
    samples = list(Encoder(word_tokenizer(), "causal", stage, 20, 0).encode(iter(records)))
    assert [words(sample.tokens).split()[-2] for sample in samples] == [str(i % 500) for i in range(count)]


# Where generation has to stop.


def test_a_template_that_ends_answers_with_another_special_token_gives_both_ids() -> None:
    tokenizer = word_tokenizer(PLAIN.replace("</s>", "<|im_end|>"))
    both = (1, 4)
    assert "<|im_end|>" not in tokenizer.all_special_tokens, "as in Llama 3, it has no name of its own"
    assert end_ids(tokenizer, "causal", "sft") == both
    named = word_tokenizer(PLAIN.replace("</s>", " <|im_end|>"))
    named.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert end_ids(named, "causal", "sft") == both


@pytest.mark.parametrize("template", [PLAIN, PLAIN.replace(" </s>", ""), PLAIN.replace("</s>", "499")])
def test_without_another_end_there_is_one_id(template: str) -> None:
    assert end_ids(word_tokenizer(template), "causal", "sft") == 1


def test_without_a_chat_template_in_use_there_is_one_id() -> None:
    tokenizer = word_tokenizer(PLAIN.replace("</s>", "<|im_end|>"))
    assert end_ids(tokenizer, "causal", "pretrain") == 1
    assert end_ids(tokenizer, "seq2seq", "sft") == 1


# Cuts of conversations.


@st.composite
def conversations(draw: Any) -> Record:
    """Conversations no two words of which are the same."""
    numbers = iter(range(500))

    def text(least: int, most: int) -> str:
        return " ".join(str(next(numbers)) for _ in range(draw(st.integers(least, most))))

    turns = [("s", text(1, 9))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 6))):
        turns += [("q", text(0, 1 if draw(st.booleans()) else 30)), ("a", text(0, 30))]
    return chat(*turns)


@settings(deadline=None)
@given(conversations(), st.integers(8, 120))
def test_oldest_turns_go_first_then_the_prompt_from_its_left_then_the_answer_from_its_right(
    record: Record, limit: int
) -> None:
    encoder = Encoder(word_tokenizer(), "causal", "sft", limit, 0)
    (sample,) = encoder.encode([record])
    assert len(sample.tokens) <= limit
    system = int(record.turns[0].role == "system")
    exchanges = range(system, len(record.turns), 2)
    whole = [encode(Record("", (*record.turns[:system], *record.turns[i:]))) for i in exchanges]
    fitting = [i for i, one in enumerate(whole) if len(one.tokens) <= limit]
    dropped = {"dropped_turns": 1} if len(whole) > 1 and 0 not in fitting else {}
    if fitting:
        assert sample == whole[fitting[0]]
        assert +encoder.cuts == dropped
        return
    (start, end) = whole[-1].spans[-1]
    prompt, answer = whole[-1].tokens[:start], whole[-1].tokens[start:end]
    ((kept, _),) = sample.spans
    assert sample.tokens[:kept] == prompt[start - kept :]
    assert sample.tokens[kept:] == answer[: len(sample.tokens) - kept]
    assert sample.spans == [(kept, len(sample.tokens))]
    assert len(sample.tokens) == limit, "no more is cut than has to be"
    prompt_cut, answer_cut = kept < len(prompt), len(sample.tokens) - kept < len(answer)
    if answer_cut:
        assert kept == min(len(prompt), limit // 4), "an answer is cut only when the prompt is down to a quarter"
        assert encoder.tokenizer.eos_token_id not in sample.tokens[kept:]
    assert +encoder.cuts == Counter(dropped) + Counter(prompt_cut=prompt_cut, answer_cut=answer_cut)


def test_the_rules_of_a_cut_by_example() -> None:
    record = chat(("s", "1"), ("q", "2"), ("a", "3"), ("q", "4 5"), ("a", "6 7 8 9"))
    cut = {limit: words(encode(record, limit).tokens) for limit in (24, 23, 16, 15, 11, 8)}
    assert cut == {
        24: "<s> system 1 </s> <s> user 2 </s> <s> assistant 3 </s> <s> user 4 5 </s> <s> assistant 6 7 8 9 </s>",
        23: "<s> system 1 </s> <s> user 4 5 </s> <s> assistant 6 7 8 9 </s>",
        16: "<s> system 1 </s> <s> user 4 5 </s> <s> assistant 6 7 8 9 </s>",
        15: "system 1 </s> <s> user 4 5 </s> <s> assistant 6 7 8 9 </s>",
        11: "user 4 5 </s> <s> assistant 6 7 8 9 </s>",
        8: "</s> <s> assistant 6 7 8 9 </s>",
    }


def test_a_cut_answer_has_no_end_token() -> None:
    record = chat(("q", "1 2 3 4"), ("a", " ".join(map(str, range(10, 30)))))
    sample = encode(record, 12)
    assert words(sample.tokens) == "</s> <s> assistant 10 11 12 13 14 15 16 17 18"
    assert targets(sample) == ["10 11 12 13 14 15 16 17 18"]


def test_an_empty_answer_without_an_end_is_cut_without_harm() -> None:
    tokenizer = word_tokenizer(PLAIN.replace(" </s>", ""))
    sample = encode(chat(("q", "1 2 3 4 5 6 7 8 9"), ("a", "")), 8, tokenizer)
    assert words(sample.tokens) == "4 5 6 7 8 9 <s> assistant"
    assert "".join(targets(sample)) == ""


def test_each_row_counts_once_for_each_rule() -> None:
    long = " ".join(map(str, range(40)))
    records = [
        chat(("q", "1"), ("a", "2")),
        chat(("q", long), ("a", "1"), ("q", "2"), ("a", "3")),
        chat(("q", long), ("a", "1"), ("q", long), ("a", "3"), ("q", "4"), ("a", "5")),
        chat(("q", long), ("a", "1")),
        chat(("q", "1"), ("a", long)),
        chat(("q", "1"), ("a", "2"), ("q", long), ("a", long)),
    ]
    encoder = Encoder(word_tokenizer(), "causal", "sft", 16, 0)
    assert len(list(encoder.encode(records))) == len(records)
    assert encoder.cuts == {"dropped_turns": 3, "prompt_cut": 3, "answer_cut": 2}


# Real text under real tokenizers.

NAMES = ("ours", "minimind", "chatlm_mini")


@pytest.fixture(scope="module")
def real_conversations(real_data: Path) -> list[Record]:
    return [record for name in CHAT_FILES for record in read_records([real_data / name])]


@pytest.fixture(scope="module")
def tokenizers(
    real_data: Path, real_conversations: list[Record], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    ours = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(real_conversations, 3000, ours)
    folders = (ours, real_data / "minimind/tokenizer", real_data / "chatlm_mini/tokenizer")
    return {name: load_tokenizer(str(folder)) for name, folder in zip(NAMES, folders, strict=True)}


@pytest.fixture(scope="module")
def whole(tokenizers: dict[str, Any], real_conversations: list[Record]) -> dict[str, list[Sample]]:
    """Every real conversation uncut, by tokenizer."""
    return {
        name: list(Encoder(tokenizer, "causal", "sft", UNLIMITED, 0).encode(real_conversations))
        for name, tokenizer in tokenizers.items()
    }


@pytest.mark.parametrize("name", ["ours", "minimind"])
def test_the_targets_of_real_conversations_are_their_answers(
    name: str, tokenizers: dict[str, Any], real_conversations: list[Record], whole: dict[str, list[Sample]]
) -> None:
    tokenizer = tokenizers[name]
    for record, sample in zip(real_conversations, whole[name], strict=True):
        answers = [turn.content + tokenizer.eos_token for turn in record.turns if turn.role == "assistant"]
        assert [tokenizer.decode(sample.tokens[s:e]) for s, e in sample.spans] == answers, record.place
        assert tokenizer.decode(sample.tokens[sample.spans[-1][1] :]) == "\n", "untrained"


@pytest.mark.parametrize("name", NAMES)
def test_a_real_answer_is_trained_after_just_what_generation_starts_from(
    name: str, tokenizers: dict[str, Any], real_conversations: list[Record], whole: dict[str, list[Sample]]
) -> None:
    tokenizer = tokenizers[name]
    before = [[{"role": t.role, "content": t.content} for t in r.turns[:-1]] for r in real_conversations]
    prompts = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    answers = [record.turns[-1].content for record in real_conversations]
    prompt_ids, answer_ids = (tokenizer(texts, add_special_tokens=False).input_ids for texts in (prompts, answers))
    for record, sample, prompt, answer in zip(real_conversations, whole[name], prompt_ids, answer_ids, strict=True):
        start, end = sample.spans[-1]
        assert sample.tokens[:start] == prompt, record.place
        assert sample.tokens[start:end] == [*answer, tokenizer.eos_token_id], record.place


@pytest.mark.parametrize("name", NAMES)
def test_real_conversations_are_cut_to_the_limit_and_counted(
    name: str, tokenizers: dict[str, Any], real_conversations: list[Record], whole: dict[str, list[Sample]]
) -> None:
    limit, end_id = 100, tokenizers[name].eos_token_id
    short = [
        (record, full) for record, full in zip(real_conversations, whole[name], strict=True) if len(record.turns) < 30
    ]
    encoder = Encoder(tokenizers[name], "causal", "sft", limit, 0)
    samples = list(encoder.encode(record for record, _ in short))
    counts: Counter[str] = Counter()
    for (record, full), sample in zip(short, samples, strict=True):
        if len(full.tokens) <= limit:
            assert sample == full
            continue
        (start, end), (full_start, full_end) = sample.spans[-1], full.spans[-1]
        kept = sample.tokens[start:end]
        assert len(sample.tokens) <= limit
        assert kept == full.tokens[full_start : full_start + len(kept)], record.place
        answer_cut = end - start < full_end - full_start
        if answer_cut:
            assert len(sample.tokens) == limit
            assert start <= limit // 4
            assert end_id not in kept
        if len(record.turns) == 2:
            assert start >= min(limit // 4, full_start)
            assert sample.tokens[:start] == full.tokens[full_start - start : full_start]
        counts["dropped_turns"] += len(record.turns) > 2
        counts["answer_cut"] += answer_cut
    assert all(counts.values())
    assert {rule: encoder.cuts[rule] for rule in counts} == counts


def test_every_real_pair_is_a_source_and_a_target(real_data: Path, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["ours"]
    records = list(read_records([real_data / "chatlm_mini/my_valid_dataset_1k.parquet"]))
    encoder = Encoder(tokenizer, "seq2seq", "sft", UNLIMITED, UNLIMITED)
    for record, sample in zip(records, encoder.encode(records), strict=True):
        ((start, end),) = sample.spans
        sides = tokenizer.decode(sample.tokens[:start]), tokenizer.decode(sample.tokens[start:end])
        assert sides == tuple(turn.content + "</s>" for turn in record.turns)
        assert end == len(sample.tokens)
    assert not +encoder.cuts


# Seq2seq.


def pairs(record: Record, max_seq_len: int, max_target_len: int) -> tuple[str, str, dict[str, int]]:
    encoder = Encoder(word_tokenizer(), "seq2seq", "sft", max_seq_len, max_target_len)
    (sample,) = encoder.encode([record])
    ((start, end),) = sample.spans
    assert end == len(sample.tokens)
    return words(sample.tokens[:start]), words(sample.tokens[start:]), dict(+encoder.cuts)


def test_a_source_and_a_target_end_with_the_end_token() -> None:
    assert pairs(chat(("q", "1 2"), ("a", "3")), 9, 9) == ("1 2 </s>", "3 </s>", {})


def test_all_turns_before_the_last_answer_are_the_source() -> None:
    record = chat(("s", "1"), ("q", "2"), ("a", "3"), ("q", "4"), ("a", "5"), ("q", "6"))
    assert pairs(record, 9, 9) == ("1 2 3 4 </s>", "5 </s>", {})


def test_special_tokens_of_a_chat_template_are_no_part_of_a_pair() -> None:
    assert pairs(chat(("a", "5")), 9, 9) == ("</s>", "5 </s>", {})


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 12), st.integers(1, 12))
def test_each_side_is_cut_at_its_own_limit(source: int, target: int, source_limit: int, target_limit: int) -> None:
    question, answer = map(str, range(source)), map(str, range(100, 100 + target))
    source_ids, target_ids, cuts = pairs(
        chat(("q", " ".join(question)), ("a", " ".join(answer))), source_limit, target_limit
    )
    kept = min(source, source_limit - 1)
    assert source_ids.split() == [*map(str, range(kept)), "</s>"], "a cut source keeps its end"
    whole = [*map(str, range(100, 100 + target)), "</s>"]
    assert target_ids.split() == whole[:target_limit], "a cut target does not"
    assert cuts == {
        **({"source_cut": 1} if source + 1 > source_limit else {}),
        **({"target_cut": 1} if target + 1 > target_limit else {}),
    }


# Pretraining.


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(2, 30), st.sampled_from([None, "<s>", "</s>"]))
def test_each_token_but_the_first_of_a_document_is_a_target_once(
    lengths: list[int], limit: int, begin: str | None
) -> None:
    tokenizer = word_tokenizer(begin=begin)
    documents = [[str(100 * i + j) for j in range(length)] for i, length in enumerate(lengths)]
    encoder = Encoder(tokenizer, "causal", "pretrain", limit, 0)
    samples = list(encoder.encode([Record("", text=" ".join(document)) for document in documents]))
    head = ["<s>"] if begin == "<s>" else []
    expected = [[*head, *document, "</s>"] for document in documents]
    trained = [word for sample in samples for target in targets(sample) for word in target.split()]
    assert trained == [word for document in expected for word in document[1:]]
    assert all(1 < len(sample.tokens) <= limit for sample in samples)
    assert all(sample.spans == [(1, len(sample.tokens))] for sample in samples)
    assert encoder.cuts["split"] == sum(len(document) > limit for document in expected)
    for before, after in pairwise(samples):
        if len(before.tokens) == limit and words(before.tokens[-1:]) != "</s>":
            assert after.tokens[0] == before.tokens[-1], "pieces of a document overlap by one"


def test_a_conversation_may_be_pretrained_on_as_the_template_renders_it() -> None:
    encoder = Encoder(word_tokenizer(), "causal", "pretrain", 9, 0)
    (sample,) = encoder.encode([chat(("q", "1"), ("a", "2"))])
    assert words(sample.tokens) == "<s> user 1 </s> <s> assistant 2 </s>"
    assert targets(sample) == ["user 1 </s> <s> assistant 2 </s>"]


def test_pretraining_asks_no_template_where_an_answer_begins() -> None:
    tokenizer = word_tokenizer(PLAIN.replace("m.content", "m.content | length"))
    assert list(Encoder(tokenizer, "causal", "pretrain", 20, 0).encode([chat(("q", "1"), ("a", "2"))]))


def test_real_documents_are_their_text_again(real_data: Path, tokenizers: dict[str, Any]) -> None:
    tokenizer, limit = tokenizers["minimind"], 64
    for record in read_records([real_data / "dialogue/pretrain_docs.jsonl"], 100):
        samples = list(Encoder(tokenizer, "causal", "pretrain", limit, 0).encode([record]))
        ids = [samples[0].tokens[0], *(token for sample in samples for token in sample.tokens[1:])]
        assert tokenizer.decode(ids) == f"<s>{record.text}</s>"


# A prompt that is typed.


@pytest.mark.parametrize(("task", "stage"), [("causal", "sft"), ("seq2seq", "sft"), ("causal", "pretrain")])
def test_a_typed_prompt_is_what_comes_before_an_answer_in_training(task: Any, stage: Any) -> None:
    encoder = Encoder(word_tokenizer(), task, stage, 64, 64)
    record = Record("", text="1 2 3 4") if stage == "pretrain" else chat(("q", "1 2 3"), ("a", "4"))
    (sample,) = encoder.encode([record])
    before = 4 if stage == "pretrain" else sample.spans[0][0]
    assert encoder.prompt("1 2 3") == sample.tokens[:before]


@pytest.mark.parametrize(
    ("task", "stage", "kept"),
    [
        ("causal", "sft", "8 9 </s> <s> assistant"),
        ("seq2seq", "sft", "0 1 2 3 4 5 6 </s>"),
        ("causal", "pretrain", "4 5 6 7 8 9"),
    ],
)
def test_too_long_a_prompt_leaves_room_for_an_answer(task: Any, stage: Any, kept: str) -> None:
    """Of 8 tokens two are the answer's, or all are the source's."""
    typed = Encoder(word_tokenizer(), task, stage, 8, 8).prompt("0 1 2 3 4 5 6 7 8 9")
    assert words(typed).endswith(kept)
    assert len(typed) == (8 if task == "seq2seq" else 6)


@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_a_question_with_what_was_said_before_is_what_comes_before_its_answer_in_training(task: Any) -> None:
    encoder = Encoder(word_tokenizer(), task, "sft", 64, 64)
    record = chat(("s", "a"), ("q", "1"), ("a", "2"), ("q", "3"), ("a", "4"), ("q", "5 6"), ("a", "7"))
    (sample,) = encoder.encode([record])
    assert encoder.question(record.turns[:-1], 64) == (sample.tokens[: sample.spans[-1][0]], 0)


def test_of_a_long_conversation_whole_oldest_exchanges_are_left_out_of_the_question() -> None:
    encoder = Encoder(word_tokenizer(), "causal", "sft", 64, 64)
    turns = chat(("s", "a"), ("q", "1"), ("a", "2"), ("q", "3"), ("a", "4"), ("q", "5 6")).turns
    whole, _ = encoder.question(turns, 64)
    shorter, dropped = encoder.question(turns, len(whole) - 1)
    assert dropped == 2
    assert shorter == encoder.question((turns[0], *turns[3:]), 64)[0]


def test_a_prompt_of_nothing_is_still_one() -> None:
    encoder = Encoder(word_tokenizer(begin=None), "causal", "pretrain", 8, 8)
    assert words(encoder.prompt("")) == "</s>"


UNMARKED = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
"""No special token stands before a turn, so that its beginning is merged with what stands before it."""


@pytest.mark.parametrize("template", ["its own", "unmarked"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_of_a_long_conversation_is_tokenized_as_if_it_stood_alone(
    name: str, template: str, tokenizers: dict[str, Any], real_conversations: list[Record], monkeypatch: Any
) -> None:
    if template == "unmarked":
        monkeypatch.setattr(tokenizers[name], "chat_template", UNMARKED)
    asked = Turn("system", "用中文回答。 Answer ")
    records = [Record(r.place, (asked, *r.turns) if i % 2 else r.turns) for i, r in enumerate(real_conversations[-60:])]
    encoder = Encoder(tokenizers[name], "causal", "sft", 300, 0)
    dropped = 0
    for record, sample in zip(records, encoder.encode(records), strict=True):
        system = record.turns[: record.turns[0].role == "system"]
        left = Record(record.place, (*system, *record.turns[-2 * len(sample.spans) :]))
        dropped += len(left.turns) < len(record.turns)
        assert sample == next(Encoder(tokenizers[name], "causal", "sft", 300, 0).encode([left])), record.place
    assert dropped > 20
