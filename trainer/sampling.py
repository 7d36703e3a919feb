"""Samples of data files: as many rows as are wanted, at random or of the best. Knows files of rows. No torch.

Rows are numbered through all files, so that a seed draws the same ones however they are divided among files. What is
held at a time is a piece of a file, the numbers of the rows that are drawn, and a few groups that wait to be written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from autotune.errors import DataError
from trainer.parquet import PROBED_ROWS, Output, Tally, Tokens, check_apart, plain, type_of
from trainer.quality import Judge, Numbers, Runs, Text, Verdict, contents, find_topics, together
from trainer.records import columns, count_rows, find_files, parquet_batches, read_blocks, shape_columns

CHUNK = 2**16
"""Rows that are drawn from at a time: another number would draw others."""
PIECE_ROWS = 2**13
TOPIC_ROWS = 2**13
"""Rows that topics are found in."""
LENGTHS = 4
"""Groups of rows by their length."""
LEAVE = "let nothing write to the files meanwhile; a parquet file that miscounts is damaged"

Told = Callable[[str, int], None]
"""Is told what is being done, and how many rows of it are done."""


@dataclass(frozen=True)
class Wanted:
    """What is to be drawn."""

    rows: int | None
    """Of training; None: `share` of all."""
    share: float
    validation: float
    """Rows of validation for each row of training."""
    smart: bool
    """Whether rows that are worth nothing go first."""
    seed: int

    def asked(self, total: int) -> int:
        """Return the rows of training that were asked for, of so many."""
        return round(total * self.share) if self.rows is None else self.rows

    def of(self, total: int, kept: int) -> tuple[int, int]:
        """Return rows of training and of validation; what is kept is divided among them where it is too little."""
        rows = self.asked(total)
        if rows + ceil(rows * self.validation) > kept:
            rows = round(kept / (1 + self.validation))
        return rows, min(kept - rows, ceil(rows * self.validation))


@dataclass(frozen=True)
class Sampled:
    """What was read, what went and what was written."""

    before: dict[str, float]
    after: dict[str, float]
    validation: dict[str, float] | None
    asked: int
    """Rows of training."""
    enough: bool
    """Whether there were as many, and those of validation."""
    gone: dict[str, int]
    """Rows that are worth nothing, by reason."""
    left_out: tuple[str, ...]
    """Columns that not all files have, or have alike."""
    bytes_before: int
    bytes_after: int
    bytes_validation: int


@dataclass(frozen=True)
class Source:
    """Files of rows of one shape, and their columns in the output."""

    files: tuple[Path, ...]
    total: int
    schema: Any
    trained_on: tuple[str, ...]

    @classmethod
    def of(cls, paths: Sequence[str]) -> tuple[Source, tuple[str, ...]]:
        """Look at files, each of them once; returns what columns are left out too."""
        files = list({file.resolve(): file for file in find_files(paths)}.values())
        counts = {file: count_rows(file) for file in files}
        files = [file for file in files if counts[file]]
        if not files:
            raise DataError(f"{', '.join(map(str, counts))}: no rows")
        shapes = {file: _shape(file) for file in files}
        first, trained_on = files[0], shapes[files[0]][0]
        for file, (names, _) in shapes.items():
            if {*names} - {"input"} != {*trained_on} - {"input"}:
                raise DataError(
                    f"{file}: rows of {' + '.join(names)}, those of {first} are of {' + '.join(trained_on)}",
                    "give files of one kind; chatlm prepare makes them so",
                )
        trained_on = max((names for names, _ in shapes.values()), key=len)
        others: dict[str, set[Any]] = {}
        for _, schema in shapes.values():
            for field in schema:
                others.setdefault(field.name, set()).add(field.type)
        everywhere = [name for name in others if all(name in schema.names for _, schema in shapes.values())]
        kept = [name for name in everywhere if name not in trained_on and len(others[name]) == 1]
        fields = [pa.field(name, type_of(name)) for name in trained_on]
        fields += [pa.field(name, *others[name]) for name in kept]
        for file in files:
            others |= {name: set() for name in _other_keys(file) if name not in others}
        left_out = tuple(name for name in others if name not in {*kept, *trained_on})
        return cls(tuple(files), sum(counts.values()), pa.schema(fields), trained_on), left_out

    def tables(self) -> Iterator[Any]:
        """Read the files in their order, piece by piece; raises DataError where they have other than `total` rows."""
        seen = 0
        for table in self._tables():
            seen += table.num_rows
            if seen > self.total:
                break
            yield table
        if seen != self.total:
            names = ", ".join(map(str, self.files))
            raise DataError(f"{names}: not the {self.total:,} rows that they say, or had at first", LEAVE)

    def _tables(self) -> Iterator[Any]:
        for file in self.files:
            if file.suffix == ".parquet":
                for batch in parquet_batches(file, PIECE_ROWS, every_column=True):
                    yield self._conformed(file, pa.Table.from_batches([batch]))
            else:
                for block in read_blocks([file]):
                    made = {name: pa.array(values, type_of(name)) for name, values in columns(block).items()}
                    yield self._conformed(file, pa.table(made))

    def _conformed(self, file: Path, table: Any) -> Any:
        """Return a table with the columns of the output, by their types."""
        try:
            table = plain(table, [name for name in self.trained_on if name in table.column_names])
            for field in self.schema:
                if field.name not in table.column_names:
                    table = table.append_column(field, pa.nulls(table.num_rows, field.type))
            return table.select(self.schema.names).cast(self.schema)
        except (pa.ArrowException, ValueError, KeyError) as error:
            (said, *_) = str(error).splitlines() or [type(error).__name__]
            raise DataError(
                f"{file}: a column is neither text nor turns: {said}", "chatlm prepare may read it"
            ) from None


def _shape(file: Path) -> tuple[tuple[str, ...], Any]:
    """Return the columns of a file that are trained on, and the schema of all of parquet's."""
    if file.suffix == ".parquet":
        schema = pq.read_schema(file)
        return shape_columns(schema.names, str(file)), schema
    made = columns(next(read_blocks([file])))
    return tuple(made), pa.schema([(name, type_of(name)) for name in made])


