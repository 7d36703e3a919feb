"""Whether somebody else (torchrun, accelerate) launched this command as one of several ranks, and which it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from autotune.errors import ConfigurationError
from autotune.plan import Hardware


@dataclass(frozen=True)
class Launched:
    """This command among those that were launched together."""

    rank: int
    world_size: int
    local_world_size: int

    def share_out(self, hardware: Hardware) -> Hardware:
        """Return the hardware of this machine's ranks as that of all ranks."""
        return hardware.model_copy(update={"world_size": self.world_size})


def launched(ranks: int, environ: Mapping[str, str] = os.environ) -> Launched | None:
    """Read what launchers set: RANK, WORLD_SIZE, LOCAL_WORLD_SIZE; None for a command that stands alone.

    Raises ConfigurationError where `ranks`, that are to be launched by us, were asked for too.
    """
    if "RANK" not in environ or int(environ.get("WORLD_SIZE", 1)) == 1:
        return None
    world_size = int(environ["WORLD_SIZE"])
    if ranks > 1:
        raise ConfigurationError(
            f"--ranks {ranks}, and this is already one of {world_size} ranks that were launched", "leave --ranks out"
        )
    return Launched(int(environ["RANK"]), world_size, int(environ.get("LOCAL_WORLD_SIZE", world_size)))
