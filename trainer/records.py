"""Data files -> blocks of rows -> conversations and documents. Knows files and columns, nothing of tokens. No torch.

A row that is not what its columns promise is an error that names the file and the row.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import psutil

from autotune.errors import ConfigurationError, DataError

SUFFIXES = (".parquet", ".jsonl")
ROLES = ("system", "user", "assistant")
LONGEST_LINE = 2**24
"""Bytes of a jsonl line: more is no row, and would be held several times over."""
LONGEST_ROW = LONGEST_LINE
"""Bytes of a row of parquet."""
BLOCK_ROWS, BLOCK_BYTES = 256, 2**18
"""A block is read as one piece: so many rows at most, and of text hardly more bytes."""
SPLIT = "split what is longer into several rows"
BATCH_BYTES = 2**26
"""Of parquet that is decoded at a time, by what the file says of itself."""
DECODING_BYTES = 2**29
"""Of address space that decoding may take beyond what the process has, whatever the file says: some KB can hold GB."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """A row of a data file: a conversation, or a document of plain text."""

    place: str
    turns: tuple[Turn, ...] = ()
    text: str | None = None


Row = dict[str, Any]


def find_files(paths: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Return the data files among files and folders, a folder's in the order of their names.

    Raises DataError for a path that is not there, a folder without data, a kind of file that is not read.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())
            if not inside:
                raise DataError(f"{path}: no {' or '.join(suffixes)} file in this folder")
            files += inside
        elif not path.exists():
            raise DataError(f"{path}: no such file", _similar_names(path))
        elif path.suffix not in suffixes:
            raise DataError(
                f"{path}: files of type {path.suffix or 'without an ending'!r} are not read",
                "give parquet or jsonl, one object a line; chatlm prepare makes parquet of json and csv",
            )
        else:
            files.append(path)
    return files


def _similar_names(path: Path) -> str:
    folder = path.parent
    names = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES) if folder.is_dir() else []
    return f"{folder} has {', '.join(names[:5])}" if names else f"folder {folder.resolve()} has no data files"


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one file as they lie there, not judged yet."""

    file: Path
    first: int
    """Number of the first row, or line."""
    rows: int
    raw: Any
    """Lines, blank ones among them; a batch of Arrow; or records."""

    def part(self, start: int, stop: int) -> Block:
        """Return rows from start to stop."""
        if start <= 0 and stop >= self.rows:
            return self
        if isinstance(self.raw, list):
            lines = [i for i, line in enumerate(self.raw) if not _blank(line)]
            first, end = lines[start], lines[min(stop, self.rows) - 1] + 1
            return Block(self.file, self.first + first, len(lines[start:stop]), self.raw[first:end])
        raw = self.raw[start:stop]
        return Block(self.file, self.first + start, len(raw), raw)


def read_records(files: Sequence[Path], limit: int | None = None) -> Iterator[Record]:
    """Read the rows of all files in order, at most `limit` of them.

    Raises DataError for an unreadable file, missing columns, a row of a wrong type, and when there is no row at all.
    """
    return chain.from_iterable(map(parse, read_blocks(files, limit)))


def read_blocks(files: Sequence[Path], limit: int | None = None, skip: int = 0) -> Iterator[Block]:
    """Read the rows of all files in order, up to row `limit`, without the first `skip`; rows are not looked into.

    Raises DataError for a file that cannot be read or lacks the columns, and when there is no row at all.
    """
    seen = 0
    for block in chain.from_iterable(map(_blocks_of, files)):
        before, seen = seen, seen + block.rows
        stop = block.rows if limit is None else min(block.rows, limit - before)
        if stop > skip - before:
            yield block.part(max(0, skip - before), stop)
        if seen == limit or stop < block.rows:
            return
    if not seen:
        raise DataError(f"{', '.join(map(str, files))}: no rows")


def parse(block: Block) -> Iterator[Record]:
    """Read the rows of a block as what their columns promise; raises DataError with the place of one that is not."""
    if isinstance(block.raw, tuple):
        yield from block.raw
        return
    for place, row in _jsonl_rows(block) if isinstance(block.raw, list) else _parquet_rows(block):
        yield _shape_of(row, place)(row, place)


def columns(block: Block) -> dict[str, list[Any]]:
    """Return the rows of a block of lines by what is trained on: the values of each column.

    Raises DataError with the place of a row that is not what its columns promise, or has others than the first.
    """
    made: dict[str, list[Any]] = {}
    for place, row in _jsonl_rows(block):
        _shape_of(row, place)(row, place)
        names = shape_columns(row.keys() | ({"input"} if "instruction" in row else set()), place)
        if made and made.keys() != {*names}:
            raise DataError(
                f"{place}: a row of {' + '.join(names)} among those of {' + '.join(made)}",
                "give files of one kind",
            )
        for name in names:
            made.setdefault(name, []).append(row.get(name) or "" if name == "input" else row[name])
    return made