def _other_keys(file: Path) -> list[str]:
    """Return the keys of a jsonl file's first row, of which only what is trained on is read."""
    if file.suffix == ".parquet":
        return []
    with file.open("rb") as opened:
        line = next((line for line in opened if line.strip()), b"")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return []
    return list(row) if isinstance(row, dict) else []


def sample(
    paths: Sequence[str],
    wanted: Wanted,
    output: Path,
    validation: Path | None,
    tell: Told,
    tokens: Tokens | None = None,
) -> Sampled:
    """Write rows that are drawn from files to a parquet file, and others to another, no content to both.

    Raises ConfigurationError where an output would be written over an input, DataError for a file that cannot be read,
    and where no row is left, and OSError where the disk refuses.
    """
    source, left_out = Source.of(paths)
    check_apart(source.files, [made for made in (output, validation) if made is not None])
    total = source.total
    output.parent.mkdir(parents=True, exist_ok=True)
    judge = _judged(source, wanted.seed, output.parent, tell) if wanted.smart else None
    kept = np.flatnonzero(judge.verdicts == Verdict.KEPT) if judge is not None else None
    there = total if kept is None else len(kept)
    rows, held_out = wanted.of(total, there)
    if not rows:
        raise DataError(f"no row is left of {total:,}", "ask for more, or leave --smart out")
    if judge is None or kept is None:
        chosen = draw(total, rows + held_out, wanted.seed)
    else:
        chosen = kept[draw_alike(judge.strata(kept, LENGTHS), rows + held_out, wanted.seed)]
    border = _border(drawn(source.tables(), chosen), held_out, wanted.seed) if held_out else -1
    tallies = partial(_tally, seed=wanted.seed, tokens=tokens, repeats=judge is None)
    before = tallies(total)
    with ExitStack() as outputs:
        trained = outputs.enter_context(Output(output, source.schema, tallies(rows)))
        other = trained
        if validation is not None:
            other = outputs.enter_context(Output(validation, source.schema, tallies(held_out)))
        for table in drawn(_looked_at(source.tables(), before, tell), chosen):
            if not held_out:
                trained.add(table)
                continue
            here = contents(Text.of(table), wanted.seed) > border
            trained.add(table.filter(pa.array(here)))
            other.add(table.filter(pa.array(~here)))
    gone = Counter(map(Verdict, judge.verdicts.tolist())) if judge is not None else Counter()
    runs = min(before.runs, trained.tally.runs)
    sides = [tally.summary(runs) for tally in (before, trained.tally, other.tally)]
    if judge is not None:  # who has compared all, and kept none twice
        for side, repeated in zip(sides, (gone[Verdict.DUPLICATE] / total, 0.0, 0.0), strict=True):
            side["duplicates"] = repeated
    return Sampled(
        before=sides[0],
        after=sides[1],
        validation=sides[2] if validation is not None else None,
        asked=wanted.asked(total),
        enough=(rows, held_out) == (wanted.asked(total), ceil(rows * wanted.validation)),
        gone={verdict.name.lower(): count for verdict, count in sorted(gone.items()) if verdict != Verdict.KEPT},
        left_out=left_out,
        bytes_before=sum(file.stat().st_size for file in source.files),
        bytes_after=output.stat().st_size,
        bytes_validation=validation.stat().st_size if validation is not None else 0,
    )


