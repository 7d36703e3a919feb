"""One worker for each rank on this machine, by torch's elastic launcher: errand in and events out as of one worker.

    python -m trainer.launch RANKS

Dies with the supervisor, as a worker does, and then lets its ranks save. Ranks leave together: once one is gone, the
others are soon ended, also one that hangs. Ports are the loopback's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from trainer.ties import ERRAND_FILE, PARENT, die_with_parent

if __name__ == "__main__":  # before what takes seconds to import
    die_with_parent(signal.SIGKILL)

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from autotune.errands import LOST_A_PEER

SAVE_SECONDS = 600
"""That ranks have to finish their step and save, before they are killed."""
WORKER = "trainer.worker"
LEAVE_SECONDS = 5.0
"""That the others have once one of them has ended."""
LOOK_SECONDS = 0.2


def main() -> None:
    """Launch as many ranks as the first argument says, and tell which of them failed first."""
    die_with_parent(signal.SIGTERM)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(sys.argv[1]),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=SAVE_SECONDS,
    )
    with tempfile.TemporaryDirectory(prefix="chatlm-") as folder:
        errand = Path(folder) / "errand.json"
        errand.write_bytes(sys.stdin.buffer.read())
        os.environ |= {ERRAND_FILE: str(errand), PARENT: str(os.getpid())}
        threading.Thread(target=_end_who_stays, daemon=True).start()
        try:
            elastic_launch(config, sys.executable)("-P", "-m", WORKER)
        except ChildFailedError as error:
            sys.exit(_told(error.failures))
        except SignalException:
            return  # which its ranks had too: what became of them they have said


def _end_who_stays() -> None:
    """Wait for the first rank to end, and kill those that have not ended soon after."""
    seen = lives = _living_ranks()
    while lives >= seen:
        time.sleep(LOOK_SECONDS)
        seen, lives = lives, _living_ranks()
    time.sleep(LEAVE_SECONDS)
    for rank in _living_ranks():
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()


def _living_ranks() -> set[psutil.Process]:
    ranks = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if child.status() != psutil.STATUS_ZOMBIE and WORKER in child.cmdline():
                ranks.add(child)
    return ranks


def _told(failures: dict[int, ProcessFailure]) -> int:
    """Send which rank failed first by itself, not for want of another; return its exit code."""
    own: dict[int, Any] = {r: f for r, f in failures.items() if f.exitcode != LOST_A_PEER} or failures
    rank, failure = min(own.items(), key=lambda item: item[1].timestamp)
    sys.stdout.write(json.dumps({"event": "rank_failed", "rank": rank, "exit_code": failure.exitcode}) + "\n")
    sys.stdout.flush()
    return int(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


if __name__ == "__main__":
    main()
