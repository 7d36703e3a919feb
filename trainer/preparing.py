"""Rows as people have them -> clean parquet, and what was wrong with the others. Knows columns, no tokens. No torch.

Read are json (an array, or objects one after another), jsonl, csv and parquet, with the columns and roles that are
common. What was cleaned is told rule by rule; what is rejected lies, row by row, in a file beside the output.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pyarrow as pa

from autotune.disk import sync
from autotune.errors import ConfigurationError, DataError
from trainer.parquet import PROBED_ROWS, Output, Tally, check_apart, type_of
from trainer.records import LONGEST_LINE, Record, Row, Turn, find_files, lines_of, rows_of_parquet

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
Kind = Literal["pairs", "conversations", "text"]
"""What columns an output has."""
COLUMNS_OF: dict[Kind, tuple[str, ...]] = {
    "pairs": ("prompt", "response"),
    "conversations": ("conversations",),
    "text": ("text",),
}
GROUP_ROWS, GROUP_CHARACTERS = 4096, 2**22
"""Rows that become a table together: so many at most, and hardly more characters."""
CHUNK_CHARACTERS = 2**20
BLANKS = " \t\r\n"
BROKEN = "mend it there, or give jsonl, of which a bad line is rejected and the others are read"
ENCODE = "save it as UTF-8: iconv -f GB18030 -t UTF-8 FILE > NEW"
RAW_CHARACTERS = 2000
"""What the file of rejects has of a row."""
EXCHANGES = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("query", "response"))
EXCHANGE = ("user", "assistant")
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    "system": "system",
}
END_MARKS = ("[EOS]", "</s>", "<eos>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>")
UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\u200b\u2060\ufffe\uffff]")
HALVES = re.compile("[\ud800-\udfff]")


def _without_end_marks(text: str) -> str:
    bare = text.rstrip()
    if not bare.endswith(END_MARKS):
        return text
    while bare.endswith(END_MARKS):
        bare = next(bare.removesuffix(mark) for mark in END_MARKS if bare.endswith(mark)).rstrip()
    return bare


RULES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("line ends made one character", lambda text: text.replace("\r\n", "\n").replace("\r", "\n")),
    ("characters that nobody sees removed", lambda text: UNSEEN.sub("", text)),
    ("accents joined with their letters (NFC)", lambda text: unicodedata.normalize("NFC", text)),
    ("end marks of a tokenizer removed", _without_end_marks),
    ("blanks at the ends removed", str.strip),
)
"""How texts are cleaned, in this order."""
RENAMED, SYSTEM = "roles renamed", "system turns that say nothing dropped"
BEFORE, AFTER = "turns before the first question dropped", "questions without answer dropped"
MOST_RULES = 50
"""Beyond which columns that are left out are not told by name."""


class RejectedError(Exception):
    """Why a row is not taken."""


@dataclass(frozen=True)
class NoRow:
    """What stands where a row should, and why it is none."""

    why: str
    text: str


@dataclass
class Told:
    """In how many rows something was met, and where first."""

    rows: int
    first: str


@dataclass(frozen=True)
class Side:
    """A file that takes a share of the rows, by their content."""

    file: Path
    share: float


@dataclass(frozen=True)
class Prepared:
    """What became of the rows."""

    rows: int
    """Read."""
    cleaned: dict[str, Told]
    rejected: dict[str, Told]
    rejects: str | None
    """Where they are."""
    sides: dict[str, dict[str, float]]
    """Of each file that was written: rows, lengths, variety, bytes."""


def prepare(
    paths: Sequence[str], sides: Sequence[Side], kind: Kind | None, limit: int | None, tell: Callable[[str, int], None]
) -> Prepared:
    """Write rows that are as they should be to parquet files, and the others beside the last of them.

    Each side takes its share of what those before it leave, by content; the last takes the rest. `kind` None: that of
    the first row. Raises ConfigurationError where an output would be written over an input, DataError for a file that
    cannot be read or where no row is as it should be, OSError where the disk refuses.
    """
    files = list({file.resolve(): file for file in find_files(paths, SUFFIXES)}.values())
    rejects = Rejects(rejects_of(sides[-1].file))
    check_apart(files, [*(side.file for side in sides), rejects.file])
    cleaning, read = Cleaning(kind), 0
    with ExitStack() as opened:
        opened.enter_context(rejects)
        waiting = [Waiting(side.file) for side in sides]
        for place, row in islice(read_rows(files), limit):
            read += 1
            tell("preparing", read)
            try:
                record = cleaning.record(place, row)
            except RejectedError as error:
                rejects.add(place, str(error), row)
                continue
            if not waiting[0].output:
                for side in waiting:
                    side.open(opened, cleaning.kind)
            content = _place_of(record)
            waiting[next(i for i, side in enumerate(sides) if content < side.share)].add(cleaning.columns(record))
        if not waiting[0].output:
            why = next((f"; {told.first}: {why}" for why, told in rejects.why.items()), "")
            raise DataError(f"no row of {read:,} is as it should be{why}")
        for side in waiting:
            side.hand_over()
    made = [side.output for side in waiting if side.output is not None]
    runs = min(output.tally.runs for output in made)
    return Prepared(
        rows=read,
        cleaned=cleaning.rules,
        rejected=rejects.why,
        rejects=str(rejects.file) if rejects.why else None,
        sides={str(output.file): output.tally.summary(runs) | {"bytes": output.file.stat().st_size} for output in made},
    )


def rejects_of(output: Path) -> Path:
    """Return where rows that are not taken lie."""
    return output.with_suffix(".rejects.jsonl")


def _place_of(record: Record) -> float:
    """Return a number from 0 to 1 of a content; another than that by which `--validation-split` holds out."""
    parts = [record.text] if record.text is not None else [part for t in record.turns for part in (t.role, t.content)]
    content = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8, key=b"prepare").digest()
    return int.from_bytes(content, "big") / 2**64


class Waiting:
    """Rows of a side that become a table together."""

    def __init__(self, file: Path) -> None:
        self.output: Output | None = None
        self._file, self._characters = file, 0
        self._rows: list[Row] = []

    def open(self, opened: ExitStack, kind: Kind | None) -> None:
        """Begin the file, now that its columns are known."""
        names = COLUMNS_OF[kind] if kind is not None else ()
        schema = pa.schema([(name, type_of(name)) for name in names])
        self.output = opened.enter_context(Output(self._file, schema, Tally(np.arange(PROBED_ROWS))))

    def add(self, row: Row) -> None:
        """Take a row."""
        self._rows.append(row)
        self._characters += len(str(row))
        if len(self._rows) >= GROUP_ROWS or self._characters >= GROUP_CHARACTERS:
            self.hand_over()

    def hand_over(self) -> None:
        """Write what waits."""
        if self.output is not None and self._rows:
            self.output.add(pa.Table.from_pylist(self._rows, self.output.schema))
        self._rows, self._characters = [], 0


class Cleaning:
    """Makes clean records of rows, and counts in how many each rule was needed."""

    def __init__(self, kind: Kind | None) -> None:
        self.kind = kind
        self.rules: dict[str, Told] = {}
        self._used: set[str] = set()

    def record(self, place: str, row: Row | NoRow) -> Record:
        """Return what a row holds; raises RejectedError where it is not as it should be."""
        if isinstance(row, NoRow):
            raise RejectedError(row.why)
        self._used.clear()
        text, said, columns = _said(row)
        self._used |= {f"column {name[:40]!r} left out" for name in map(str, row) if name not in columns}
        if said is None:
            record = Record(place, text=self._clean(text, "the text"))
        else:
            record = Record(place, tuple(self._turns(said)))
        kind = self.kind or _kind_of(row, record)
        if (kind == "text") != (record.text is not None):
            raise RejectedError(f"{'a conversation' if record.text is None else 'a document'} among {kind}")
        if kind == "pairs" and tuple(turn.role for turn in record.turns) != EXCHANGE:
            raise RejectedError("more than one question and its answer: --as conversations takes it")
        self.kind = kind
        for rule in sorted(self._used):
            name = rule if rule in self.rules or len(self.rules) < MOST_RULES else "more columns left out"
            self.rules.setdefault(name, Told(0, place)).rows += 1
        return record

    def columns(self, record: Record) -> Row:
        """Return a record as a row of the output."""
        if record.text is not None:
            return {"text": record.text}
        if self.kind == "pairs":
            prompt, response = (turn.content for turn in record.turns)
            return {"prompt": prompt, "response": response}
        return {"conversations": [{"role": turn.role, "content": turn.content} for turn in record.turns]}

    def _turns(self, said: Sequence[tuple[object, object]]) -> list[Turn]:
        """Return turns that go to and fro from the first question to the last answer, perhaps after one of system."""
        turns = []
        for number, (role, content) in enumerate(said, 1):
            known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
            if known is None:
                raise RejectedError("a turn has no role that is known")
            if known == "system" and (content is None or (isinstance(content, str) and not content.strip())):
                self._used.add(SYSTEM)
                continue
            self._used |= {RENAMED} if known != role else set()
            turns.append(Turn(known, self._clean(content, f"turn {number}")))
        system = [turn for turn in turns[:1] if turn.role == "system"]
        turns = turns[len(system) :]
        begin = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
        end = next((i for i in range(len(turns), 0, -1) if turns[i - 1].role == "assistant"), 0)
        self._used |= {rule for rule, needed in ((BEFORE, begin > 0), (AFTER, end < len(turns))) if needed}
        turns = turns[begin:end]
        if not turns:
            raise RejectedError("no question with its answer")
        if any(turn.role != EXCHANGE[i % 2] for i, turn in enumerate(turns)):
            raise RejectedError("questions and answers do not take turns")
        return [*system, *turns]

    def _clean(self, value: object, name: str) -> str:
        """Return a text by the rules; raises RejectedError for what is none, or says nothing."""
        if not isinstance(value, str):
            raise RejectedError(f"{name} is no text")
        if HALVES.search(value):
            raise RejectedError(f"{name} has half a character")
        for rule, clean in RULES:
            after = clean(value)
            if after != value:
                self._used.add(rule)
                value = after
        if not value:
            raise RejectedError(f"{name} says nothing")
        return value


def _kind_of(row: Row, record: Record) -> Kind:
    """Return what the output is to be where nothing is said: as the first row is."""
    if record.text is not None:
        return "text"
    many = "conversations" in row or "messages" in row or len(record.turns) != len(EXCHANGE)
    return "conversations" if many else "pairs"


def _said(row: Row) -> tuple[object, list[tuple[object, object]] | None, set[str]]:
    """Return the text of a document, or who says what, and the columns that it stands in.

    Raises RejectedError for columns that are not known.
    """
    for name in ("conversations", "messages"):
        if name in row:
            said = _list_of_turns(row[name])
            first = said[0][0] if said else None
            system = [] if isinstance(first, str) and ROLES.get(first.strip().lower()) == "system" else _system(row)
            return None, [*system, *said], {name, "system"}
    for exchange in EXCHANGES:
        if all(name in row for name in exchange):
            asked = list(zip(EXCHANGE, (row[name] for name in exchange), strict=True))
            return None, [*_system(row), *_history(row), *asked], {*exchange, "system", "history"}
    if "instruction" in row and "output" in row:
        parts = [row["instruction"], *([row["input"]] if row.get("input") not in (None, "") else [])]
        if not all(isinstance(part, str) for part in parts):
            raise RejectedError("instruction or input is no text")
        asked = [("user", "\n".join(parts)), ("assistant", row["output"])]
        return None, [*_system(row), *_history(row), *asked], {"instruction", "input", "output", "system", "history"}
    if "text" in row:
        return row["text"], None, {"text"}
    raise RejectedError(f"none of the known columns among {', '.join(map(str, row))[:200] or 'none'}")


def _system(row: Row) -> list[tuple[object, object]]:
    return [("system", row["system"])] if row.get("system") is not None else []


def _history(row: Row) -> list[tuple[object, object]]:
    history = _from_csv(row.get("history")) or []
    if not isinstance(history, list) or not all(isinstance(e, list) and len(e) == len(EXCHANGE) for e in history):
        raise RejectedError("history is no list of questions with their answers")
    return [turn for exchange in history for turn in zip(EXCHANGE, exchange, strict=True)]


def _list_of_turns(value: object) -> list[tuple[object, object]]:
    turns = _from_csv(value)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RejectedError("conversations are no list of turns")
    return [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in turns]


def _from_csv(value: object) -> object:
    """Return what a cell of csv holds as JSON; all else as it is."""
    if not isinstance(value, str) or not value:
        return value
    parsed = _parsed(f'{{"cell": {value}}}')
    return parsed["cell"] if isinstance(parsed, dict) else value


class Rejects:
    """The file of rows that are not taken; it is there where there are any, and that of an earlier time goes."""

    def __init__(self, file: Path) -> None:
        self.file, self._partial = file, file.with_name(f".{file.name}.partial")
        self.why: dict[str, Told] = {}

    def __enter__(self) -> Self:
        if self.file.exists() and not self._is_ours():
            raise ConfigurationError(
                f"{self.file} is no file of rejected rows", "give --output another name, or move it"
            )
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._opened = self._partial.open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def _is_ours(self) -> bool:
        try:
            with self.file.open(encoding="utf-8") as opened:
                line = json.loads(opened.readline(LONGEST_LINE))
        except (OSError, ValueError):
            return False
        return isinstance(line, dict) and [*line] == ["place", "why", "row"]

    def add(self, place: str, why: str, row: Row | NoRow) -> None:
        """Write one, cut where it is long."""
        self.why.setdefault(why, Told(0, place)).rows += 1
        text = row.text if isinstance(row, NoRow) else json.dumps(row, ensure_ascii=False, default=str)
        line = {"place": place, "why": why, "row": text[:RAW_CHARACTERS]}
        self._opened.write(json.dumps(line, ensure_ascii=False) + "\n")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._opened.close()
        if kind is not None or not self.why:
            self._partial.unlink()
            if kind is None:
                self.file.unlink(missing_ok=True)
            return
        sync(self._partial)
        self._partial.replace(self.file)


def read_rows(files: Iterable[Path]) -> Iterator[tuple[str, Row | NoRow]]:
    """Read rows with their places, in their order, and what stands where one should.

    Raises DataError for a file that cannot be read any further.
    """
    for file in files:
        yield from READERS[file.suffix](file)


def _of_lines(file: Path) -> Iterator[tuple[str, Row | NoRow]]:
    for number, line in lines_of(file):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield f"{file}: line {number}", NoRow(f"not UTF-8: {error.reason}", repr(line[:RAW_CHARACTERS]))
            continue
        yield f"{file}: line {number}", _parsed(text)


def _parsed(text: str) -> Row | NoRow:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return NoRow("not JSON", text)
    return row if isinstance(row, dict) else NoRow("no object", text)


def _of_json(file: Path) -> Iterator[tuple[str, Row | NoRow]]:
    """Read an array of objects, or objects one after another, a piece at a time."""
    decoder, text, at, number, ended = json.JSONDecoder(), "", 0, 0, False
    array: bool | None = None
    with file.open(encoding="utf-8-sig") as opened:
        while True:
            at = _past(text, at, BLANKS if number == 0 else BLANKS + ",")
            if array is None and at < len(text):
                array = text[at] == "["
                at = _past(text, at + array, BLANKS)
            closed = bool(array) and text[at : at + 1] == "]"
            if closed or (ended and at == len(text)):
                if array and not closed:
                    raise DataError(f"{file}: it breaks off after object {number}", BROKEN)
                return
            try:
                row, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if ended or len(text) - at > LONGEST_LINE:
                    raise DataError(f"{file}: not JSON after object {number}: {_first(error)}", BROKEN) from None
                try:
                    more = opened.read(CHUNK_CHARACTERS)
                except UnicodeDecodeError as broken:
                    raise DataError(f"{file}: not UTF-8 after object {number}: {broken.reason}", ENCODE) from None
                text, at, ended = text[at:] + more, 0, not more
                continue
            number += 1
            yield f"{file}: object {number}", row if isinstance(row, dict) else NoRow("no object", text[at:end])
            at = end


def _past(text: str, at: int, these: str) -> int:
    while at < len(text) and text[at] in these:
        at += 1
    return at


def _of_csv(file: Path) -> Iterator[tuple[str, Row | NoRow]]:
    csv.field_size_limit(LONGEST_LINE)
    with file.open(encoding="utf-8-sig", newline="") as opened:
        reader = csv.DictReader(opened, strict=True)
        try:
            for row in reader:
                place = f"{file}: line {reader.line_num}"
                if None in row or None in row.values():
                    yield place, NoRow(f"not as many cells as the {len(reader.fieldnames or ())} columns", repr(row))
                else:
                    yield place, row
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 after line {reader.line_num}: {error.reason}", ENCODE) from None
        except csv.Error as error:
            raise DataError(f"{file}: not CSV after line {reader.line_num}: {error}", BROKEN) from None


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row | NoRow]]]] = {
    ".parquet": rows_of_parquet,
    ".jsonl": _of_lines,
    ".json": _of_json,
    ".csv": _of_csv,
}
