"""Tokenizers of files: trained on as much text as memory has room for, and looked at for what they lack. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from autotune.errors import ConfigurationError
from trainer.quality import Text
from trainer.sampling import Source, Told, draw, drawn
from trainer.tokenizer import TRAINING_CHARACTERS, learn

PROBED_ROWS = 2**13
HELD_OUT = 19
"""Of so many rows, or more where there are many, one is not learned from, and tells how well the others did."""
MOST_HELD_OUT = 2000
CHINESE_SHARE, ENGLISH_SHARE = 0.3, 0.05
"""Share of Chinese characters from which a text counts as Chinese, and up to which as English."""
UNKNOWN_SHARE = 0.001
"""Of tokens, from which it is worth a warning."""


@dataclass(frozen=True)
class Fertility:
    """How a tokenizer cuts texts."""

    rows: int
    tokens_per_character: dict[str, float]
    """zh, en, other: of texts that are so."""
    unknown_share: float
    """Of tokens."""
    whole_share: float
    """Of texts, which are themselves again once their tokens are joined."""


@dataclass(frozen=True)
class Inspected:
    """A tokenizer, and what it lacks."""

    entries: int
    special: dict[str, str]
    fertility: Fertility | None
    """None without data."""
    defects: tuple[str, ...]


def train(
    paths: Sequence[str],
    entries: int,
    output: Path,
    seed: int,
    tell: Told,
    most_characters: int = TRAINING_CHARACTERS,
) -> tuple[int, Inspected]:
    """Train byte-level BPE on rows that are drawn from files, and save it; returns how many characters it learned from.

    Rows are drawn from all of the files, as many as have so many characters: what is held grows with the different
    words among them. Raises DataError for a file that cannot be read, OSError where the disk refuses.
    """
    source, _ = Source.of(paths)
    probe = list(map(len, _texts(source, draw(source.total, min(source.total, PROBED_ROWS), seed))))
    mean = max(1.0, sum(probe) / len(probe))
    wanted = min(source.total, int(most_characters / mean) + 1)
    held_out: list[str] = []
    learned = 0
    every = max(HELD_OUT, -(-wanted // MOST_HELD_OUT))  # over all files, which may differ in their languages

    def learn_from() -> Iterator[str]:
        nonlocal learned
        for number, text in enumerate(_texts(source, draw(source.total, wanted, seed))):
            if number % every == 0 and wanted >= HELD_OUT:
                held_out.append(text)
            else:
                learned += len(text)
                yield text
            tell("learning", number)

    learn(learn_from(), entries, output)
    return learned, inspect(output, held_out)


def _texts(source: Source, chosen: Any) -> Iterator[str]:
    for table in drawn(source.tables(), chosen):
        yield from Text.of(table).whole.to_pylist()


def some_texts(paths: Sequence[str], seed: int) -> list[str]:
    """Return texts of rows that are drawn from files, to look at a tokenizer with."""
    source, _ = Source.of(paths)
    return list(_texts(source, draw(source.total, min(source.total, MOST_HELD_OUT), seed)))


def inspect(folder: Path, texts: Sequence[str]) -> Inspected:
    """Look at a tokenizer: what it lacks to train a model with, and how it cuts texts.

    Raises ConfigurationError where there is none.
    """
    tokenizer, told, template = _load(folder)
    names = {name: _content(told.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")}
    special = {name: content for name, content in names.items() if content is not None}
    fertility = _fertility(tokenizer, texts, special.get("unk")) if texts else None
    return Inspected(
        entries=tokenizer.get_vocab_size(),
        special=special,
        fertility=fertility,
        defects=tuple(_defects(tokenizer, special, template, fertility)),
    )


def _load(folder: Path) -> tuple[Tokenizer, dict[str, Any], str | None]:
    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 # the library raises no other
        raise ConfigurationError(f"{file}: not a tokenizer: {error}", "give the folder of one") from None
    told: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{folder / name}: not JSON: {error}") from None
        told |= found if isinstance(found, dict) else {}
    beside = folder / "chat_template.jinja"
    template = beside.read_text(encoding="utf-8") if beside.is_file() else told.get("chat_template")
    return tokenizer, told, template if isinstance(template, str) else None


def _content(token: object) -> str | None:
    """Return a special token's text, which is written as such or with its properties."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _fertility(tokenizer: Tokenizer, texts: Sequence[str], unknown: str | None) -> Fertility:
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    encodings = plain.encode_batch_fast(list(texts), add_special_tokens=False)
    unknown_id = plain.token_to_id(unknown) if unknown is not None else None
    characters, tokens = dict.fromkeys(("zh", "en", "other"), 0), dict.fromkeys(("zh", "en", "other"), 0)
    unknowns, whole = 0, 0
    for text, encoding in zip(texts, encodings, strict=True):
        language = language_of(text)
        characters[language] += len(text)
        tokens[language] += len(encoding.ids)
        unknowns += encoding.ids.count(unknown_id) if unknown_id is not None else 0
        whole += plain.decode(encoding.ids, skip_special_tokens=False) == text
    return Fertility(
        rows=len(texts),
        tokens_per_character={name: tokens[name] / count for name, count in characters.items() if count},
        unknown_share=unknowns / max(1, sum(tokens.values())),
        whole_share=whole / len(texts),
    )


def language_of(text: str) -> str:
    """Say whether a text is Chinese (zh), English (en) as far as letters tell, or other."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    if not len(codes):
        return "other"
    chinese = float(((codes >= 0x4E00) & (codes < 0xA000)).mean())
    if chinese >= CHINESE_SHARE:
        return "zh"
    return "en" if chinese <= ENGLISH_SHARE and float((codes < 0x250).mean()) > 1 - CHINESE_SHARE else "other"


def _defects(
    tokenizer: Tokenizer, special: dict[str, str], template: str | None, fertility: Fertility | None
) -> Iterator[str]:
    if "eos" not in special:
        yield "no end token (eos_token): a model would never stop"
    if "pad" not in special:
        yield "no padding token (pad_token): the end token is taken in its place"
    elif special["pad"] == special.get("eos"):
        yield "padding and end are one token: trainers that mask padding never teach the end"
    for name, content in special.items():
        if tokenizer.token_to_id(content) is None:
            yield f"its {name}_token {content!r} is no entry"
    if template is None:
        yield "no chat template: chatlm gives it one of its own, other programs another"
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        yield "it cuts or pads by itself (truncation, padding in tokenizer.json): chatlm turns that off, others may not"
    if fertility is not None and fertility.unknown_share > UNKNOWN_SHARE:
        yield f"{fertility.unknown_share:.1%} of the tokens are unknown to it: what they stand for cannot be learned"
    if fertility is not None and fertility.whole_share < 1:
        yield f"{1 - fertility.whole_share:.1%} of the texts are not themselves again once their tokens are joined"
