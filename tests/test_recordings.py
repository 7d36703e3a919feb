"""Plans of real machines, replayed: what was measured there gives the same plan here, with nothing tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import facts
import pytest

from autotune.evidence import Evidence
from autotune.inputs import PlanInputs
from autotune.plan import Batching
from autotune.planner import Planner

RECORDINGS = sorted((Path(__file__).parent / "recordings").glob("*.json"))


class NothingIsRun:
    """Answers for no machine."""

    def stand_by(self, *_: object) -> NoReturn:
        raise AssertionError("a replay asked for a worker")

    trace_sizes = try_size = stand_by


@pytest.mark.parametrize("file", RECORDINGS, ids=lambda file: file.stem)
def test_what_a_machine_measured_gives_the_same_plan_anywhere(file: Path) -> None:
    recording = json.loads(file.read_text(encoding="utf-8"))
    evidence = Evidence.model_validate(recording["evidence"])
    request = evidence.request.model_copy(update={"offline": True})
    inputs = PlanInputs(evidence.explored[0].workload, evidence.hardware, request, facts.course())
    planner = Planner(inputs, NothingIsRun(), evidence)
    assert list(planner.make()) == []
    assert planner.plan is not None
    assert planner.plan.batching == Batching.model_validate(recording["batching"])
    peak = planner.plan.memory.measured_peak_bytes
    assert peak is not None
    assert peak <= planner.plan.memory.budget_bytes


def test_there_are_recordings() -> None:
    assert len(RECORDINGS) >= 2
