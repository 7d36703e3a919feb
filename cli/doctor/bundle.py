"""What is attached to an issue: a zip of doctor's facts and the end of a run, masked, without text of data."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cli.masking import Private, mask_data, mask_text

MOST_LINES = 200
TAIL_BYTES = 2 * 2**20
"""Of a file, read from its end: rows of metrics are of some 500 bytes."""
TEXT_OF_PEOPLE = {"prompt", "prompts", "answer", "reference", "text"}
LEFT_OUT = "(left out)"


def write_bundle(file: Path, report: str, run: Path | None, private: Private) -> list[str]:
    """Write a zip with the report, masked already, and what tells of the run; return the names of what is in it.

    Raises OSError where the disk refuses.
    """
    contents = dict([("doctor.json", report), *(_of_run(run, private) if run is not None else ())])
    with zipfile.ZipFile(file, "x", zipfile.ZIP_DEFLATED) as bundle:
        for name, text in contents.items():
            bundle.writestr(name, text)
    return list(contents)


def _of_run(run: Path, private: Private) -> Iterator[tuple[str, str]]:
    """Yield what a run left, by name; a file that is not there is left out."""
    if (text := _read_end(run / "config.toml")) is not None:
        lines = (mask_text(_without_prompts(line), private) for line in text.splitlines())
        yield "run/config.toml", "\n".join(lines) + "\n"
    for name in ("plan.json", "evidence.json"):
        if (text := _read_end(run / name)) is not None:
            yield f"run/{name}", _masked_json(text, private, indent=2) + "\n"
    if (text := _read_end(run / "log.txt")) is not None:
        yield "run/log.txt", mask_text("\n".join(text.splitlines()[-MOST_LINES:]), private) + "\n"
    if (text := _read_end(run / "metrics.jsonl")) is not None:
        rows = [_masked_json(line, private) for line in text.splitlines()[-MOST_LINES:]]
        yield "run/metrics.jsonl", "\n".join(rows) + "\n"


def _read_end(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(max(0, size - TAIL_BYTES))
            return opened.read().decode(errors="replace")
    except OSError:
        return None


def _without_prompts(line: str) -> str:
    """Return a line of settings; of prompts that people wrote only that there are some."""
    return re.sub(r"^((?:# )?prompt = )\[.+\](  # .*)?$", rf'\1"{LEFT_OUT}"\2', line)


def _masked_json(text: str, private: Private, indent: int | None = None) -> str:
    """Mask JSON as data, so that it stays JSON; what is none, as text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return mask_text(text, private)
    return json.dumps(mask_data(_without_text(value), private), indent=indent, ensure_ascii=False)


def _without_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: LEFT_OUT if name in TEXT_OF_PEOPLE else _without_text(under) for name, under in value.items()}
    return [_without_text(one) for one in value] if isinstance(value, list) else value
