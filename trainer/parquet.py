"""Parquet that is written: there whole or not at all, with checksums; and what its rows are like. No torch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from math import ceil
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from autotune.disk import sync
from autotune.errors import ConfigurationError
from trainer.quality import Numbers, Runs, Text, contents, together

GROUP_ROWS, GROUP_BYTES = 2**17, 2**26
"""What is written together: so many rows at most, and hardly more bytes."""
AHEAD = 2
"""Groups that wait to be written."""
LONGEST = 2**20
"""Characters from which rows are counted as equally long, but for the longest."""
PROBED_ROWS, PROBED_RUNS = 2**13, 2**20
"""Rows whose words, and tokens, are looked at; and runs of characters that are kept of them."""
TYPES = {"conversations": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))}
"""Of columns that are trained on; the others are text."""

Tokens = Callable[[list[str]], list[int]]
"""Returns of texts how many tokens each has."""


def type_of(name: str) -> Any:
    """Return the type of a column that is trained on."""
    return TYPES.get(name, pa.string())


def plain(table: Any, names: Sequence[str]) -> Any:
    """Return a table whose columns that are trained on have the types that they are written with.

    Raises ArrowException where one is neither text nor turns.
    """
    for name in names:
        column, at = table.column(name), table.column_names.index(name)
        table = table.set_column(at, name, _turns(column) if name in TYPES else column.cast(pa.string()))
    return table


def _turns(column: Any) -> Any:
    if pa.types.is_null(column.type):
        return column.cast(TYPES["conversations"])
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise pa.ArrowTypeError(f"{column.type} is no list")
    turns = column.combine_chunks()
    parts = [pc.struct_field(turns.flatten(), name).cast(pa.string()) for name in ("role", "content")]
    counts = pc.fill_null(pc.list_value_length(turns), 0).to_numpy(zero_copy_only=False)
    ends = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    return pa.ListArray.from_arrays(ends, pa.StructArray.from_arrays(parts, ["role", "content"]))


def check_apart(read: Iterable[Path], written: Iterable[Path]) -> None:
    """Raise ConfigurationError where a file that would be written is one that is read, or a folder."""
    for file in written:
        if file.is_dir():
            raise ConfigurationError(f"{file} is a folder", "give a file in it")
        if file.exists() and any(file.samefile(other) for other in read):
            raise ConfigurationError(f"{file} is one of the files that are read", "write to another")


class Tally:
    """How long rows are, in characters of what is trained on, and what some of them are like."""

    def __init__(self, probed: Numbers, tokens: Tokens | None = None, *, repeats: bool = True) -> None:
        self._contents: list[Any] | None = [] if repeats else None
        self.rows, self._characters, self._most, self._probed, self._tokens = 0, 0, 0, probed, tokens
        self._counts = np.zeros(LONGEST + 1, np.int64)
        self._hashes, self.runs = [np.empty(0, np.uint64)], 0
        self._token_counts: list[int] = []

    def add(self, table: Any) -> None:
        """Count the next rows."""
        text = Text.of(table)
        lengths = text.characters
        counted = np.bincount(np.minimum(lengths, LONGEST))
        self._counts[: len(counted)] += counted
        self._characters += int(lengths.sum())
        self._most = max(self._most, int(lengths.max(initial=0)))
        if self._contents is not None:
            self._contents.append(contents(text, 0))
        low, high = np.searchsorted(self._probed, [self.rows, self.rows + len(lengths)])
        if high > low:
            self._probe(text.take(self._probed[low:high] - self.rows))
        self.rows += len(lengths)

    def _probe(self, text: Text) -> None:
        for rows in together(text):
            part = text.part(rows)
            if self.runs < PROBED_RUNS:
                hashes = Runs.of(part.whole).hashes[: PROBED_RUNS - self.runs]
                self._hashes.append(hashes)
                self.runs += len(hashes)
            if self._tokens is not None:
                self._token_counts += self._tokens(part.whole.to_pylist())

    def summary(self, runs: int) -> dict[str, float]:
        """Return rows, characters, of a row mean, median, 95th percentile and most, shares of new runs and of repeats.

        Runs are so many, drawn from those that were kept: their share falls with their number. A repeat has the words
        of another row. With a tokenizer tokens too, of the rows that were looked at.
        """
        upto = np.cumsum(self._counts)
        p50, p95 = (int(np.searchsorted(upto, ceil(share * self.rows))) for share in (0.5, 0.95))
        drawn = np.random.default_rng(0).permutation(np.concatenate(self._hashes))[:runs]
        distinct = len(np.unique(np.sort(drawn))) / max(1, len(drawn))
        made: dict[str, float] = {
            "rows": self.rows, "characters": self._characters, "mean": self._characters / max(1, self.rows),
            "p50": p50, "p95": p95, "max": self._most, "distinct_runs": distinct,
        }  # fmt: skip
        if self._contents is not None:  # eight bytes a row, sorted once
            every = np.sort(np.concatenate([np.empty(0, np.uint64), *self._contents]))
            made["duplicates"] = float(np.sum(every[1:] == every[:-1])) / max(1, self.rows)
        if self._token_counts:
            counts = np.array(self._token_counts)
            made["tokens_mean"] = float(counts.mean())
            for share in (50, 95):
                made[f"tokens_p{share}"] = int(np.quantile(counts, share / 100, method="inverted_cdf"))
            made["tokens_max"] = int(counts.max())
        return made


class Output:
    """A parquet file that has its name once all of it is on the disk; written in a thread, beside what reads.

    Raises OSError where the disk refuses; nothing of it is left then.
    """

    def __init__(self, file: Path, schema: Any, tally: Tally) -> None:
        self.file, self.schema, self.tally = file, schema, tally
        self._partial = file.with_name(f".{file.name}.partial")
        self._group: list[Any] = []
        self._rows, self._bytes = 0, 0
        self._waiting: queue.Queue[Any] = queue.Queue(AHEAD)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write_all, daemon=True)

    def __enter__(self) -> Self:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._partial.open("wb").close()  # what cannot be written is told before all is read
        self._thread.start()
        return self

    def add(self, table: Any) -> None:
        """Take rows of the schema's columns."""
        self.tally.add(table)
        self._group.append(table)
        self._rows, self._bytes = self._rows + table.num_rows, self._bytes + table.nbytes
        if self._rows >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        if self._rows:
            self._waiting.put(pa.concat_tables(self._group))
        self._group, self._rows, self._bytes = [], 0, 0
        if self._error is not None:
            raise self._error

    def _write_all(self) -> None:
        groups = iter(self._waiting.get, None)
        try:
            with pq.ParquetWriter(self._partial, self.schema, compression="zstd", write_page_checksum=True) as writer:
                for group in groups:
                    writer.write_table(group, row_group_size=group.num_rows)
        except Exception as error:  # noqa: BLE001 # told by the thread that waits for us
            self._error = error
            for _ in groups:
                pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._hand_over()
        finally:
            self._waiting.put(None)
            self._thread.join()
            if kind is not None or self._error is not None:
                self._partial.unlink(missing_ok=True)
        if self._error is not None and kind is None:
            raise self._error
        if kind is None:
            sync(self._partial)
            self._partial.replace(self.file)
            sync(self.file.parent)
