"""Says what a model is, and turns data into a token store: once, since the cache keeps it by what it was made of."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autotune.errands import DataSummary, ModelSummary, Preprocess, Preprocessed, TokenIds
from autotune.errors import ConfigurationError, MachineError
from autotune.plan import Stage
from trainer.data import TokenStore, write_store
from trainer.encode import Encoder, end_ids
from trainer.model import PRESETS, summarise
from trainer.records import Record, demo_files, demo_records, find_files, read_records
from trainer.tokenizer import fingerprint, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = "1"
"""Changes when a store written by an older version would be read or cut in another way."""

Report = Callable[[str, int], None]
"""Told what is being done and how many rows are done."""


def preprocess(errand: Preprocess, report: Report) -> Preprocessed:
    """Tokenize the data, or find it tokenized; count the model's parameters at the tokenizer's vocabulary."""
    if errand.data is None:
        return _without_data(errand)
    source = Source(errand)
    tokenizer = load_tokenizer(str(_tokenizer_folder(errand, source, report)))
    model = summarise(errand.model, len(tokenizer), errand.dropout, errand.freeze)
    _check_length(errand, model)
    stage = errand.stage or source.stage()
    data = _store(errand, source.files, source.read, model, stage, tokenizer, report)
    validation = None
    if errand.validation:
        files = find_files(errand.validation)
        validation = _store(errand, files, lambda: read_records(files), model, stage, tokenizer, report)
    return Preprocessed(
        model=model,
        tokenizer_dir=str(_save_as_used(tokenizer, errand)),
        tokenizer_fingerprint=fingerprint(tokenizer),
        ids=TokenIds(pad=tokenizer.pad_token_id, eos=end_ids(tokenizer, model.task, stage), bos=tokenizer.bos_token_id),
        data=data,
        validation=validation,
    )


def _check_length(errand: Preprocess, model: ModelSummary) -> None:
    longest = max(errand.max_seq_len, errand.max_target_len if model.task == "seq2seq" else 0)
    if model.longest_input is not None and longest > model.longest_input:
        raise ConfigurationError(
            f"{longest} tokens were asked for, the model {errand.model} has positions for {model.longest_input}",
            f"give --max-seq-len {model.longest_input}"
            + f" --max-target-len {model.longest_input}" * (model.task == "seq2seq"),
        )


def _without_data(errand: Preprocess) -> Preprocessed:
    size = len(load_tokenizer(errand.tokenizer)) if errand.tokenizer else None
    model = summarise(errand.model, size, errand.dropout, errand.freeze)
    _check_length(errand, model)
    return Preprocessed(
        model=model, tokenizer_dir=None, tokenizer_fingerprint=None, ids=None, data=None, validation=None
    )


class Source:
    """The rows of the files that an errand names, or of the demo data."""

    def __init__(self, errand: Preprocess) -> None:
        self._limit = errand.limit
        self._demo = errand.data == ()
        self.files = demo_files() if self._demo else find_files(errand.data or ())

    def read(self) -> Iterator[Record]:
        """Read from the first row on, up to the errand's limit."""
        if self._demo:
            return islice(demo_records(self.files), self._limit)
        return read_records(self.files, self._limit)

    def stage(self) -> Stage:
        """Tell by the first row: documents are pretrained on, conversations fine-tuned on."""
        return "pretrain" if next(self.read()).text is not None else "sft"


def _tokenizer_folder(errand: Preprocess, source: Source, report: Report) -> Path:
    """Return the tokenizer that was given, the checkpoint's own, or one trained on this data for a preset."""
    if errand.tokenizer is not None:
        return Path(errand.tokenizer)
    if errand.model not in PRESETS:
        if not (Path(errand.model) / "tokenizer.json").exists():
            summarise(errand.model, None, None)  # says so first if that is no model
            raise ConfigurationError(f"{errand.model}: a model without a tokenizer.json", "give --tokenizer DIR")
        return Path(errand.model)
    size = summarise(errand.model, None, None).vocabulary_size
    key = _key("tokenizer", *_stamps(source.files), size, errand.limit)
    folder = Path(errand.cache_dir) / "tokenizers" / key
    if not (folder / "tokenizer.json").exists():
        with _whole(folder) as partial:
            train_tokenizer(Counted(source.read(), "training a tokenizer", report), size, partial)
    return folder


def _save_as_used(tokenizer: PreTrainedTokenizerFast, errand: Preprocess) -> Path:
    """Save the tokenizer with the chat template that it was used with, in a folder that holds nothing else."""
    folder = Path(errand.cache_dir) / "tokenizers" / fingerprint(tokenizer)
    if not folder.exists():
        with _whole(folder) as partial:
            tokenizer.save_pretrained(partial)
    return folder


def _store(
    errand: Preprocess,
    files: Sequence[Path],
    read: Callable[[], Iterator[Record]],
    model: ModelSummary,
    stage: Stage,
    tokenizer: PreTrainedTokenizerFast,
    report: Report,
) -> DataSummary:
    limits = (errand.max_seq_len, errand.max_target_len)
    key = _key(*_stamps(files), fingerprint(tokenizer), model.task, stage, *limits, errand.limit)
    folder = Path(errand.cache_dir) / "tokens" / key
    summary = folder / "summary.json"
    if summary.exists():
        kept = DataSummary.model_validate_json(summary.read_text(encoding="utf-8"))
        return kept.model_copy(update={"store": str(folder)})  # the cache may have been moved
    encoder = Encoder(tokenizer, model.task, stage, *limits)
    rows = Counted(read(), "tokenizing", report)
    shutil.rmtree(folder, ignore_errors=True)  # without a summary it is none of ours, or damaged
    with _whole(folder) as partial:
        facts = write_store(encoder.encode(rows), partial, model.task, len(tokenizer))
        data = DataSummary(
            files=tuple(map(str, files)),
            store=str(folder),
            fingerprint=key,
            stage=stage,
            rows=rows.count,
            samples=facts.samples,
            tokens=facts.tokens,
            target_tokens=facts.target_tokens,
            lengths=facts.lengths,
            cuts={name: count for name, count in encoder.cuts.items() if count},
            unknown_share=_unknown_share(TokenStore(partial), tokenizer.unk_token_id),
        )
        (partial / "summary.json").write_text(data.model_dump_json(), encoding="utf-8")
    return data


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Give a hidden folder to write to, renamed to `folder` when all is written: one that exists is complete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise MachineError(
            f"{folder.parent}: the cache cannot be written: {error.strerror}",
            "set XDG_CACHE_HOME to a folder that can be",
        ) from None
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first, with the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Counted:
    """Rows passing by, counted, and told of about once a second."""

    def __init__(self, records: Iterable[Record], doing: str, report: Report) -> None:
        self._records, self._doing, self._report = records, doing, report
        self.count = 0

    def __iter__(self) -> Iterator[Record]:
        told = time.monotonic()
        for record in self._records:
            self.count += 1
            if time.monotonic() - told > 1:
                told = time.monotonic()
                self._report(self._doing, self.count)
            yield record


def _unknown_share(store: TokenStore, unknown_id: int | None) -> float:
    """Return the share of unknown tokens among the first million."""
    if unknown_id is None:
        return 0.0
    first = store.first_tokens(1_000_000)
    return float(np.mean(first == unknown_id))


def _stamps(files: Sequence[Path]) -> Iterator[str]:
    """Yield what tells one state of a file from another: its path, size and time of change."""
    for file in files:
        stat = file.stat()
        yield f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _key(*parts: object) -> str:
    return hashlib.sha256("\n".join([FORMAT, *map(str, parts)]).encode()).hexdigest()[:16]
