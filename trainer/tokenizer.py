"""Loads a tokenizer from a folder, or trains one from the data: byte-level BPE with a chat template. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

from autotune.errors import ConfigurationError
from trainer.folders import check_links
from trainer.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END, BEGIN = "<pad>", "</s>", "<s>"
"""Special tokens of a trained tokenizer, ids 0, 1, 2: pad and end where T5 has them."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ bos_token or '' }}{{ message['role'] }}\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token or '' }}assistant\n{% endif %}"
)
"""Given to a tokenizer that has none, and saved with the model."""

TRAINING_CHARACTERS = 50_000_000
"""Text that a tokenizer is trained on at most: the trainer holds every distinct word in memory."""


def load_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a local folder; raises ConfigurationError if there is none, or it lies elsewhere."""
    from transformers import AutoTokenizer

    if not (Path(folder) / "tokenizer.json").exists():
        raise ConfigurationError(f"{folder}: no tokenizer.json in this folder")
    check_links(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 # whatever transformers makes of a stranger's files
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(f"{folder}: not a tokenizer: {said}") from None
    # A tokenizer.json may carry the truncation and padding of whoever saved it.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast("PreTrainedTokenizerFast", tokenizer)


def train_tokenizer(records: Iterable[Record], vocabulary_size: int, folder: Path) -> None:
    """Train byte-level BPE of at most `vocabulary_size` tokens on the first of some records; save it to a folder."""
    learn(_texts(records), vocabulary_size, folder)


def learn(texts: Iterable[str], vocabulary_size: int, folder: Path) -> None:
    """Train byte-level BPE of at most `vocabulary_size` tokens on texts, and save it to a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, END, BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        bos_token=BEGIN,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def _texts(records: Iterable[Record]) -> Iterator[str]:
    seen = 0
    for record in records:
        for text in chain([record.text] if record.text is not None else (), (t.content for t in record.turns)):
            yield text
            seen += len(text)
        if seen > TRAINING_CHARACTERS:
            return


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a hash of all that decides how text becomes tokens."""
    parts = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, *tokenizer.all_special_tokens)
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]
