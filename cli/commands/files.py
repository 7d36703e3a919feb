"""Commands that make data files of data files, here and at once: they take no model, and no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autotune.disk import write_whole
from autotune.errors import ConfigurationError, MachineError
from cli.render.console import print_json, say, warn
from cli.render.files import print_inspected, print_prepared, print_sampled
from trainer.parquet import Tokens, check_apart
from trainer.preparing import COLUMNS_OF, Side, prepare
from trainer.sampling import Wanted, sample
from trainer.vocabulary import inspect, some_texts, train

SAID_EVERY = 2**20
"""Rows."""


def sample_command(
    inputs: list[str],
    output: str,
    wanted: Wanted,
    validation: str | None,
    tokenizer: str | None,
    report: str | None,
    *,
    as_json: bool,
) -> None:
    """Draw rows, write them, and say what went, and how the data was and is."""
    _check_written([output, validation], report, inputs)
    tokens = _tokens(tokenizer) if tokenizer is not None else None
    with _writing():
        made = sample(inputs, wanted, Path(output), Path(validation) if validation else None, _teller(), tokens)
    if made.left_out:
        warn(f"columns that the files do not all have, or not alike, are left out: {', '.join(made.left_out)}")
    if not made.enough:
        and_more = f", and {made.validation['rows']:,} of validation" if made.validation else ""
        warn(f"{made.asked:,} rows were asked for: there are {made.after['rows']:,}{and_more}")
    elif made.validation is not None and not made.validation["rows"]:
        warn(f"{validation} has no row: too few contents to divide")
    if not _gave(asdict(made), report, as_json=as_json):
        print_sampled(made, output, validation)


def prepare_command(
    inputs: list[str], sides: list[Side], kind: str | None, limit: int | None, report: str | None, *, as_json: bool
) -> None:
    """Make clean parquet of files as people have them, and say what was cleaned and what rejected."""
    if kind is not None and kind not in COLUMNS_OF:
        raise ConfigurationError(f"--as {kind} is none of {', '.join(COLUMNS_OF)}")
    _check_written([str(side.file) for side in sides], report, inputs)
    with _writing():
        made = prepare(inputs, sides, kind, limit, _teller())
    for name, side in made.sides.items():
        if not side["rows"]:
            warn(f"{name} has no row: too few contents to divide")
    if not _gave(asdict(made), report, as_json=as_json):
        print_prepared(made)


def train_tokenizer_command(
    inputs: list[str], output: str, entries: int, seed: int, report: str | None, *, as_json: bool
) -> None:
    """Train a tokenizer on rows that are drawn from files, and say what it makes of others."""
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} is there already", "give --output a new folder")
    with _writing():
        learned, made = train(inputs, entries, folder, seed, _teller())
    say(f"{made.entries:,} entries learned from {learned:,} characters: {folder}")
    if not _gave(asdict(made) | {"learned_characters": learned}, report, as_json=as_json):
        print_inspected(made)


def inspect_tokenizer_command(folder: str, inputs: list[str], seed: int, *, as_json: bool) -> None:
    """Say what a tokenizer has and lacks, and how it cuts the texts of some files."""
    made = inspect(Path(folder), some_texts(inputs, seed) if inputs else [])
    if not _gave(asdict(made), None, as_json=as_json):
        print_inspected(made)
    for defect in made.defects:
        warn(f"{folder}: {defect}")


def _check_written(names: list[str | None], report: str | None, inputs: list[str]) -> None:
    """Raise ConfigurationError for names that are given twice, or are none of parquet's, before anything is read."""
    files = [Path(name).absolute() for name in names if name is not None]
    for file in files:
        if file.suffix != ".parquet":
            raise ConfigurationError(f"{file.name}: parquet is what is written", "give it a name that ends in .parquet")
    if report is not None:
        files.append(Path(report).absolute())
        check_apart([file for file in map(Path, inputs) if file.exists()], [Path(report)])
        if not files[-1].parent.is_dir():
            raise ConfigurationError(f"{report}: no such folder", "give --report a file in one that is there")
    for file in files:
        if files.count(file) > 1:
            raise ConfigurationError(f"{file.name} is given twice", "give each file that is written a name of its own")


def _tokens(folder: str) -> Tokens:
    """Return what counts the tokens of texts."""
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 # the library raises no other
        raise ConfigurationError(f"{file}: not a tokenizer: {error}", "give the folder of one") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [len(made.ids) for made in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


@contextmanager
def _writing() -> Iterator[None]:
    """Tell of a place that cannot be written; what cannot be read is told where it is read."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"{error.filename or 'a file that is written'}: {error.strerror}",
            "free some of the disk, or give outputs in a folder that can be written",
        ) from None


def _teller() -> Callable[[str, int], None]:
    """Return what says now and then how far it is."""
    said = 0

    def tell(doing: str, rows: int) -> None:
        nonlocal said
        if rows // SAID_EVERY != said:
            said = rows // SAID_EVERY
            say(f"{doing}: {rows:,} rows")

    return tell


def _gave(made: dict[str, Any], report: str | None, *, as_json: bool) -> bool:
    """Give what was made as data, to stdout and to a file as was asked; says whether the former."""
    text = json.dumps(made, indent=2, ensure_ascii=False)
    if as_json:
        print_json(text)
    if report is not None:
        with _writing():
            write_whole(Path(report), text + "\n")
    return as_json
