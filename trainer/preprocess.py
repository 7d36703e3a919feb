"""Says what a model is, and turns data into a token store: once, since the cache keeps it by what it was made of."""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import astuple
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock, Timeout

from autotune.errands import DataSummary, ModelSummary, Preprocess, Preprocessed, ShownToken
from autotune.errors import ConfigurationError, MachineError, UserError
from autotune.plan import Stage
from trainer.data import StoreFacts, StoreWriter, TokenStore, contents_of
from trainer.encode import Encoder, ids_of
from trainer.fingerprints import keep_stamps, stamps
from trainer.model import PRESETS, summarise
from trainer.records import Block, Record, demo_files, demo_records, find_files, held_out, parse, read_blocks
from trainer.shards import Part, append, make_shards, useful_processes
from trainer.tokenizer import fingerprint, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = "3"
"""Changes when a store written by an older version would be read or cut in another way."""
SUMMARY = "summary.json"
SAVE_SECONDS = 1.0
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A disk, somebody's share of it, or the largest file there may be."""

Report = Callable[[str, int], None]
"""Told what is being done and how many rows are done."""


def preprocess(errand: Preprocess, report: Report) -> Preprocessed:
    """Tokenize the data, or find it tokenized; count the model's parameters at the tokenizer's vocabulary.

    Raises MachineError where the disk is full or a process is ended: what was tokenized is kept.
    """
    if errand.data is None:
        return _without_data(errand)
    try:
        return _with_data(errand, Source(errand.data, errand.limit), report)
    except BrokenProcessPool:
        raise MachineError(
            "a process that tokenizes was ended from outside, as it is where memory runs out",
            "close other programs, and start again: it goes on from where it was left",
        ) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise MachineError(
            f"{errand.cache_dir}: {error.strerror}",
            "free some of the disk, or set XDG_CACHE_HOME to a folder on another; it goes on from where it was left",
        ) from None


def _with_data(errand: Preprocess, source: Source, report: Report) -> Preprocessed:
    tokenizer = load_tokenizer(str(_tokenizer_folder(errand, source, report)))
    model = summarise(errand.model, len(tokenizer), errand.dropout, errand.freeze)
    _check_length(errand, model)
    stage = errand.stage or source.stage()
    encoder = Encoder(tokenizer, model.task, stage, errand.max_seq_len, errand.max_target_len)
    if model.task == "causal":
        encoder.template.check()
    share, validation = errand.validation_split, None
    data = _store(errand, source, Part(share, held_out=False) if share else None, encoder, report)
    if share:
        validation = _store(errand, source, Part(share, held_out=True), encoder, report)
    elif errand.validation:
        validation = _store(errand, Source(errand.validation, None), None, encoder, report)
    return Preprocessed(
        model=model,
        tokenizer_dir=str(_save_as_used(tokenizer, errand)),
        tokenizer_fingerprint=fingerprint(tokenizer),
        ids=ids_of(tokenizer, model.task, stage),
        data=data,
        validation=validation,
        shown=tuple(_shown(TokenStore(Path(data.store)), tokenizer, errand.show)),
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
        model=model, tokenizer_dir=None, tokenizer_fingerprint=None, ids=None, data=None, validation=None, shown=()
    )


class Source:
    """The rows of files and folders, up to a limit; of the demo data where none are named."""

    def __init__(self, paths: Sequence[str], limit: int | None) -> None:
        self.limit = limit
        self._demo = not paths
        self.files = find_files(paths) if paths else demo_files()

    def blocks(self, skip: int = 0) -> Iterator[Block]:
        """Read blocks of rows, without the first so many."""
        if self._demo:
            records = tuple(islice(demo_records(self.files), self.limit))[skip:]
            return iter([Block(self.files[0].parent, skip + 1, len(records), records)] if records else [])
        return read_blocks(self.files, self.limit, skip)

    def read(self) -> Iterator[Record]:
        """Read from the first row on."""
        return chain.from_iterable(map(parse, self.blocks()))

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
    share = errand.validation_split
    key = _key("tokenizer", *stamps(source.files), size, errand.limit, *([share] if share else []))
    folder = Path(errand.cache_dir) / "tokenizers" / key
    if not (folder / "tokenizer.json").exists():
        with _whole(folder) as partial:
            records = (r for r in source.read() if not share or not held_out(r, share))
            train_tokenizer(Counted(records, "training a tokenizer", report), size, partial)
    return folder


def _save_as_used(tokenizer: PreTrainedTokenizerFast, errand: Preprocess) -> Path:
    """Save the tokenizer with the chat template that it was used with, in a folder that holds nothing else."""
    folder = Path(errand.cache_dir) / "tokenizers" / fingerprint(tokenizer)
    if not folder.exists():
        with _whole(folder) as partial:
            tokenizer.save_pretrained(partial)
    return folder


