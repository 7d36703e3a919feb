"""The search on made-up memory curves: what it tries, when it ends, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log2

import pytest
from facts import completed, out_of_memory, traced
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autotune.batching import useful_sizes
from autotune.plan import Traced, Trial
from autotune.search import bracket, is_safe, is_within, largest_safe, next_size, sizes_to_trace


@dataclass(frozen=True)
class Machine:
    """A memory curve, an allocator that gives out at its limit, and a budget within that."""

    fixed: int
    per_row: int
    resident: int
    budget: int
    limit: int
    optimizer: int = 0
    """Bytes of a phase of its own that does not grow with rows."""
    floor: int = 0
    """Bytes that the growing phase takes at least."""
    per_row_squared: int = 0
    step: int = 1
    """Bytes are handed out in multiples of this."""
    percent: tuple[int, ...] = (100,)
    """Of the curve at 0 rows, at 1 row, ..., and over again."""
    trace_percent: int | None = None
    """How much of the growing phase a trace sees; None for a model that cannot be traced."""

    def phases(self, rows: int) -> dict[str, int]:
        grown = max(self.floor, self.fixed + self.per_row * rows + self.per_row_squared * rows**2)
        in_steps = ceil(grown / self.step) * self.step
        noisy = in_steps * self.percent[rows % len(self.percent)] // 100
        return {"forward_backward": noisy, "optimizer": self.optimizer}

    def peak(self, rows: int) -> int:
        return max(self.phases(rows).values())

    def try_size(self, rows: int) -> Trial:
        if self.peak(rows) > self.limit:
            return out_of_memory(rows)
        return completed(rows, self.phases(rows), resident_bytes=self.resident)

    def traced(self, largest: int) -> tuple[Traced, ...]:
        """A trace sees no noise and no steps, and nothing of what is resident before there is a tensor."""
        if self.trace_percent is None:
            return ()
        smooth = replace(self, step=1, percent=(100,), fixed=self.fixed - self.resident)
        sizes = {rows: smooth.phases(rows) for rows in sizes_to_trace(largest)}
        return tuple(
            traced(rows, phases | {"forward_backward": phases["forward_backward"] * self.trace_percent // 100})
            for rows, phases in sizes.items()
        )

    def next_size(self, trials: Sequence[Trial], largest: int) -> int | None:
        return next_size(trials, self.budget, range(1, largest + 1), self.traced(largest), self.resident)

    def truly_largest(self, largest: int) -> int:
        """The largest size that fits, by trying all."""
        return max((r for r in range(1, largest + 1) if self.peak(r) <= self.budget), default=0)


def run(machine: Machine, largest: int) -> list[Trial]:
    """Search as the planner does; a size tried again would go on for ever, so it is a failure here."""
    trials: list[Trial] = []
    while (rows := machine.next_size(trials, largest)) is not None:
        assert rows not in (t.micro_batch_size for t in trials), "tried twice"
        trials.append(machine.try_size(rows))
    return trials


def sizes_of(trials: list[Trial]) -> list[int]:
    return [t.micro_batch_size for t in trials]


unhurried = settings(deadline=None)
"""A machine that is busy breaks no law."""
largest_sizes = st.one_of(st.integers(1, 12), st.integers(1, 240))


@st.composite
def affine(draw: st.DrawFn) -> Machine:
    """One line, of which the resident state is the fixed part or less; the budget holds some rows of it, or none."""
    fixed, per_row = draw(st.integers(0, 10**10)), draw(st.integers(1, 10**8))
    budget = max(1, fixed + draw(st.integers(-per_row, 300 * per_row)))
    return Machine(
        fixed=fixed,
        per_row=per_row,
        resident=fixed * draw(st.sampled_from([100, 95, 50, 0])) // 100,
        budget=budget,
        limit=budget * draw(st.sampled_from([100, 105, 150])) // 100,
        trace_percent=draw(st.sampled_from([None, 100])),
    )


@st.composite
def flat_then_rising(draw: st.DrawFn) -> Machine:
    """A floor under the line, in its own phase or in one apart."""
    machine = draw(affine())
    height = machine.fixed + draw(st.integers(0, 150 * machine.per_row))
    return replace(machine, **{draw(st.sampled_from(["floor", "optimizer"])): height})


@st.composite
def convex(draw: st.DrawFn) -> Machine:
    machine = draw(affine())
    return replace(machine, per_row_squared=draw(st.integers(1, machine.per_row)))


@st.composite
def stepped(draw: st.DrawFn) -> Machine:
    machine = draw(affine())
    return replace(machine, step=draw(st.integers(1, 20 * machine.per_row)))


@st.composite
def noisy(draw: st.DrawFn) -> Machine:
    """Up to a tenth off at each size: memory need not even be monotone in rows."""
    percent = draw(st.lists(st.integers(90, 110), min_size=1, max_size=17))
    return replace(draw(affine()), percent=tuple(percent))


@st.composite
def mistraced(draw: st.DrawFn) -> Machine:
    """A trace that sees too little or too much of what grows."""
    return replace(draw(affine()), trace_percent=draw(st.integers(85, 115)))


machines = st.one_of(affine(), flat_then_rising(), convex(), stepped(), noisy(), mistraced())

STEEPER_THAN_AT_ONE_ROW = Machine(fixed=1000, per_row=1, per_row_squared=1, resident=1000, budget=1300, limit=1300)
ONLY_ONE_ROW_FITS = Machine(
    fixed=1000, per_row=1, resident=1000, budget=1300, limit=1300, percent=(100, 100, *(200,) * 239)
)


# Whatever the curve.


@unhurried
@given(machine=machines, largest=largest_sizes)
def test_the_search_ends_with_no_size_tried_twice_or_outside_its_range(machine: Machine, largest: int) -> None:
    trials = run(machine, largest)
    assert all(1 <= rows <= largest for rows in sizes_of(trials))


@unhurried
@given(machine=machines, largest=largest_sizes)
def test_the_answer_was_measured_within_the_budget(machine: Machine, largest: int) -> None:
    trials = run(machine, largest)
    answer = largest_safe(trials, machine.budget)
    assert answer == 0 or machine.peak(answer) <= machine.budget
    assert answer in {0, *sizes_of(trials)}


@unhurried
@given(machine=machines, largest=largest_sizes)
def test_nothing_is_tried_at_or_above_a_size_that_is_known_not_to_fit(machine: Machine, largest: int) -> None:
    trials = run(machine, largest)
    for i, trial in enumerate(trials):
        safe = largest_safe(trials[:i], machine.budget)
        too_large = [
            t.micro_batch_size
            for t in trials[:i]
            if t.micro_batch_size > safe and not (t.completed and (t.peak_bytes or 0) <= machine.budget)
        ]
        assert safe < trial.micro_batch_size < min(too_large, default=largest + 1)


@unhurried
@given(machine=machines, largest=largest_sizes, data=st.data())
def test_the_order_of_the_trials_does_not_matter(machine: Machine, largest: int, data: st.DataObject) -> None:
    trials = run(machine, largest)
    seen = trials[: data.draw(st.integers(0, len(trials)))]
    shuffled = data.draw(st.permutations(seen))
    assert machine.next_size(shuffled, largest) == machine.next_size(seen, largest)
    assert largest_safe(shuffled, machine.budget) == largest_safe(seen, machine.budget)


@unhurried
@given(machine=machines, largest=largest_sizes)
def test_one_row_that_does_not_fit_ends_the_search_after_one_trial_with_no_answer(
    machine: Machine, largest: int
) -> None:
    too_little = replace(machine, budget=machine.peak(1) - 1, trace_percent=None)
    trials = run(too_little, largest)
    assert sizes_of(trials) == [1]
    assert largest_safe(trials, too_little.budget) == 0


@unhurried
@given(machine=machines, largest=largest_sizes)
@example(STEEPER_THAN_AT_ONE_ROW, 240)
@example(ONLY_ONE_ROW_FITS, 240)
def test_the_trials_are_few_even_where_the_curve_is_not_what_the_first_of_them_promised(
    machine: Machine, largest: int
) -> None:
    assert len(run(machine, largest)) <= ceil(log2(largest)) + 8


# Where memory is affine, as it is once activations dominate.


@unhurried
@given(machine=affine(), largest=largest_sizes)
def test_affine_memory_gives_the_largest_batch_to_a_tenth_and_exactly_below_ten_rows(
    machine: Machine, largest: int
) -> None:
    answer, truth = largest_safe(run(machine, largest), machine.budget), machine.truly_largest(largest)
    assert 0.9 * truth <= answer <= truth
    if truth < 10:
        assert answer == truth


@unhurried
@given(machine=affine(), largest=largest_sizes)
def test_affine_memory_takes_no_more_trials_than_halving_and_three(machine: Machine, largest: int) -> None:
    assert len(run(machine, largest)) <= ceil(log2(largest)) + 3


@unhurried
@given(machine=affine(), largest=largest_sizes)
def test_affine_memory_is_searched_without_a_single_out_of_memory_where_two_rows_fit(
    machine: Machine, largest: int
) -> None:
    budget = max(machine.budget, machine.peak(2))
    assert all(is_safe(t, budget) for t in run(replace(machine, budget=budget, limit=budget), largest))


@unhurried
@given(machine=st.one_of(affine(), flat_then_rising()), largest=largest_sizes)
def test_if_all_sizes_fit_the_answer_is_the_largest(machine: Machine, largest: int) -> None:
    ample = replace(machine, budget=machine.peak(largest), limit=machine.peak(largest))
    assert largest_safe(run(ample, largest), ample.budget) == largest


@unhurried
@given(machine=affine(), largest=largest_sizes, more=st.integers(0, 10**10))
def test_more_memory_never_gives_a_smaller_batch(machine: Machine, largest: int, more: int) -> None:
    larger = replace(machine, budget=machine.budget + more, limit=machine.limit + more)
    answers = [largest_safe(run(m, largest), m.budget) for m in (machine, larger)]
    assert answers == sorted(answers)


@unhurried
@given(machine=affine(), largest=largest_sizes)
def test_with_a_right_trace_three_trials_are_enough_and_none_fails(machine: Machine, largest: int) -> None:
    """It misses the same at each size: what is resident before there is a tensor, or some other constant."""
    known = replace(machine, trace_percent=100, budget=max(machine.budget, machine.peak(1)))
    trials = run(replace(known, limit=known.budget), largest)
    assert all(is_safe(t, known.budget) for t in trials)
    assert len(trials) <= 3
    assert largest_safe(trials, known.budget) >= 0.9 * known.truly_largest(largest)


@unhurried
@given(machine=mistraced(), largest=largest_sizes)
def test_a_trace_that_is_wrong_by_a_sixth_still_gives_the_largest_to_a_row_or_a_fifth(
    machine: Machine, largest: int
) -> None:
    """Where the first trial lies far below the answer, half of what the trace is wrong by is left."""
    answer, truth = largest_safe(run(machine, largest), machine.budget), machine.truly_largest(largest)
    assert min(0.8 * truth, truth - 1) <= answer <= truth


@unhurried
@given(largest=st.integers(1, 10**6))
def test_traced_sizes_rise_to_the_largest_and_are_few(largest: int) -> None:
    sizes = sizes_to_trace(largest)
    assert list(sizes) == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, largest)
    assert len(sizes) <= 2 + ceil(log2(largest) / 2)


# Single decisions.


def test_with_a_trace_the_first_trial_is_what_would_run_if_that_leaves_room_for_a_wrong_trace() -> None:
    traces = [traced(rows, {"forward_backward": 10 * rows}) for rows in (1, 16, 64)]
    assert next_size([], 1000, useful_sizes(64), traces, 100) == 64, "740 of 1000 bytes"
    assert next_size([], 700, useful_sizes(64), traces, 100) == 32, (
        "all 64 do not fit, so that they go 2 x 32: 420 of 700 bytes"
    )
    assert next_size([], 430, useful_sizes(64), traces, 100) == 16, (
        "2 x 32 would be 420 of 430 bytes: half of the way there"
    )
    assert next_size([], 90, range(1, 64 + 1), traces, 100) == 1, "not even one is promised"


def test_the_second_trial_is_the_prediction_corrected_by_the_first() -> None:
    traces = [traced(rows, {"forward_backward": 10 * rows}) for rows in (1, 16, 64)]
    first = completed(11, {"forward_backward": 240})
    assert next_size([first], 430, range(1, 64 + 1), traces, 100) == 30
    assert next_size([first, completed(30, {"forward_backward": 430})], 430, range(1, 64 + 1), traces, 100) is None


def test_below_a_first_trial_that_failed_the_search_goes_on() -> None:
    traces = [traced(rows, {"forward_backward": 10 * rows}) for rows in (1, 16, 64)]
    assert next_size([out_of_memory(32)], 430, range(1, 64 + 1), traces, 100) == 16
    assert next_size([completed(32, {"forward_backward": 800})], 430, range(1, 64 + 1), traces, 100) == 1, (
        "480 too much at 32"
    )


def test_one_row_is_tried_first_and_again_where_only_larger_sizes_were() -> None:
    assert next_size([], 100, range(1, 8 + 1)) == 1
    assert next_size([out_of_memory(5)], 100, range(1, 8 + 1)) == 1


def test_the_second_trial_goes_for_all_if_the_first_promises_that_all_fits() -> None:
    first = completed(1, {"forward_backward": 60}, resident_bytes=50)
    assert next_size([first], 50 + 8 * 10, range(1, 9)) == 8


def test_the_second_trial_goes_half_way_if_not_all_is_promised_and_the_third_to_the_prediction() -> None:
    first = completed(1, {"forward_backward": 60}, resident_bytes=50)
    assert next_size([first], 250, range(1, 100 + 1)) == 10, "155 bytes lie halfway between 60 and 250"
    second = completed(10, {"forward_backward": 150})
    assert next_size([first, second], 250, range(1, 100 + 1)) == 20
    assert next_size([first, second, completed(20, {"forward_backward": 250})], 250, range(1, 100 + 1)) is None


def test_a_gain_of_less_than_a_tenth_is_not_worth_a_trial() -> None:
    trials = [completed(1, {"forward_backward": 1}), completed(100, {"forward_backward": 100})]
    assert next_size(trials, 110, range(1, 240 + 1)) is None
    assert next_size(trials, 111, range(1, 240 + 1)) == 111
    assert next_size([*trials, out_of_memory(111)], 240, range(1, 240 + 1)) is None


def test_a_size_that_failed_below_a_safe_one_does_not_end_the_search() -> None:
    erratic = [completed(1, {"forward_backward": 10}), out_of_memory(3), completed(10, {"forward_backward": 100})]
    assert next_size(erratic, 300, range(1, 240 + 1)) == 30


def test_a_bracket_that_the_model_was_wrong_about_is_halved() -> None:
    fits = [completed(rows, {"forward_backward": rows}) for rows in (1, 10)]
    failed = [out_of_memory(rows) for rows in (100, 60)]
    assert next_size([*fits, *failed], 1000, range(1, 200 + 1)) == 35
    assert next_size([*fits, *failed], 20, range(1, 200 + 1)) == 20, "unless the prediction lies lower"


def test_a_size_over_the_budget_is_not_safe_though_it_completed() -> None:
    trial = completed(4, {"forward_backward": 101})
    assert is_safe(trial, 101)
    assert not is_safe(trial, 100)
    assert largest_safe([completed(2, {"forward_backward": 50}), trial], 100) == 2
    assert next_size([completed(2, {"forward_backward": 50}), trial], 100, range(1, 8 + 1)) == 3


@pytest.mark.parametrize("outcome", ["out_of_memory", "killed", "timed_out"])
def test_a_trial_that_did_not_complete_is_not_safe_whatever_it_held(outcome: str) -> None:
    assert not is_safe(completed(1, {"forward_backward": 1}, outcome=outcome), 100)


def test_a_trial_without_a_known_peak_is_not_safe() -> None:
    assert not is_safe(completed(1, {"forward_backward": 1}, peak_bytes=None), 100)


# A first trial may only tell where to look.


def test_a_size_that_was_only_explored_is_verified_before_it_is_the_answer() -> None:
    explored = completed(4, {"forward_backward": 40}, verified=False)
    assert largest_safe([explored], 100) == 0
    assert next_size([explored, out_of_memory(5)], 100, range(1, 9)) == 4
    verified = completed(4, {"forward_backward": 41})
    assert next_size([explored, verified, out_of_memory(5)], 100, range(1, 9)) is None
    assert largest_safe([explored, verified], 100) == 4


def test_a_little_room_is_left_while_all_that_is_known_are_short_trials() -> None:
    traces = [traced(rows, {"forward_backward": 10 * rows}) for rows in (1, 64)]
    explored = completed(16, {"forward_backward": 160}, verified=False)
    assert next_size([explored], 400, range(1, 65), traces) == 39
    assert next_size([explored.model_copy(update={"verified": True})], 400, range(1, 65), traces) == 40


def test_a_size_that_was_within_the_budget_only_the_first_time_is_not() -> None:
    trials = [completed(4, {"forward_backward": 99}, verified=False), completed(4, {"forward_backward": 101})]
    assert bracket(trials, 100) == (0, 4)
    assert next_size(trials, 100, range(1, 9)) == 2


@unhurried
@given(machine=machines, largest=largest_sizes)
def test_a_search_whose_first_trial_explores_ends_too_with_a_verified_answer(machine: Machine, largest: int) -> None:
    trials: list[Trial] = []
    while (rows := machine.next_size(trials, largest)) is not None:
        assert rows not in (t.micro_batch_size for t in trials if t.verified), "verified twice"
        trials.append(machine.try_size(rows).model_copy(update={"verified": bool(trials)}))
    answer = largest_safe(trials, machine.budget)
    assert answer or not any(is_within(t, machine.budget) for t in trials)
    assert len(trials) <= ceil(log2(largest)) + 9
