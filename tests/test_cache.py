"""What is remembered between commands: found again for the same question, and for no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from facts import GIB, completed, hardware, request, workload

from autotune.cache import keep, recall
from autotune.evidence import Evidence, Explored
from autotune.plan import Request

EVIDENCE = Evidence(
    hardware=hardware(),
    request=request(),
    explored=(
        Explored(workload=workload(), process_bytes=1, traced=(), trials=(completed(1, {"forward_backward": 2}),)),
    ),
)


def test_what_was_kept_is_recalled_whatever_is_free_now(tmp_path: Path) -> None:
    keep(tmp_path, workload(), hardware(), request(), EVIDENCE)
    assert recall(tmp_path, workload(), hardware(), request()) == EVIDENCE
    less_free = hardware(device_memory_free_bytes=GIB, host_memory_available_bytes=GIB, disk_free_bytes=1)
    assert recall(tmp_path, workload(), less_free, request(memory_limit_bytes=GIB, headroom=0.1, offline=True))


@pytest.mark.parametrize(
    ("work", "machine", "wish"),
    [
        (workload(max_seq_len=256), hardware(), request()),
        (workload(precision="fp32"), hardware(), request()),
        (workload(data_fingerprint="other"), hardware(), request()),
        (workload(), hardware(device_name="NVIDIA GeForce RTX 3090"), request()),
        (workload(), hardware(world_size=1), request()),
        (workload(), hardware(cores=8), request()),
        (workload(), hardware(), request(effective_batch_size=65)),
        (workload(), hardware(), request(prefer="largest")),
    ],
)
def test_another_question_is_not_answered_by_it(tmp_path: Path, work: Any, machine: Any, wish: Request) -> None:
    keep(tmp_path, workload(), hardware(), request(), EVIDENCE)
    assert recall(tmp_path, work, machine, wish) is None


def test_what_is_damaged_is_as_good_as_nothing_and_is_replaced(tmp_path: Path) -> None:
    keep(tmp_path, workload(), hardware(), request(), EVIDENCE)
    (file,) = (tmp_path / "plans").iterdir()
    file.write_text(file.read_text()[:-9])
    assert recall(tmp_path, workload(), hardware(), request()) is None
    keep(tmp_path, workload(), hardware(), request(), EVIDENCE)
    assert recall(tmp_path, workload(), hardware(), request()) == EVIDENCE
    assert list((tmp_path / "plans").iterdir()) == [file], "no partial file is left"


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "plans").write_text("a file where the folder should be")
    keep(tmp_path, workload(), hardware(), request(), EVIDENCE)
    assert recall(tmp_path, workload(), hardware(), request()) is None