def held_out(record: Record, share: float) -> bool:
    """Say whether a record is among the share that is not trained on: by its content alone, wherever it stands."""
    parts = [record.text] if record.text is not None else [part for t in record.turns for part in (t.role, t.content)]
    content = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(content, "big") < share * 2**64


def _blocks_of(file: Path) -> Iterator[Block]:
    return _parquet_blocks(file) if file.suffix == ".parquet" else _jsonl_blocks(file)


def _parquet_blocks(file: Path) -> Iterator[Block]:
    number = 1
    for batch in parquet_batches(file, BLOCK_ROWS):
        yield from _pieces(file, number, batch)
        number += batch.num_rows


def parquet_batches(file: Path, most_rows: int, *, every_column: bool = False) -> Iterator[Any]:
    """Read row groups piece by piece, so that memory does not grow with the file: batches of Arrow.

    Without `every_column` those that are trained on, of which there must be some. Raises DataError for a file that
    cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        # Not read ahead: what is read of one group of rows would be held until the last one was.
        with pq.ParquetFile(file, buffer_size=BLOCK_BYTES, pre_buffer=False) as parquet:
            rows = _rows_at_once(parquet.metadata, most_rows)
            names = parquet.schema_arrow.names
            columns = names if every_column else [name for name in names if name in COLUMNS]
            if not columns and names:
                _shape_of(dict.fromkeys(names), str(file))
            batches = parquet.iter_batches(batch_size=rows, columns=columns, use_threads=False)
            while (batch := _bounded(lambda: next(batches, None))) is not None:
                yield batch
                number += batch.num_rows
    except MemoryError:
        raise _too_large(file, number) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(file, number, error) from None


def count_rows(file: Path) -> int:
    """Return how many rows a file has: of parquet by what it says of itself, of jsonl lines that are not blank."""
    if file.suffix != ".parquet":
        return sum(not _blank(line) for line in _lines(file))
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(file).num_rows)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(file, 0, error) from None


def rows_of_parquet(file: Path) -> Iterator[tuple[str, Row]]:
    """Read rows with their places, every column of them."""
    number = 1
    for batch in parquet_batches(file, BLOCK_ROWS, every_column=True):
        yield from _parquet_rows(Block(file, number, batch.num_rows, batch))
        number += batch.num_rows


def lines_of(file: Path) -> Iterator[tuple[int, bytes]]:
    """Read lines that are not blank with their numbers; raises DataError for one too long to be a row."""
    for number, line in enumerate(_lines(file), 1):
        if not _blank(line):
            yield number, line


def _rows_at_once(metadata: Any, most_rows: int) -> int:
    """Return how many rows are decoded at a time: fewer where they are long."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    longest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(most_rows, BATCH_BYTES // max(1, longest)))


def _pieces(file: Path, first: int, batch: Any) -> Iterator[Block]:
    """Yield what was decoded as one block, or row by row where it is large; raises DataError for a row too long."""
    if batch.num_rows and batch.nbytes <= LONGEST_ROW:
        yield Block(file, first, batch.num_rows, batch)
        return
    for number, at in enumerate(range(batch.num_rows), first):
        row = _without_dictionaries(batch[at : at + 1])
        if row.nbytes > LONGEST_ROW:
            raise DataError(f"{file}: row {number}: longer than {LONGEST_ROW // 2**20} MiB", SPLIT)
        yield Block(file, number, 1, row)


def _without_dictionaries(row: Any) -> Any:
    """Return a row with its own values where it points into a dictionary, which counts as all of it."""
    columns = [c.dictionary_decode() if hasattr(c, "dictionary_decode") else c for c in row.columns]
    return type(row).from_arrays(columns, names=row.schema.names)


def _parquet_rows(block: Block) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa

    try:
        rows = _bounded(block.raw.to_pylist)
    except MemoryError:
        raise _too_large(block.file, block.first - 1) from None
    except (pa.ArrowException, ValueError, OverflowError) as error:  # for what Python has no value for
        raise _unreadable(block.file, block.first - 1, error) from None
    for number, row in enumerate(rows, block.first):
        yield f"{block.file}: row {number}", row


def _bounded(decode: Callable[[], Any]) -> Any:
    """Decode under a limit of memory that the kernel holds; raises MemoryError beyond it."""
    if sys.platform != "linux":  # elsewhere an address space has no limit
        return decode()
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + DECODING_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(most, soft), hard))
    try:
        return decode()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_large(file: Path, number: int) -> DataError:
    return DataError(f"{file}: the rows after row {number} take more than {DECODING_BYTES // 2**20} MiB to read", SPLIT)


def _unreadable(file: Path, number: int, error: BaseException) -> DataError:
    return DataError(f"{file}: not a readable parquet file after row {number}: {_first_line(error)}")


def _jsonl_blocks(file: Path) -> Iterator[Block]:
    """Read lines as they are, counted from 1."""
    first, rows, size = 1, 0, 0
    lines: list[bytes] = []
    for line in _lines(file):
        lines.append(line)
        rows, size = rows + (not _blank(line)), size + len(line)
        if len(lines) == BLOCK_ROWS or size >= BLOCK_BYTES:
            if rows:
                yield Block(file, first, rows, lines)
            first, rows, size, lines = first + len(lines), 0, 0, []
    if rows:
        yield Block(file, first, rows, lines)


