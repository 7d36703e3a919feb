"""The checks of a rehearsal: what each says of facts, of a disk, and of the rows that two workers told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import facts
import pytest
from test_planner import data_of

from autotune.errors import MachineError
from autotune.process import Event
from cli import rehearsal
from cli.rehearsal import Act, Check, attempt, check_folder, check_room_on_disk, check_rows, check_tokenizer

GIB = facts.GIB


def with_data(**changes: Any) -> Any:
    return facts.preprocessed(data=data_of(3000).model_copy(update=changes))


def test_a_folder_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("mine")
    assert check_folder(tmp_path).verdict == "ok"
    assert [file.name for file in tmp_path.iterdir()] == ["own.txt"]


def test_a_folder_that_is_none_fails_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check = attempt("folder", lambda: check_folder(tmp_path / "file"))
    assert (check.name, check.verdict) == ("folder", "FAILED")
    assert "Not a directory" in check.told
    with pytest.raises(MachineError):
        check_folder(tmp_path / "file")


def test_a_row_of_many_times_the_limit_fails_one_that_is_cut_is_told_of_and_others_pass() -> None:
    assert check_rows(with_data()).verdict == "ok"
    cut = check_rows(with_data(cuts={"answer_cut": 3}, longest_row=(100, "a.jsonl: line 7")))
    assert cut.verdict == "look"
    assert "longest: 100 tokens (a.jsonl: line 7); 3 rows of 3,000 are cut" in cut.told
    broken = check_rows(with_data(cuts={"answer_cut": 1}, longest_row=(91_233, "a.jsonl: line 7")))
    assert broken.verdict == "FAILED"
    assert (
        broken.told == "longest: 91,233 tokens (a.jsonl: line 7), 3801 times what a sample may have: look at that row"
    )


def test_documents_of_any_length_are_split_and_no_fault() -> None:
    assert check_rows(with_data(cuts={"split": 24}, longest_row=(91_233, "a.jsonl: line 7"))).verdict == "ok"


def test_a_tokenizer_that_does_not_know_the_data_fails() -> None:
    assert check_tokenizer(with_data(unknown_share=0.005)).verdict == "ok"
    failed = check_tokenizer(with_data(unknown_share=0.26))
    assert (failed.verdict, failed.told.split(":")[0]) == ("FAILED", "26% of the data's tokens are unknown to it")


def test_a_disk_has_room_for_all_checkpoints_or_says_how_much_is_missing(tmp_path: Path) -> None:
    work = facts.workload()
    check = check_room_on_disk(tmp_path, work, 3, facts.hardware(disk_free_bytes=3 * GIB))
    assert (check.verdict, check.bytes) == ("ok", 5 * 12 * 26_000_000 + 8 * 26_000_000 + 16 * 2**20)
    small = attempt("disk", lambda: check_room_on_disk(tmp_path, work, 3, facts.hardware(disk_free_bytes=GIB)))
    assert small.verdict == "FAILED"
    assert "has 1,024 MiB for it, checkpoints and models take 1,702 MiB" in small.told


# What a worker told.


def step(number: int, loss: float | None = 8.7, peak: int = GIB, norm: float | None = 1.0) -> dict[str, Any]:
    return {"kind": "train", "step": number, "loss": loss, "gradient_norm": norm, "samples": 64, "seconds": 1.0,
            "peak_memory_bytes": peak}  # fmt: skip


def saved(number: int) -> dict[str, Any]:
    return {"kind": "event", "event": "checkpoint", "step": number, "seconds": 0.2, "bytes": 2**20}


def ran_out(where: str) -> dict[str, Any]:
    return {"kind": "event", "event": "out_of_memory", "where": where, "message": "no more", "step": 2}


VALIDATION = {"kind": "validation", "step": 2, "loss": 8.6, "samples": 16, "seconds": 3.0, "generation_seconds": 1.0,
              "peak_memory_bytes": GIB}  # fmt: skip
PROVEN = {"kind": "event", "event": "verified", "step": 0, "layout": "packed"}
WHOLE = [PROVEN, step(1), saved(1), step(2), VALIDATION, saved(2)]


def seen(rows: Sequence[dict[str, Any]], failure: str = "", **model: Any) -> dict[str, Check]:
    known = facts.preprocessed(data=data_of(3000))
    known = known.model_copy(update={"model": known.model.model_copy(update=model)})
    checks = list(rehearsal.of_first(Act(list(rows), failure), facts.plan(), known))
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def failed(checks: dict[str, Check]) -> list[str]:
    return [name for name, check in checks.items() if check.verdict == "FAILED"]


def test_a_run_that_does_all_that_was_asked_passes_every_check() -> None:
    checks = seen(WHOLE)
    assert list(checks) == ["proof", "steps", "loss", "evaluation", "answers", "save", "kill"]
    assert {check.verdict for check in checks.values()} == {"ok"}
    assert (checks["evaluation"].seconds, checks["answers"].seconds) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("rows", "failure", "name"),
    [
        ([], "the model cannot be built", "proof"),
        ([PROVEN | {"event": "unverified"}, *WHOLE[1:]], "", "proof"),
        ([PROVEN], "memory ran out: no more", "steps"),
        ([PROVEN, step(1), ran_out("step"), step(2), VALIDATION, saved(1), saved(2)], "", "steps"),
        ([PROVEN, step(1, peak=21 * GIB), step(2), VALIDATION, saved(1), saved(2)], "", "steps"),
        ([PROVEN, step(1, None, norm=None), step(2), VALIDATION, saved(1), saved(2)], "", "loss"),
        ([PROVEN, step(1), saved(1), step(2), ran_out("evaluation"), VALIDATION, saved(2)], "", "evaluation"),
        ([PROVEN, step(1), saved(1), step(2)], "memory ran out: no more", "evaluation"),
        ([PROVEN, step(1), saved(1), step(2), ran_out("answers"), VALIDATION, saved(2)], "", "answers"),
        ([PROVEN, step(1), step(2), VALIDATION], "the disk is full", "save"),
    ],
)
def test_what_goes_wrong_fails_the_check_that_it_is_of_and_no_other(
    rows: list[dict[str, Any]], failure: str, name: str
) -> None:
    checks = seen(rows, failure)
    assert failed(checks) == [name]
    assert checks[name].told


def test_pretrained_weights_that_know_no_more_than_guessing_were_trained_with_another_tokenizer() -> None:
    assert failed(seen(WHOLE, random_weights=True)) == []
    assert failed(seen(WHOLE, random_weights=False)) == ["loss"]
    assert failed(seen([PROVEN, step(1, 3.0), *WHOLE[2:]], random_weights=False)) == []


def test_a_step_taken_again_is_the_same_to_the_bit_on_a_processor_and_nearly_so_on_a_card() -> None:
    first = Act(list(WHOLE))
    assert rehearsal.resumed(first, Act(WHOLE[3:5]), exact=True).verdict == "ok"
    other = Act([step(2, 8.7000001), VALIDATION])
    assert rehearsal.resumed(first, other, exact=True).verdict == "FAILED"
    assert rehearsal.resumed(first, other, exact=False).verdict == "ok"
    assert rehearsal.resumed(first, Act([step(2, 8.8), VALIDATION]), exact=False).verdict == "FAILED"
    assert rehearsal.resumed(first, Act([step(2), VALIDATION | {"loss": 8.7}]), exact=True).verdict == "FAILED"
    assert rehearsal.resumed(first, Act([], "no such checkpoint"), exact=True).told == "no such checkpoint"


def test_what_a_worker_said_of_memory_is_how_it_failed() -> None:
    act = Act()
    event: Event = {"event": "out_of_memory", "message": "no more"}
    act.take(event)
    assert act.failure == "memory ran out: no more"
