"""Several ranks are one: the same losses, samples and weights, whatever their number, and all end when one does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import facts
import pytest
from injected import Shortage
from small_runs import Rows, evaluations, going_on, losses, of_kind, run, small_errand, weights

from autotune.errands import Follow, Train
from autotune.process import Worker
from trainer.ranks import Ranks

PROGRAM = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from autotune.errands import ERRAND
from injected import Shortage, run_struck
from trainer.ranks import join

torch.set_num_threads(1)
with join(torch.device("cpu"), "gloo", 60.0, print) as ranks:
    for line in Path(sys.argv[1]).read_text().splitlines():
        errand, shortage, resumed_at = json.loads(line)
        rows = run_struck(ERRAND.validate_python(errand), Shortage(**shortage), resumed_at, ranks)
        if ranks.leads:
            print(json.dumps(rows), flush=True)
"""
NOTHING = Shortage("forward", 0, ())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_together(
    errands: list[Train], world_size: int, folder: Path, struck: Sequence[tuple[Shortage, int]] = ()
) -> list[Rows]:
    """Train errands one after another on so many gloo ranks; return the rows of the first rank.

    `struck` is what each meets, and after how many steps it was stopped, and resumed, before.
    """
    file = folder / f"errands-{world_size}"
    lines = [
        json.dumps([errand.model_dump(mode="json", by_alias=True), asdict(shortage), resumed_at])
        for errand, (shortage, resumed_at) in zip(errands, struck or [(NOTHING, 0)] * len(errands), strict=True)
    ]
    file.write_text("\n".join(lines))
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(file)],
            env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    answers = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, answers
    return [json.loads(line) for line in answers[0][0].splitlines()]


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_ranks_give_the_losses_of_one_whatever_the_batch_and_whoever_has_no_sample(
    world_size: int, tmp_path: Path
) -> None:
    """Effective batches of 1, 2, 5 and more than there are samples, last steps smaller, an encoder frozen."""
    cases: list[dict[str, Any]] = [
        {"family": "llama", "effective_batch_size": 1, "max_steps": 6},
        {"family": "llama", "effective_batch_size": 5, "layout": "packed"},
        {"family": "t5", "effective_batch_size": 2, "max_steps": 8, "frozen": ("encoder",)},
        {"family": "t5", "effective_batch_size": 33, "samples": 40, "layout": "sorted"},
    ]
    errands = [
        small_errand(tmp_path, **case, dropout=0.0, epochs=2, output_dir=str(tmp_path / f"{i}"))
        for i, case in enumerate(cases)
    ]
    together = run_together(
        [e.model_copy(update={"output_dir": f"{e.output_dir}-together"}) for e in errands], world_size, tmp_path
    )
    for errand, rows in zip(errands, together, strict=True):
        alone = run(errand)
        for name in ("loss", "gradient_norm"):
            got, expected = ([row[name] for row in of_kind(r, "train")] for r in (rows, alone))
            assert got == pytest.approx(expected, rel=1e-5), name
        for name in ("samples", "tokens", "target_tokens"):
            assert [row[name] for row in of_kind(rows, "train")] == [row[name] for row in of_kind(alone, "train")]
        assert [row["loss"] for row in of_kind(rows, "validation")] == pytest.approx(
            [row["loss"] for row in of_kind(alone, "validation")], rel=1e-5
        )
        assert rows[-1]["event"] == "finished"


def test_where_one_rank_has_no_room_all_take_the_step_again_with_the_same_samples(tmp_path: Path) -> None:
    """In forward, backward, evaluation, the sum of gradients and a save; on the first, on the other, on both."""
    whole = small_errand(tmp_path, "llama", effective_batch_size=16, micro_batch_size=8, dropout=0.0, layout="fixed",
                         eval_every=4, saving=facts.saving(every_steps=3))  # fmt: skip
    alone = run(whole)
    struck = [
        (Shortage("forward", 0, (1,)), 0),
        (Shortage("backward", 3, (0,)), 0),
        (Shortage("evaluation", 3, (1,)), 0),
        (Shortage("sum", 2, (1,)), 0),
        (Shortage("sum", 5, (0, 1)), 3),
        (Shortage("save", 2, (0,)), 0),
    ]
    errands = [whole.model_copy(update={"output_dir": str(tmp_path / f"struck-{i}")}) for i in range(len(struck))]
    for (shortage, _), rows in zip(struck, run_together(errands, 2, tmp_path, struck), strict=True):
        told = of_kind(rows, "save_failed" if shortage.where == "save" else "out_of_memory")
        assert told, shortage
        for kind in ("train", "validation"):
            for name in ("loss", "samples"):
                got, expected = ([row[name] for row in of_kind(r, kind)] for r in (rows, alone))
                assert got == pytest.approx(expected, rel=1e-5), shortage
        assert rows[-1]["event"] == "finished"


def test_two_ranks_are_resumed_to_the_bit_and_go_on_as_one(tmp_path: Path) -> None:
    """With dropout, whose random numbers are each rank's own."""
    whole = small_errand(tmp_path, "t5", world_size=2, output_dir=str(tmp_path / "whole"))
    short = small_errand(tmp_path, "t5", world_size=2, output_dir=str(tmp_path / "short"), max_steps=5)
    short = short.model_copy(update={"recipe": short.recipe.model_copy(update={"schedule": "constant", "warmup": 0.0})})
    whole = whole.model_copy(update={"recipe": short.recipe.model_copy(update={"max_steps": None})})
    rest = going_on(whole, output_dir=short.output_dir, place=short.output_dir)
    rows = run_together([whole, short, rest], 2, tmp_path)
    assert losses(rows[1]) + losses(rows[2]) == losses(rows[0])
    assert evaluations(rows[2]) == [e for e in evaluations(rows[0]) if e[0] > 5]
    assert weights(tmp_path / "short") == weights(tmp_path / "whole")
    other = going_on(whole, output_dir=str(tmp_path / "one"), place=str(tmp_path / "whole" / "checkpoints"))
    assert of_kind(run(other), "resumed")[0]["step"] == 12


