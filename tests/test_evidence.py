"""What the trials draw: lines by phase that are exact where memory is affine, and promise too much nowhere else."""

from __future__ import annotations

import pytest
from facts import completed, hardware, out_of_memory, request, traced, workload
from hypothesis import given
from hypothesis import strategies as st

from autotune.evidence import APART, Evidence, Explored, fit, traced_items
from autotune.plan import Trial

Lines = dict[str, tuple[int, int]]
"""Fixed bytes and bytes a row, by phase."""
lines = st.dictionaries(
    st.sampled_from(["forward_backward", "optimizer", "evaluation"]),
    st.tuples(st.integers(0, 10**11), st.integers(0, 10**9)),
    min_size=1,
)
sizes = st.integers(1, 4096)


def on(drawn: Lines, rows: int, resident_bytes: int = 0) -> Trial:
    """A completed trial whose phases lie on their lines."""
    phases = {name: fixed + slope * rows for name, (fixed, slope) in drawn.items()}
    return completed(rows, phases, resident_bytes=resident_bytes)


def true_peak(drawn: Lines, rows: int) -> int:
    return max(fixed + slope * rows for fixed, slope in drawn.values())


@given(drawn=lines, small=st.integers(1, 1000), ratio=st.integers(2, 20), rows=sizes)
def test_affine_phases_measured_at_two_sizes_far_apart_are_predicted_exactly_and_the_peak_is_the_highest_of_them(
    drawn: Lines, small: int, ratio: int, rows: int
) -> None:
    model = fit([on(drawn, small), on(drawn, small * ratio)])
    assert model is not None
    assert model.peak_bytes(rows) == true_peak(drawn, rows)


def test_a_phase_that_binds_at_few_rows_does_not_flatten_the_one_that_binds_at_many() -> None:
    model = fit([on({"optimizer": (900, 0), "forward_backward": (100, 50)}, rows) for rows in (2, 20)])
    assert model is not None
    assert [model.peak_bytes(rows) for rows in (1, 16, 17, 40)] == [900, 900, 950, 2100]


@given(drawn=lines, share=st.floats(0, 1), size=st.integers(1, 1000), more=st.integers(0, 1000))
def test_one_size_alone_never_predicts_less_than_the_affine_truth_if_no_more_is_resident_than_is_fixed(
    drawn: Lines, share: float, size: int, more: int
) -> None:
    fixed = min(fixed for fixed, _ in drawn.values())
    model = fit([on(drawn, size, int(share * fixed))])
    assert model is not None
    assert model.peak_bytes(size + more) >= true_peak(drawn, size + more)


@given(fixed=st.integers(0, 10**11), slope=st.integers(0, 10**9), size=st.integers(1, 1000), rows=sizes)
def test_one_size_alone_is_exact_if_what_is_resident_is_what_is_fixed(
    fixed: int, slope: int, size: int, rows: int
) -> None:
    model = fit([on({"forward_backward": (fixed, slope)}, size, fixed)])
    assert model is not None
    assert model.peak_bytes(rows) == fixed + slope * rows


def test_all_that_one_size_held_grows_with_its_rows_if_nothing_is_known_to_be_resident() -> None:
    model = fit([completed(4, {"forward_backward": 400}, resident_bytes=None)])
    assert model is not None
    assert [model.peak_bytes(rows) for rows in (1, 4, 8)] == [100, 400, 800]


def test_without_a_completed_trial_there_is_no_model() -> None:
    assert fit([]) is None
    assert fit([out_of_memory(1), out_of_memory(2, outcome="killed"), out_of_memory(3, outcome="timed_out")]) is None


def test_a_trial_that_did_not_complete_says_nothing_of_the_curve() -> None:
    measured = [completed(2, {"forward_backward": 20}), completed(8, {"forward_backward": 80})]
    assert fit([*measured, out_of_memory(16)]) == fit(measured)


@given(low=st.integers(0, 10**9), drop=st.integers(0, 10**9), small=st.integers(1, 50), rows=sizes)
def test_a_falling_line_is_flat_at_its_higher_end(low: int, drop: int, small: int, rows: int) -> None:
    trials = [completed(small, {"evaluation": low + drop}), completed(2 * small, {"evaluation": low})]
    model = fit(trials)
    assert model is not None
    assert model.peak_bytes(rows) == low + drop


def test_a_neighbour_of_the_largest_size_is_passed_over_for_one_well_below_it() -> None:
    peaks = {1: 500, 60: 600, 79: 999, 80: 800}
    assert APART * 80 == 60
    model = fit([completed(rows, {"forward_backward": peak}) for rows, peak in peaks.items()])
    assert model is not None
    assert model.peak_bytes(160) == 1600


def test_of_several_sizes_well_below_the_largest_the_nearest_is_taken() -> None:
    model = fit([completed(rows, {"forward_backward": peak}) for rows, peak in [(1, 500), (10, 500), (20, 1000)]])
    assert model is not None
    assert model.peak_bytes(40) == 2000


