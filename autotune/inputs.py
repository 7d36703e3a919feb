"""All that a plan is made from, and the batch that follows from it alone. Pure."""

from __future__ import annotations

from typing import NamedTuple

from autotune.account import Budget, set_budget
from autotune.batching import largest_share, reach, useful_sizes
from autotune.errands import DataSummary, Recipe, Saving
from autotune.plan import Batching, Hardware, LimitedBy, Request, Workload
from autotune.shapes import most_packed_rows


class Course(NamedTuple):
    """What a run is to do, on which data, and the time that it has."""

    recipe: Recipe
    saving: Saving
    data: DataSummary | None
    validation: DataSummary | None
    left_seconds: float | None = None
    """None where it may take what it takes."""
    begun_steps: int = 0
    """Steps that are done, of a run that goes on."""


class PlanInputs(NamedTuple):
    """A workload on hardware, what the user wishes of it, and the run that it is for."""

    workload: Workload
    hardware: Hardware
    request: Request
    course: Course

    @property
    def recipe(self) -> Recipe:
        """What is to be trained."""
        return self.course.recipe

    @property
    def data(self) -> DataSummary | None:
        """What is trained on."""
        return self.course.data

    @property
    def validation(self) -> DataSummary | None:
        """What is evaluated on."""
        return self.course.validation

    @property
    def budget(self) -> Budget:
        """What may be used of the device; raises NothingFitsError where nothing may."""
        return set_budget(self.hardware, self.request.memory_limit_bytes, self.request.headroom)

    @property
    def samples(self) -> int:
        """Of an optimizer step: the effective batch, or all that there are."""
        wanted = self.request.effective_batch_size
        return min(wanted, self.data.samples) if self.data else wanted

    @property
    def sizes(self) -> list[int]:
        """Micro-batches worth trying, rising; the last one takes a rank's whole share, or the rows that share one."""
        share = largest_share(self.samples, self.hardware.world_size)
        if self.data is None or self.workload.layout != "packed":
            return useful_sizes(share)
        return useful_sizes(most_packed_rows(self.data.lengths, self.workload.limits, share))

    def limited_by(self, rows: int) -> LimitedBy:
        """Say what keeps a size that nobody gave from being larger."""
        if rows < self.sizes[-1]:
            return "memory"
        return "effective_batch" if self.samples == self.request.effective_batch_size else "data"

    def reach(self, rows: int, largest: int, limited_by: LimitedBy) -> Batching:
        """Reach the step exactly in micro-batches of so many rows."""
        return reach(self.samples, self.hardware.world_size, rows, largest, limited_by)
