"""What is written outlasts a loss of power, and is there whole or not at all. Knows no contents."""

from __future__ import annotations

import os
import shutil
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


def put_in_place(partial: Path, folder: Path) -> None:
    """Give a folder that is written its name, on the disk; one that has it goes, where all went well.

    Raises OSError where the disk refuses: the older one then has its name still, or again. One that a kill left
    without its name has it again first.
    """
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    remove(old)
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
        sync(folder.parent)
    except OSError:
        if folder.exists():
            folder.rename(partial)
        if old.exists():
            old.rename(folder)
        raise
    remove(old)


def remove(folder: Path) -> None:
    """Remove a folder with all in it, as far as the disk lets us; shutil still raises where one cannot be closed."""
    with suppress(OSError):
        shutil.rmtree(folder, ignore_errors=True)