def _jsonl_rows(block: Block) -> Iterator[tuple[str, Row]]:
    """Read one object a line; blank lines are passed over."""
    for number, line in enumerate(block.raw, block.first):
        if _blank(line):
            continue
        place = f"{block.file}: line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: not UTF-8 at byte {error.start + 1}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON: {_first_line(error)}") from None
        if not isinstance(row, dict):
            raise DataError(f"{place}: an object was expected, not {_kind(row)}")
        yield place, row


def _blank(line: bytes) -> bool:
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as opened:
            for number in count(1):
                line = opened.readline(LONGEST_LINE + 1)
                if len(line) > LONGEST_LINE:
                    raise DataError(
                        f"{file}: line {number}: longer than {LONGEST_LINE // 2**20} MiB",
                        "give one object a line; split what is longer into several",
                    )
                if not line:
                    return
                yield line
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def shape_columns(names: Collection[str], place: str) -> tuple[str, ...]:
    """Return those of some columns that are trained on; raises DataError where they are of no shape that is known."""
    shape = _shape_of(dict.fromkeys(names), place)
    (columns,) = (columns for columns, read in SHAPES if read is shape)
    return (*columns, *(["input"] if "instruction" in columns and "input" in names else []))


def _shape_of(row: Row, place: str) -> Callable[[Row, str], Record]:
    for columns, read in SHAPES:
        if all(name in row for name in columns):
            return read
    known = "; ".join(" + ".join(columns) for columns, _ in SHAPES)
    raise DataError(
        f"{place}: none of the known columns among {', '.join(row) or 'none'}",
        f"known are {known}; chatlm prepare knows more",
    )


def _conversation(row: Row, place: str) -> Record:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else _kind(turns)
        raise DataError(f"{place}: `conversations` must be a list of turns, not {found}")
    return Record(place, tuple(_turn(turn, f"{place}, turn {i}") for i, turn in enumerate(turns, 1)))


def _turn(turn: object, place: str) -> Turn:
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        found = f"one with {', '.join(turn) or 'nothing'}" if isinstance(turn, dict) else _kind(turn)
        raise DataError(f"{place}: an object with `role` and `content` was expected, not {found}")
    if turn["role"] not in ROLES:
        raise DataError(f"{place}: role {turn['role']!r} is not one of {', '.join(ROLES)}")
    return Turn(turn["role"], _text(turn, "content", place))


def _pair(row: Row, place: str) -> Record:
    return _exchange(_text(row, "prompt", place), _text(row, "response", place), place)


def _instruction(row: Row, place: str) -> Record:
    prompt = _text(row, "instruction", place)
    if row.get("input"):
        prompt += "\n" + _text(row, "input", place)
    return _exchange(prompt, _text(row, "output", place), place)


def _document(row: Row, place: str) -> Record:
    return Record(place, text=_text(row, "text", place))


def _exchange(prompt: str, response: str, place: str) -> Record:
    return Record(place, (Turn("user", prompt), Turn("assistant", response)))


def _text(row: Row, name: str, place: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{place}: `{name}` must be text, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair, which is no character
        raise DataError(f"{place}: `{name}` is not text at character {error.start + 1}: {error.reason}") from None
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return "a number" if type(value) in (int, float) else names.get(type(value), type(value).__name__)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


SHAPES: tuple[tuple[tuple[str, ...], Callable[[Row, str], Record]], ...] = (
    (("conversations",), _conversation),
    (("prompt", "response"), _pair),
    (("instruction", "output"), _instruction),
    (("text",), _document),
)
"""Columns that tell what a row is, in the order in which they are looked for."""
COLUMNS = {name for columns, _ in SHAPES for name in columns} | {"input"}


def demo_files() -> list[Path]:
    """Return the files of the demo data: the Chinese dialogues of chatterbot-corpus.

    Raises ConfigurationError where the `demo` extra is not installed.
    """
    try:
        import chatterbot_corpus
        import yaml  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            "no data was given, and the demo data is not installed",
            "give --data FILE, or: pip install 'chatlm[demo]'",
        ) from None
    return sorted((Path(chatterbot_corpus.__file__).parent / "data" / "chinese").glob("*.yml"))


def demo_records(files: Iterable[Path]) -> Iterator[Record]:
    """Read dialogues whose turns go to and fro; a last turn without an answer is left out."""
    import yaml

    for file in files:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        dialogues = yaml.load(file.read_text(encoding="utf-8"), loader)["conversations"]  # noqa: S506 # a safe loader
        for number, dialogue in enumerate(dialogues, 1):
            turns = [str(text) for text in dialogue[: len(dialogue) // 2 * 2]]
            roles = ("user", "assistant") * (len(turns) // 2)
            if turns:
                yield Record(f"{file.name}: dialogue {number}", tuple(map(Turn, roles, turns)))
