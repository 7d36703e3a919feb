"""Every worker of a campaign reads this first, by PYTHONPATH: how it is struck from inside.

KILLED_AT=7   signal 9 to the whole tree as the rank that saves is about to sync, rename or remove for the 7th time
SIGUSR2       an error is raised wherever the rank is
DRY_STEPS=segfault   what happens in place of dry steps: segfault, stop, garbage, exit
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import signal
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn


def kill_the_tree() -> NoReturn:
    """End the launcher with all its ranks, if there is one, and this process."""
    import psutil

    if "RANK" in os.environ:
        launcher = psutil.Process().parent()
        assert launcher is not None
        for process in (*(child for child in launcher.children() if child.pid != os.getpid()), launcher):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def counted(work: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    """Count down before each call."""

    def call(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            kill_the_tree()
        return work(*arguments, **named)

    return call


def fail(_number: int, _frame: object) -> NoReturn:
    """Raise what nobody expects."""
    raise LookupError("struck")


if "trainer.worker" in sys.orig_argv:
    signal.signal(signal.SIGUSR2, fail)
    if "KILLED_AT" in os.environ and os.environ.get("RANK", "0") == "0":
        places = [int(os.environ["KILLED_AT"])]
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
            setattr(owner, name, counted(getattr(owner, name), places))


class Misbehaving:
    """Finds `trainer.dry` as it is, but for its dry steps."""

    def find_spec(self, name: str, *_: object) -> Any:
        """Let others find it, and change it when it is loaded."""
        if name != "trainer.dry":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        run = loader.exec_module

        def changed(module: Any) -> None:
            run(module)
            module.take_dry_steps = lambda *_: misbehave(os.environ["DRY_STEPS"])

        loader.exec_module = changed
        return spec


def misbehave(how: str) -> Any:
    """Do what no dry step does."""
    if how == "segfault":
        ctypes.string_at(0)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "garbage":
        return SimpleNamespace(model_dump=lambda **_: {"peak_bytes": "many", "verified": float("nan")})
    os._exit(0)


if "DRY_STEPS" in os.environ and "trainer.worker" in sys.orig_argv:
    sys.meta_path.insert(0, Misbehaving())  # type: ignore[arg-type]
