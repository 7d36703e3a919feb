"""What ties processes to each other: a parent's death, an errand. Knows no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
PARENT = "CHATLM_PARENT"
"""Environment variable that names the process which starts us: it may be gone before we have asked for a signal."""
ERRAND_FILE = "CHATLM_ERRAND"
"""Environment variable that names the file where each of several ranks finds what it is to do."""


def die_with_parent(last_words: signal.Signals) -> None:
    """Have the kernel send us a signal when our parent dies; nothing where there is no such thing. prctl(2)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(last_words))
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
            os._exit(1)
