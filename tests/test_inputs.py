"""What follows from the inputs of a plan alone."""

from __future__ import annotations

import facts
from hypothesis import given
from hypothesis import strategies as st
from test_planner import data_of

from autotune.batching import balanced_cuts, largest_share
from autotune.inputs import PlanInputs


@given(effective=st.integers(1, 500), ranks=st.integers(1, 4), samples=st.none() | st.integers(1, 500))
def test_a_step_is_the_effective_batch_or_all_the_samples_there_are(
    effective: int, ranks: int, samples: int | None
) -> None:
    inputs = PlanInputs(
        facts.workload(), facts.hardware(world_size=ranks), facts.request(effective_batch_size=effective),
        facts.course(None if samples is None else data_of(samples)),
    )  # fmt: skip
    assert inputs.samples == min(effective, samples or effective)
    share = largest_share(inputs.samples, ranks)
    assert inputs.sizes[-1] == share
    assert all(max(balanced_cuts(share, size)) == size for size in inputs.sizes)
    whole = "effective_batch" if inputs.samples == effective else "data"
    assert [inputs.limited_by(size) for size in inputs.sizes] == ["memory"] * (len(inputs.sizes) - 1) + [whole]
    batching = inputs.reach(inputs.sizes[0], inputs.sizes[-1], "memory")
    assert batching.effective_batch_size == inputs.samples
    assert batching.micro_batch_size == inputs.sizes[0]
