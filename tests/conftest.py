"""What every test may use: the real data, and the installed command, run as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Three processes test at a time, on two cores perhaps: threads that wait for each other would take many times as long.
os.environ["OMP_NUM_THREADS"] = "1"
# How long an example takes says nothing here: machines that test are shared.
settings.register_profile("chatlm", deadline=None)
settings.load_profile("chatlm")

COVERED = {
    *("account", "alternatives", "batching", "bottleneck", "choices", "estimate", "evidence", "forecast", "inputs"),
    *("layout", "levers", "microbatch", "plan", "planner", "progress", "remaining", "search", "shapes", "speed"),
}
"""The tests that have to reach every branch of the pure files. All others take twice as long while that is watched."""

CommandRunner = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Watch coverage, where it is asked for, in the tests of the pure files alone."""
    for item in items:
        if item.path.stem.removeprefix("test_") not in COVERED:
            item.add_marker("no_cover")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets."""
    folder = os.environ.get("CHATLM_REAL_DATA")
    if not folder:
        pytest.skip("CHATLM_REAL_DATA names no folder with real data")
    return Path(folder)


@pytest.fixture(scope="session")
def chatlm_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with a cache of its own, wide enough that no line is wrapped."""
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "COLUMNS": "200"}


@pytest.fixture
def chatlm(tmp_path: Path, chatlm_environment: dict[str, str]) -> CommandRunner:
    """Run the command in an empty folder; gives exit code, stdout and stderr."""

    def run(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [chatlm_path(), *map(str, arguments)],
            cwd=tmp_path,
            env=chatlm_environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Say how many trials of a campaign held: a line that `pytest -rP` shows."""

    def told(count: int) -> None:
        sys.stdout.write(f"{request.node.name}: {count} of {count}\n")

    return told


def metrics(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The rows of one kind that a run wrote, as strict JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in (json.loads(line, parse_constant=refuse) for line in lines) if row["kind"] == kind]


def chatlm_path() -> str:
    """The script that was installed beside this Python."""
    return str(Path(sys.executable).parent / "chatlm")
