"""A run that was stopped or killed goes on as if it had not been: the same samples, the same losses, to the bit."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import facts
import pytest
from injected import memory_runs_out, not_a_number, run_while
from small_runs import Rows, evaluations, going_on, losses, of_kind, run, small_errand, stopping_at, weights

from autotune.errors import ConfigurationError, MachineError, NothingFitsError, TrainingFailedError
from trainer import manifest

EVERY = facts.saving(every_steps=1)


@pytest.mark.parametrize(
    ("family", "micro_batch_size"),
    [("t5", 2), ("llama", 8), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("t5", 8), ("llama", 2)])],
)
def test_stopped_at_any_step_and_resumed_it_is_the_run_that_was_never_stopped(
    family: str, micro_batch_size: int, tmp_path: Path
) -> None:
    """With accumulation 4 and 1, dropout, epochs of uneven steps, evaluations between."""
    whole = small_errand(tmp_path, family, micro_batch_size=micro_batch_size, eval_every=2)
    rows = run(whole)
    assert len(losses(rows)) == 12
    for step in range(1, 13):
        errand = whole.model_copy(update={"output_dir": str(tmp_path / f"stopped-{step}")})
        first = run(errand, stopping_at(step))
        assert first[-1]["event"] == "stopped"
        assert step - first[-1]["step"] in (0, 1)
        second = run(going_on(errand))
        assert losses(first) + losses(second) == losses(rows)
        assert evaluations(first) + evaluations(second) == evaluations(rows)
        assert second[-1] == rows[-1] | {
            name: value.replace(whole.output_dir, errand.output_dir)
            for name, value in rows[-1].items()
            if isinstance(value, str)
        }
        assert weights(Path(errand.output_dir)) == weights(Path(whole.output_dir))
        shutil.rmtree(errand.output_dir)


def test_every_sample_is_used_once_an_epoch_whatever_the_stops(tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama")
    first, second = run(errand, stopping_at(5)), run(going_on(errand))
    assert [row["samples"] for row in of_kind(first + second, "train")] == [8, 8, 7] * 4


def test_a_kill_leaves_the_newest_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    """Rows past it are taken again: a generator that is dropped is a process that died."""
    whole = small_errand(tmp_path, "t5", output_dir=str(tmp_path / "whole"))
    rows = run(whole)
    errand = small_errand(tmp_path, "t5", saving=facts.saving(every_steps=3))

    with pytest.raises(ZeroDivisionError):
        run(errand, lambda rows: bool(0 // (len(of_kind(rows, "train")) < 8)))
    second = run(going_on(errand))
    (resumed,) = of_kind(second, "resumed")
    assert (resumed["step"], resumed["same_plan"], resumed["changed"], resumed["damaged"]) == (6, True, [], [])
    assert resumed["verified_bytes"] > 50_000
    assert losses(second) == losses(rows)[6:]
    assert weights(Path(errand.output_dir)) == weights(Path(whole.output_dir))


def test_another_cut_of_the_steps_takes_the_same_samples_to_nearly_the_same_losses(tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "t5", dropout=0.0)
    rows = run(errand.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    run(errand, stopping_at(4))
    for number, (layout, size) in enumerate([("fixed", 1), ("sorted", 8), ("packed", 3)]):
        other = small_errand(
            tmp_path, "t5", dropout=0.0, layout=layout, micro_batch_size=size, output_dir=str(tmp_path / str(number))
        )
        second = run(going_on(other, place=errand.output_dir))
        assert not of_kind(second, "resumed")[0]["same_plan"]
        assert [row["loss"] for row in of_kind(second, "train")] == pytest.approx(
            [row["loss"] for row in of_kind(rows, "train")][of_kind(second, "resumed")[0]["step"] :], rel=1e-5
        )


def test_what_is_not_the_same_run_is_refused_by_name_and_its_weights_may_begin_another(tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama")
    run(errand, stopping_at(4))
    for other, word in (
        (small_errand(tmp_path, "llama", samples=24), "data"),
        (small_errand(tmp_path, "llama", effective_batch_size=7), "effective batch size"),
        (small_errand(tmp_path, "llama", seed=1), "seed"),
        (small_errand(tmp_path, "llama", tokenizer_fingerprint="other"), "tokenizer"),
        (small_errand(tmp_path, "gpt2"), "model"),
    ):
        with pytest.raises(ConfigurationError, match=f"another {word}"):
            run(going_on(other))
    weights_only = small_errand(tmp_path, "llama", samples=24, output_dir=str(tmp_path / "other"))
    rows = run(going_on(weights_only, place=errand.output_dir, weights_only=True))
    fresh = run(weights_only.model_copy(update={"output_dir": str(tmp_path / "fresh")}))
    assert of_kind(rows, "resumed")[0]["step"] == 0
    assert [row["step"] for row in of_kind(rows, "train")] == list(range(1, 13))
    assert losses(rows)[0] != losses(fresh)[0]


def test_a_finished_run_goes_on_when_its_epochs_grow_and_else_has_nothing_to_do(tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama", epochs=2, schedule="constant", warmup=0)
    first = run(errand)
    assert of_kind(run(going_on(errand)), "train") == []
    second = run(going_on(small_errand(tmp_path, "llama", epochs=4, schedule="constant", warmup=0)))
    assert of_kind(second, "resumed")[0]["changed"] == ["epochs 2.0 -> 4"]
    whole = small_errand(tmp_path, "llama", epochs=4, schedule="constant", warmup=0, output_dir=str(tmp_path / "whole"))
    assert losses(first) + losses(second) == losses(run(whole))


def test_a_damaged_checkpoint_is_passed_over_and_an_older_one_that_is_named_moves_later_ones_aside(
    tmp_path: Path,
) -> None:
    errand = small_errand(tmp_path, "llama", saving=facts.saving(every_steps=2, keep_last=9))
    rows = run(errand, stopping_at(8))
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000008" / "optimizer.safetensors").write_bytes(b"")
    second = run(going_on(errand), stopping_at(9))
    (resumed,) = of_kind(second, "resumed")
    assert resumed["step"] == 6
    assert "optimizer.safetensors has 0 bytes" in resumed["damaged"][0]
    assert losses(second)[:2] == losses(rows)[6:8]
    third = run(going_on(errand, place=str(folder / "step-00000002")), stopping_at(3))
    assert losses(third) == losses(rows)[2:3]
    moved = [Path(place).name for place in of_kind(third, "resumed")[0]["given_up"]]
    assert moved == ["step-00000009", "step-00000008", "step-00000006", "step-00000004", "step-00000003"]
    assert {p.name for p in folder.iterdir()} == {"step-00000002", "step-00000003"}
    given_up = {p.name for p in (tmp_path / "run" / "checkpoints-given-up").iterdir()}
    assert given_up >= {"step-00000006", "step-00000008"}


def test_a_stop_breaks_an_evaluation_off_and_it_is_made_up_for(tmp_path: Path) -> None:
    """Both before it, and between its batches."""
    whole = small_errand(tmp_path, "llama", eval_every=2)
    rows = run(whole)
    asked = []

    def while_evaluating(rows: Rows) -> bool:
        """Asked after step 4 and again before each batch of its evaluation."""
        asked.append(len(of_kind(rows, "train")))
        return asked.count(4) > 2

    errand = whole.model_copy(update={"output_dir": str(tmp_path / "stopped")})
    first = run(errand, while_evaluating)
    assert [row["step"] for row in of_kind(first, "validation")] == [2]
    assert losses(first)[-1][0] == 4
    again = run(going_on(errand), lambda rows: True)
    assert losses(again) == evaluations(again) == [], "nor is it lost by a stop while it is made up for"
    assert again[-1]["event"] == "stopped"
    second = run(going_on(errand))
    assert evaluations(first) + evaluations(second) == evaluations(rows)
    assert losses(first) + losses(second) == losses(rows)


def test_a_model_that_cannot_be_written_is_told_and_its_checkpoint_is_there(tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama", epochs=1)
    Path(errand.output_dir).mkdir()
    blocker = tmp_path / "run" / ".model.partial"
    blocker.write_text("a file where a folder should be")
    with pytest.raises(MachineError, match="model could not be saved: File exists"):
        run(errand)
    blocker.unlink()
    assert of_kind(run(going_on(errand)), "train") == []
    assert weights(tmp_path / "run")


def test_a_best_whose_checkpoint_is_gone_is_told_and_ends_nothing(tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama", epochs=9, eval_every=3, learning_rate=30.0, warmup=26, saving=EVERY)

    def lose(rows: Rows) -> bool:
        for row in of_kind(rows, "validation"):
            shutil.rmtree(tmp_path / "run" / "checkpoints" / manifest.name_of(row["step"]), ignore_errors=True)
        return False

    rows = run(errand, lose)
    assert rows[-1]["event"] == "finished"
    assert rows[-1]["best_model"] is None
    assert "cannot be read" in rows[-1]["best_lost"]
    assert not (tmp_path / "run" / "best").exists()


def test_the_best_is_a_checkpoint_that_stays_and_becomes_a_model_at_the_end(tmp_path: Path) -> None:
    """At a rate that rises beyond all bounds an early evaluation is the best: its checkpoint outlives later ones."""
    errand = small_errand(tmp_path, "llama", epochs=9, eval_every=3, learning_rate=30.0, warmup=26, saving=EVERY)
    rows = run(errand)
    best = min(of_kind(rows, "validation"), key=lambda row: row["loss"])["step"]
    assert best < 20
    assert rows[-1]["best_step"] == best
    assert (tmp_path / "run" / "checkpoints" / manifest.name_of(best)).is_dir()
    assert rows[-1]["best_model"] == str(tmp_path / "run" / "best")
    saves = of_kind(rows, "checkpoint")
    assert len(saves) == 27
    assert all(row["seconds"] > 0 and row["bytes"] > 50_000 for row in saves)


def test_a_checkpoint_that_cannot_be_written_is_an_event_and_the_run_goes_on_but_not_its_last(tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama", epochs=1, saving=EVERY)
    Path(errand.output_dir).mkdir()
    blocker = tmp_path / "run" / "checkpoints"
    blocker.write_text("a file where a folder should be")

    def unblock(rows: Rows) -> bool:
        if len(of_kind(rows, "train")) == 3:
            blocker.unlink(missing_ok=True)
        return False

    rows = run(errand, unblock)
    failed = of_kind(rows, "save_failed")
    assert [row["step"] for row in failed] == [1, 2]
    assert all("could not be saved" in row["message"] for row in failed)
    assert rows[-1]["event"] == "finished"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_step_that_memory_has_no_room_for_is_taken_again_with_the_same_samples(
    family: str, backward: bool, tmp_path: Path
) -> None:
    errand = small_errand(tmp_path, family, micro_batch_size=8, dropout=0.0, layout="fixed")
    whole = run(errand.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    rows = run_while(
        errand,
        lambda rows: memory_runs_out(
            lambda count, training: training and count > 4 and len(of_kind(rows, "train")) >= 4, backward=backward
        ),
    )
    (event,) = of_kind(rows, "out_of_memory")
    assert (event["step"], event["where"], event["rows"], event["rows_now"]) == (4, "step", 8, 4)
    assert [row["samples"] for row in of_kind(rows, "train")] == [8, 8, 7] * 4
    assert [row["loss"] for row in of_kind(rows, "train")] == pytest.approx(
        [row["loss"] for row in of_kind(whole, "train")], rel=1e-5
    )


def test_where_smaller_micro_batches_do_not_help_the_run_is_saved_and_ends(tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama", micro_batch_size=8, layout="fixed")
    seen: list[Rows] = []

    def full(rows: Rows) -> AbstractContextManager[object]:
        seen.append(rows)
        return memory_runs_out(lambda count, training: training and len(of_kind(rows, "train")) == 5)

    with pytest.raises(NothingFitsError, match=r"memory ran out in step 6 with micro-batches of 2 rows too") as error:
        run_while(errand, full)
    assert "--resume" in error.value.hint
    assert [row["rows_now"] for row in of_kind(seen[0], "out_of_memory")] == [4, 2, None]
    whole = run(errand.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    assert losses(run(going_on(errand))) == losses(whole)[5:]


def test_an_evaluation_that_memory_has_no_room_for_is_taken_in_smaller_micro_batches(tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama", micro_batch_size=8, layout="fixed")
    whole = run(errand.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    rows = run_while(
        errand,
        lambda rows: memory_runs_out(
            lambda count, training: bool(of_kind(rows, "train")) and not training and count > 2
        ),
    )
    told = {(row["where"], row["rows_now"]) for row in of_kind(rows, "out_of_memory")}
    assert told == {("evaluation", 4), ("evaluation", 2)}
    assert losses(rows) == losses(whole)
    assert [row["loss"] for row in of_kind(rows, "validation")] == pytest.approx(
        [row["loss"] for row in of_kind(whole, "validation")], rel=1e-5
    )


@pytest.mark.parametrize("where", ["activation", "loss", "gradient"])
def test_a_number_that_is_none_changes_no_weight_and_names_its_samples(where: str, tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama", saving=facts.saving(every_steps=1, keep_last=12), micro_batch_size=8)
    rows = run_while(errand, lambda rows: not_a_number(5, where, rows))
    (skipped,) = of_kind(rows, "skipped_step")
    assert (skipped["step"], len(skipped["samples"])) == (5, 8)
    folder = tmp_path / "run" / "checkpoints"
    for name in ("model.safetensors", "optimizer.safetensors"):
        hashes = [manifest.verify(folder / f"step-{step:08d}").files[name].sha256 for step in (4, 5, 6)]
        assert hashes[0] == hashes[1] != hashes[2]


def test_five_such_steps_in_a_row_end_the_run_with_their_samples_in_a_file(tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama")
    seen: list[Rows] = []

    def poisoned(rows: Rows) -> AbstractContextManager[object]:
        seen.append(rows)
        return not_a_number(4, "loss", rows, until=9)

    with pytest.raises(TrainingFailedError, match="5 steps in a row, up to step 8") as error:
        run_while(errand, poisoned)
    assert error.value.exit_code == 1
    skipped = of_kind(seen[0], "skipped_step")
    assert [row["step"] for row in skipped] == [4, 5, 6, 7, 8]
    file = tmp_path / "run" / "not-finite.json"
    assert [sample["sample"] for sample in json.loads(file.read_text())["samples"]] == skipped[-1]["samples"]
    file.unlink()
    file.mkdir()
    with pytest.raises(TrainingFailedError, match=r"could not be written to .*not-finite.json: Is a directory"):
        run_while(errand, poisoned)
