"""What is written outlasts a loss of power, and is there whole or not at all. Knows no contents."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Make what is written outlast a loss of power; a folder too, where the system can."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(file: Path, text: str) -> None:
    """Give a file this content; until it is on the disk the file is what it was. One that is so already stays.

    Raises OSError where the disk refuses. The name lasts once the folder is synced.
    """
    written = text.encode()
    with suppress(OSError):
        if file.read_bytes() == written:
            return
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(written)
    sync(partial)
    partial.replace(file)