def test_neighbours_are_used_where_there_is_nothing_better_the_farthest_of_them() -> None:
    model = fit([completed(rows, {"forward_backward": peak}) for rows, peak in [(8, 80), (9, 999), (10, 100)]])
    assert model is not None
    assert model.peak_bytes(20) == 200


def test_a_phase_that_the_smaller_size_did_not_report_is_taken_to_grow_from_nothing_there() -> None:
    model = fit([completed(10, {"optimizer": 50}), completed(20, {"optimizer": 50, "evaluation": 100})])
    assert model is not None
    assert model.peak_bytes(20) == 100
    assert model.peak_bytes(30) == 200


def test_what_an_allocator_keeps_beyond_what_is_live_raises_all_phases_alike() -> None:
    """On CUDA the phases tell what was allocated, and the peak what was reserved: the budget is held against that."""
    small = completed(2, {"forward_backward": 400, "optimizer": 300}, peak_bytes=500)
    large = completed(10, {"forward_backward": 1200, "optimizer": 300}, peak_bytes=1500)
    model = fit([small, large])
    assert model is not None
    assert (model.peak_bytes(2), model.peak_bytes(10)) == (500, 1500)
    assert model.peak_bytes(18) == 2500


@given(data=st.data())
def test_the_order_of_the_trials_does_not_matter(data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.tuples(sizes, st.integers(0, 10**9)), unique_by=lambda pair: pair[0], max_size=6))
    trials = [completed(rows, {"forward_backward": peak}) for rows, peak in chosen]
    assert fit(data.draw(st.permutations(trials))) == fit(trials)


# What the trace adds.


@given(drawn=lines, rows=st.integers(1, 400), process=st.integers(0, 10**9))
def test_before_any_trial_the_trace_and_the_process_are_the_prediction(drawn: Lines, rows: int, process: int) -> None:
    traces = [traced(size, on(drawn, size).phases) for size in (64, 1, 8)]
    model = fit([], traces, process)
    assert model is not None
    assert model.peak_bytes(rows) == pytest.approx(max(on(drawn, rows).phases.values()) + process, abs=2)


@given(drawn=lines, size=st.integers(1, 100), rows=st.integers(1, 400), missed=st.integers(-(10**6), 10**9))
def test_what_the_trace_missed_at_one_size_it_misses_at_all(drawn: Lines, size: int, rows: int, missed: int) -> None:
    measured = {name: peak + missed for name, peak in on(drawn, size).phases.items()}
    model = fit([completed(size, measured)], [traced(rows, on(drawn, rows).phases) for rows in (1, 8, 64)], 0)
    assert model is not None
    assert model.peak_bytes(rows) == pytest.approx(max(on(drawn, rows).phases.values()) + missed, abs=2)


def test_where_the_trace_misses_more_at_more_rows_two_trials_tell() -> None:
    traces = [traced(rows, {"forward_backward": 100 * rows}) for rows in (1, 4, 16)]
    trials = [completed(rows, {"forward_backward": 130 * rows + 7}) for rows in (2, 8)]
    model = fit(trials, traces, 0)
    assert model is not None
    assert model.peak_bytes(16) == 130 * 16 + 7


def test_between_traced_sizes_the_line_is_never_below_a_maximum_of_lines() -> None:
    def truth(rows: int) -> int:
        return max(1000 + rows, 40 * rows, 90 * rows - 2000)

    model = fit([], [traced(rows, {"forward_backward": truth(rows)}) for rows in (1, 4, 16, 64, 100)], 0)
    assert model is not None
    assert all(model.peak_bytes(rows) >= truth(rows) for rows in range(1, 101))


def test_items_are_interpolated_and_come_to_the_peak() -> None:
    traces = [traced(rows, {"forward_backward": 100 * rows}) for rows in (1, 5)]
    assert traced_items(traces, 3) == {"activations": 300}
    assert traced_items(traces[:1], 3) == {"activations": 100}
    assert traced_items([], 3) == {}


def test_saved_evidence_is_read_back_unchanged() -> None:
    explored = Explored(
        workload=workload(frozen=("encoder",)),
        process_bytes=5,
        traced=(traced(1, {"forward_backward": 9}),),
        trials=(completed(1, {"forward_backward": 10}, seconds=0.1), out_of_memory(2)),
    )
    evidence = Evidence(hardware=hardware(), request=request(), explored=(explored,))
    assert Evidence.model_validate_json(evidence.model_dump_json()) == evidence


def test_evidence_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="driver"):
        Evidence.model_validate({"hardware": hardware(), "request": request(), "explored": (), "driver": "580"})


def test_a_trial_lowers_or_raises_what_trace_and_process_say_short_or_not() -> None:
    traces = [traced(rows, {"forward_backward": 100 * rows}) for rows in (1, 10)]
    few = completed(2, {"forward_backward": 220})
    short = few.model_copy(update={"verified": False})
    assert [fit([t], traces, process_bytes=50).peak_bytes(10) for t in (short, few)] == [1020, 1020]  # type: ignore[union-attr]
    assert fit([completed(2, {"forward_backward": 290}, verified=False)], traces, 50).peak_bytes(10) == 1090  # type: ignore[union-attr]
