"""What the rows of a run add up to: its seconds, its peak, how true its plan was."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from autotune.plan import Plan
from trainer.rate import token_flops

Metrics = dict[str, Any]


class Tally:
    """The seconds of a run's rows, each counted from the row before, so that they come to those of the loop."""

    def __init__(self, first_step: int) -> None:
        self._first_step = first_step
        self._began = time.perf_counter()
        self._seconds = self._training_seconds = self._generation_seconds = 0.0
        self._peak = self._tokens = 0

    def timed(self, row: Metrics, utilization: Callable[[Metrics, float], Metrics]) -> Metrics:
        """Return a row with the seconds that it took, added up; those of a sample are its evaluation's.

        That steps were counted anew takes none, and may be told before the step that it is of.
        """
        if row["kind"] == "sample" or row.get("event") == "rescheduled":
            return row
        now = time.perf_counter()
        taken, self._began = now - self._began, now
        self._seconds += taken
        self._peak = max(self._peak, row.get("peak_memory_bytes", 0))
        self._generation_seconds += row.get("generation_seconds", 0.0)
        row = row | {"seconds": taken}
        if row["kind"] != "train":
            return row
        self._tokens, self._training_seconds = self._tokens + row["tokens"], self._training_seconds + taken
        return row | {"tokens_per_second": row["tokens"] / taken} | utilization(row, taken)

    def against(self, plan: Plan, step: int) -> Metrics:
        """Say how true the plan was: its peaks and its forecast, for the steps that were taken, and what became.

        Tokens a second are those of the steps alone, without evaluation.
        """
        memory, cast, steps = plan.memory, plan.forecast, step - self._first_step
        planned = planned_training = None
        if cast is not None:
            planned = cast.total_seconds * steps / cast.total_steps
            planned_training = cast.seconds_per_epoch * steps / cast.steps_per_epoch
        return {
            "kind": "event",
            "event": "plan_against_real",
            "step": step,
            "planned_peak_bytes": memory.measured_peak_bytes or memory.predicted_peak_bytes,
            "expected_peak_bytes": memory.expected_peak_bytes,
            "real_peak_bytes": self._peak,
            "planned_seconds": planned,
            "real_seconds": self._seconds,
            "planned_tokens_per_second": self._tokens / planned_training if planned_training else None,
            "real_tokens_per_second": self._tokens / max(self._training_seconds, 1e-9),
            "generation_seconds": self._generation_seconds,
        }


def utilization(plan: Plan, model: Any) -> Callable[[Metrics, float], Metrics]:
    """Return what says of a step which share it took of the device's rate of matrix products, where that is known."""
    flops, rates = token_flops(model), plan.speed.matrix_flops if plan.speed else {}
    rate = rates.get(plan.workload.precision)

    def share_of_rate(row: Metrics, seconds: float) -> Metrics:
        used = flops.of_step(row["tokens"], row["target_tokens"]) / seconds
        return {"model_flops_utilization": used / rate} if rate else {}

    return share_of_rate
