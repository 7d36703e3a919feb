"""What can go wrong by no fault of the program: one sentence, a hint, an exit code. The type says who can mend it."""

from __future__ import annotations

import errno
import unicodedata

MOST_CHARACTERS = 1000
STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Categories of Unicode: what controls a terminal, turns words around, ends a line, or is half a character."""


class UserError(Exception):
    """Something the user can cause and mend.

    The message is one sentence with the numbers; `hint` says what to do; `exit_code` is what the command ends with.
    """

    exit_code = 70

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = _shown(message)
        super().__init__(self.message)
        self.hint = hint


def _shown(message: str) -> str:
    """Return a message as a terminal shows it and no more: strangers name columns, and files, as they like."""
    cut = message if len(message) <= MOST_CHARACTERS else f"{message[:MOST_CHARACTERS]} ..."
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in STEERING else c for c in cut)


class NothingFitsError(UserError):
    """Not even the batch asked for fits the memory there is."""

    exit_code = 1


class TrainingFailedError(UserError):
    """A run that cannot go on as it is: its numbers are none."""

    exit_code = 1


class ConfigurationError(UserError):
    """An option, a profile, a model or a plan that cannot be obeyed."""

    exit_code = 2


class DataError(UserError):
    """A data file that cannot be read as what it claims to be; the message names the file and the row."""

    exit_code = 3


class MachineError(UserError):
    """A device, a disk or a library that is not there or not enough."""

    exit_code = 4


class RunExistsError(UserError):
    """The output folder already holds a run."""

    exit_code = 5


DISK = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "ENAMETOOLONG", "ENOTDIR", "EISDIR")
    if hasattr(errno, name)
}


def disk_error(error: OSError) -> MachineError | None:
    """Say what a disk refused, in a sentence; None where it is no disk that did."""
    if error.errno not in DISK:
        return None
    return MachineError(
        f"{error.filename or 'a file'}: {error.strerror}",
        "free some of the disk, or give folders that can be written: --output-dir, and XDG_CACHE_HOME for the cache",
    )


KINDS: dict[str, type[UserError]] = {
    kind.__name__: kind
    for kind in (
        NothingFitsError,
        TrainingFailedError,
        ConfigurationError,
        DataError,
        MachineError,
        RunExistsError,
    )
}
"""The types by name, for an error that crosses from the worker to the supervisor as JSON."""