def _store(errand: Preprocess, source: Source, part: Part | None, encoder: Encoder, report: Report) -> DataSummary:
    """Return what a store holds: one that was made before, or one that is made, from where it was left."""
    limits = (encoder.max_seq_len, encoder.max_target_len)
    rules = (encoder.task, encoder.stage, *limits, source.limit, *(astuple(part) if part else ()))
    states = [*stamps(source.files)]
    key = _key(*states, fingerprint(encoder.tokenizer), *rules)
    folder = Path(errand.cache_dir) / "tokens" / key
    with _alone(folder, report) as partial:
        if not (folder / SUMMARY).exists():
            shutil.rmtree(folder, ignore_errors=True)  # without a summary it is none of ours, or damaged
            facts = _write(source, part, encoder, partial, report)
            data = DataSummary(
                files=tuple(map(str, source.files)),
                store=str(folder),
                fingerprint=key,
                contents=contents_of(partial),
                stage=encoder.stage,
                rows=facts.rows,
                samples=facts.samples,
                tokens=facts.tokens,
                target_tokens=facts.target_tokens,
                lengths=facts.lengths,
                longest_row=facts.longest,
                cuts={name: count for name, count in facts.cuts.items() if count},
                unknown_share=_unknown_share(TokenStore(partial), encoder.tokenizer.unk_token_id),
            )
            keep_stamps(source.files, states, partial)
            (partial / SUMMARY).write_text(data.model_dump_json(), encoding="utf-8")
            partial.rename(folder)
    kept = DataSummary.model_validate_json((folder / SUMMARY).read_text(encoding="utf-8"))
    return kept.model_copy(update={"store": str(folder)})  # the cache may have been moved


def _write(source: Source, part: Part | None, encoder: Encoder, folder: Path, report: Report) -> StoreFacts:
    """Tokenize what is not yet in the folder, and save about once a second how far it came."""
    processes = useful_processes(sum(file.stat().st_size for file in source.files))
    with StoreWriter(folder, encoder.task) as writer:
        saved = time.monotonic()
        if writer.facts.rows_read:
            report("tokenizing, from where it was left", writer.facts.rows_read)
        for shard in make_shards(encoder, part, source.blocks(writer.facts.rows_read), processes):
            append(writer, shard)
            if time.monotonic() - saved > SAVE_SECONDS:
                writer.save()
                report("tokenizing", writer.facts.rows_read)
                saved = time.monotonic()
        if part is not None and not writer.facts.rows:
            raise _empty_part(part, writer.facts.rows_read)
        writer.finish()
    return writer.facts


def _empty_part(part: Part, rows: int) -> ConfigurationError:
    where = "is held out" if part.held_out else "is left to train on"
    return ConfigurationError(
        f"with --validation-split {part.share:g} none of the {rows:,} rows {where}",
        "give another share, or a file of its own: --validation FILE",
    )


@contextmanager
def _alone(folder: Path, report: Report) -> Iterator[Path]:
    """Give a hidden folder to write to, to one process at a time; it is kept where it was left, but not bad data."""
    partial = folder.with_name(f".{folder.name}")
    if (folder / SUMMARY).exists():
        yield partial
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(partial.with_suffix(".lock"))
        if not _taken(lock):
            report("waiting for another process that tokenizes the same", 0)
            lock.acquire()
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        yield partial
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if partial.exists() and (folder / SUMMARY).exists():  # another made it while this one waited
            shutil.rmtree(partial)
        with suppress(OSError):  # Windows keeps what is open
            Path(lock.lock_file).unlink()
        lock.release()


def _taken(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _unwritable(folder: Path, error: OSError) -> MachineError:
    return MachineError(
        f"{folder.parent}: the cache cannot be written: {error.strerror}",
        "set XDG_CACHE_HOME to a folder that can be",
    )


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Give a hidden folder to write to, renamed to `folder` when all is written: one that exists is complete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from None
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


def _shown(store: TokenStore, tokenizer: PreTrainedTokenizerFast, count: int) -> Iterator[tuple[ShownToken, ...]]:
    """Yield the first samples token by token; tokens that are parts of one character are shown together."""
    for i in range(min(count, len(store))):
        tokens, trained = store.tokens(i).tolist(), np.zeros(len(store.tokens(i)), bool)
        for start, end in store.spans(i):
            trained[start:end] = True
        shown, first = [], 0
        for end in range(1, len(tokens) + 1):
            text = tokenizer.decode(tokens[first:end], clean_up_tokenization_spaces=False)
            whole = "\ufffd" not in text or end == len(tokens) or trained[end] != trained[first]
            if whole or end - first == MOST_BYTES:
                shown.append(ShownToken(text=text, tokens=end - first, trained=bool(trained[first])))
                first = end
        yield tuple(shown)


MOST_BYTES = 4
"""Of a character in UTF-8."""


def _key(*parts: object) -> str:
    return hashlib.sha256("\n".join([FORMAT, *map(str, parts)]).encode()).hexdigest()[:16]