def _tally(rows: int, seed: int, tokens: Tokens | None, *, repeats: bool) -> Tally:
    return Tally(draw(rows, min(PROBED_ROWS, rows), seed), tokens, repeats=repeats)


def draw(total: int, wanted: int, seed: int, chunk: int = CHUNK) -> Numbers:
    """Return which rows are drawn, in their order: without replacement, every set as likely as another.

    How many a chunk has is hypergeometric, given those before; which of it, any.
    """
    random = np.random.default_rng(seed)
    drawn = [np.empty(0, np.int64)]
    for start in range(0, total, chunk):
        rows = min(chunk, total - start)
        count = int(random.hypergeometric(wanted, total - start - wanted, rows))
        wanted -= count
        drawn.append(np.sort(random.choice(rows, count, replace=False, shuffle=False)) + start)
    return np.concatenate(drawn)


def draw_alike(strata: Numbers, wanted: int, seed: int) -> Numbers:
    """Return which of some rows are drawn, in their order: of each stratum its share, to the row."""
    sizes = np.bincount(strata)
    exact = sizes * (wanted / max(1, len(strata)))
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: wanted - counts.sum()]] += 1
    random = np.random.default_rng(seed)
    parts = [
        random.choice(np.flatnonzero(strata == stratum), count, replace=False, shuffle=False)
        for stratum, count in enumerate(counts)
        if count
    ]
    return np.sort(np.concatenate([np.empty(0, np.int64), *parts]))


def drawn(tables: Iterable[Any], chosen: Numbers) -> Iterator[Any]:
    """Yield the rows of these numbers, in their order."""
    seen = 0
    for table in tables:
        here, seen = seen, seen + table.num_rows
        low, high = np.searchsorted(chosen, [here, seen])
        if high > low:
            yield table if high - low == table.num_rows else table.take(pa.array(chosen[low:high] - here))


def _looked_at(tables: Iterable[Any], tally: Tally, tell: Told) -> Iterator[Any]:
    for table in tables:
        tally.add(table)
        tell("drawing", tally.rows)
        yield table


def _judged(source: Source, seed: int, folder: Path, tell: Told) -> Judge:
    vectors = []
    for table in drawn(source.tables(), draw(source.total, min(source.total, TOPIC_ROWS), seed)):
        text = Text.of(table)
        vectors += [Runs.of(text.part(rows).whole).vectors for rows in together(text)]
    with Judge(source.total, find_topics(np.concatenate(vectors), seed), folder) as judge:
        for table in source.tables():
            judge.look(Text.of(table))
            tell("judging", judge.rows)
        judge.decide()
    return judge


def _border(tables: Iterable[Any], held_out: int, seed: int) -> int:
    """Return the number up to which contents are held out: so many rows, or the nearest that divides no content."""
    every = np.sort(np.concatenate([contents(Text.of(table), seed) for table in tables]))
    last = every[held_out - 1]
    below, upto = np.searchsorted(every, last, "left"), np.searchsorted(every, last, "right")
    return int(last) if upto - held_out <= held_out - below else int(last) - 1
