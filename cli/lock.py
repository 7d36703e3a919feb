"""One run at a time in a folder: a lock that the kernel takes back when its holders are gone."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from autotune.errors import MachineError, RunExistsError

LOCK = ".lock"
BEYOND = 2**20
"""Where Windows locks a byte, which nobody can read then: beyond what stands there."""
MOST_GONE = 100
"""Folders that go again under us: more is no other start, but a place where none can be."""


@contextmanager
def hold(folder: Path) -> Iterator[int]:
    """Make the folder if need be, and hold it; yields the descriptor, by which a worker that gets it holds it too.

    Raises RunExistsError where another run has it, naming its process, and MachineError where it cannot be made. A
    folder in which nothing was left goes again.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        file = _locked(folder)
    except OSError as error:
        raise MachineError(
            f"{folder}: {error.strerror}", "give an --output-dir that can be written and locked"
        ) from None
    with file:
        try:
            _sign(file)
            yield file.fileno()
        finally:
            with suppress(OSError):  # Windows keeps what is open
                (folder / LOCK).unlink()
            with suppress(OSError):  # where something was left
                for place in made:
                    place.rmdir()


def _sign(file: IO[str]) -> None:
    """Say who holds it; on a disk that is full nobody can."""
    holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    with suppress(OSError):
        os.truncate(file.fileno(), 0)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        os.write(file.fileno(), holder.encode())


def _locked(folder: Path) -> IO[str]:
    """Return the file, held; anew where its last holder removed it, or the folder, between our steps."""
    path, gone = folder / LOCK, 0
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
        except (FileNotFoundError, FileExistsError):  # the latter: there as it was made, gone as it was looked at
            if (gone := gone + 1) == MOST_GONE:
                raise
            continue
        if not _taken(file):
            with file:
                raise RunExistsError(
                    f"{folder} is in use by {file.read().strip() or 'another run'}",
                    "wait for it to end, or give another --output-dir",
                )
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()


if sys.platform == "win32":
    import msvcrt

    def _taken(file: IO[str]) -> bool:
        try:
            file.seek(BEYOND)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            file.seek(0)
        return True

else:
    import fcntl

    def _taken(file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