def test_shares_are_consecutive_and_differ_by_at_most_one() -> None:
    for world_size in (1, 2, 3, 7):
        for count in range(12):
            shares = [list(Ranks(rank, world_size).share(range(count))) for rank in range(world_size)]
            assert [sample for share in shares for sample in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def launched(errand: Train, ranks: int) -> Worker:
    Path(errand.output_dir).mkdir(exist_ok=True)
    worker = Worker(1, ranks=ranks)
    worker.give(errand)
    return worker


def rank_processes(worker: Worker) -> dict[int, int]:
    """The process of each rank, by what its environment says."""
    import psutil

    found = {}
    for child in psutil.Process(worker.process_id).children(recursive=True):
        rank = child.environ().get("RANK")
        if rank is not None:
            found[int(rank)] = child.pid
    return found


def after_steps(worker: Worker, count: int) -> None:
    for event in worker.events():
        if event["event"] == "metrics" and event["row"]["kind"] == "train" and event["row"]["step"] >= count:
            return
    raise AssertionError(worker.last_words())


@pytest.fixture
def endless(tmp_path: Path) -> Train:
    return small_errand(tmp_path, "llama", world_size=2, epochs=100_000, validation_store=None, heartbeat_seconds=3.0)


def test_ranks_that_are_launched_train_to_the_end(tmp_path: Path) -> None:
    errand = small_errand(tmp_path, "llama", world_size=2)
    with launched(errand, 2) as worker:
        rows = [event["row"] for event in worker.events() if event["event"] == "metrics"]
        assert worker.exit_code == 0, worker.last_words()
    assert rows[-1]["event"] == "finished"
    assert [row["step"] for row in of_kind(rows, "train")] == list(range(1, 13))


def test_a_rank_that_dies_ends_all_within_ten_seconds_and_is_named(endless: Train) -> None:
    with launched(endless, 2) as worker:
        after_steps(worker, 3)
        processes, began = rank_processes(worker), time.monotonic()
        os.kill(processes[1], signal.SIGKILL)
        (failed,) = [event for event in worker.events() if event["event"] == "rank_failed"]
        assert worker.exit_code != 0
        assert time.monotonic() - began < 10
    assert (failed["rank"], failed["exit_code"]) == (1, -signal.SIGKILL)
    assert not any(map(alive, processes.values()))


def test_a_rank_that_hangs_is_given_up_after_its_heartbeat_and_named(endless: Train) -> None:
    from autotune.errors import MachineError

    with launched(endless, 2) as worker:
        after_steps(worker, 3)
        processes, began = rank_processes(worker), time.monotonic()
        os.kill(processes[1], signal.SIGSTOP)
        with pytest.raises(MachineError, match="rank 1 has given no sign of life for 3 s"):
            for _ in worker.events():
                pass
        assert 2 < time.monotonic() - began < 10
    assert not any(map(alive, processes.values()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ranks_whose_launcher_is_told_to_stop_or_is_gone_save_and_leave(number: int, endless: Train) -> None:
    with launched(endless, 2) as worker:
        after_steps(worker, 3)
        processes = rank_processes(worker)
        os.kill(worker.process_id, number)
        rows = [event["row"] for event in worker.events() if event["event"] == "metrics"]
        end = time.monotonic() + 10
        while any(map(alive, processes.values())):
            assert time.monotonic() < end, "a rank was left"
            time.sleep(0.05)
    assert rows[-1]["event"] == "stopped"
    assert of_kind(rows, "checkpoint")


@pytest.mark.slow
def test_a_rank_that_hangs_is_not_waited_for_where_nobody_watches_any_more(endless: Train) -> None:
    """The supervisor is gone, and a rank is stopped: the other leaves by its heartbeat, the launcher ends the rest."""
    with launched(endless, 2) as worker:
        after_steps(worker, 3)
        processes = rank_processes(worker)
        os.kill(processes[1], signal.SIGSTOP)
        os.kill(worker.process_id, signal.SIGTERM)  # what the kernel sends it then
        end = time.monotonic() + 20
        while any(map(alive, [worker.process_id, *processes.values()])):
            assert time.monotonic() < end, "a process was left"
            time.sleep(0.05)


def test_ranks_that_have_other_data_train_nothing(tmp_path: Path) -> None:
    """As on machines whose files differ: each says so, and none waits for the other."""
    program = "import sys; from trainer.worker import main; main()"
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first = small_errand(tmp_path, "llama", world_size=2)
    Path(first.output_dir).mkdir()
    second = Follow(device="cpu", backend=None, heartbeat_seconds=60, data_contents="other",
                    **first.model_dump(include={"store", "validation_store", "tokenizer_dir"}))  # fmt: skip
    processes = []
    for rank, errand in enumerate((first, second)):
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | common | {"RANK": str(rank)},
            stdin=-1,
            stdout=-1,
            stderr=-1,
        )
        assert process.stdin is not None
        process.stdin.write(errand.model_dump_json(by_alias=True).encode())
        process.stdin.close()
        process.stdin = None
        processes.append(process)
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 3, err
        assert b"the ranks do not have the same data" in out


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
