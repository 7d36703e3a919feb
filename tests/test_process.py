"""Workers: real processes that answer, fail, die with their parent, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_models import workload

from autotune.errands import Dry, Preprocess, Preprocessed
from autotune.errors import ConfigurationError, DataError
from autotune.process import ALLOCATORS, Pulse, Worker, ask, held_bytes


def errand(tmp_path: Path, model: str = "tiny", data: tuple[str, ...] | None = None) -> Preprocess:
    return Preprocess(
        model=model,
        tokenizer=None,
        dropout=None,
        freeze=(),
        data=data,
        validation=(),
        validation_split=None,
        stage=None,
        max_seq_len=64,
        max_target_len=64,
        limit=None,
        show=0,
        cache_dir=str(tmp_path),
    )


def dry(rows: int = 2, **changes: object) -> Dry:
    work = workload("llama", **({"model": "tiny"} | changes))
    return Dry(
        workload=work,
        device="cpu",
        micro_batch_size=rows,
        ranks=1,
        backend=None,
        verify=True,
        budget_bytes=2**40,
        limit_bytes=2**40,
        excerpt=None,
    )


def test_a_users_mistake_crosses_the_pipe_with_its_type(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.parquet"):
        list(ask(errand(tmp_path, data=("nowhere.parquet",)), cores=1))


def test_an_errand_is_answered_and_a_file_called_like_our_rooms_in_the_users_folder_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("trainer.py", "torch.py", "autotune.py"):
        (tmp_path / name).write_text("raise SystemExit('ran the wrong file')")
    events = list(ask(errand(tmp_path), cores=1))
    facts = Preprocessed.model_validate(events[-1]["result"])
    assert facts.model.task == "causal"
    assert facts.data is None


def test_leaving_a_worker_ends_it() -> None:
    with Worker(cores=1) as worker:
        worker.give(dry(rows=512))
        process = psutil.Process(worker.process_id)
        assert process.is_running()
    assert not psutil.pid_exists(process.pid)


@pytest.mark.parametrize("busy", [True, False], ids=["at work", "waiting for its errand"])
def test_a_worker_dies_with_its_supervisor(busy: bool) -> None:
    program = (
        "import sys, time\n"
        "from autotune.errands import ERRAND\n"
        "from autotune.process import Worker\n"
        "with Worker(cores=1) as worker:\n"
        f"    {busy} and worker.give(ERRAND.validate_json(sys.argv[1]))\n"
        "    print(worker.process_id, flush=True)\n"
        "    time.sleep(60)\n"
    )
    root = str(Path(__file__).parent.parent)
    supervisor = subprocess.Popen(
        [sys.executable, "-c", program, dry(rows=512).model_dump_json()],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert supervisor.stdout is not None
    worker = psutil.Process(int(supervisor.stdout.readline()))
    if busy:
        _wait_until(lambda: _oom_score(worker.pid) == 1000)  # it has read its errand
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()
    _wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def test_a_process_of_several_that_ends_is_no_standstill() -> None:
    pulse = Pulse()
    for spent in (5.0, 1.0, 1.1, 1.2, 1.3):
        time.sleep(0.25)
        assert not pulse.stands_still(lambda spent=spent: spent, 0.4)
    time.sleep(0.5)
    assert pulse.stands_still(lambda: 1.3, 0.4)


def _oom_score(process_id: int) -> int:
    return int(Path(f"/proc/{process_id}/oom_score_adj").read_text())


def _wait_until(holds: object, seconds: float = 30) -> None:
    assert callable(holds)
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_death_by_signal_9_is_told_from_a_users_mistake_which_keeps_its_hint() -> None:
    with Worker(cores=1) as worker:
        worker.give(dry(rows=512))
        os.kill(worker.process_id, signal.SIGKILL)
        assert list(worker.events()) == []
        assert worker.was_killed
    with Worker(cores=1) as worker:
        worker.give(dry(model="tiny-t6"))
        with pytest.raises(ConfigurationError) as error:
            list(worker.events())
        assert "tiny-t5" in error.value.hint
        assert worker.exit_code == ConfigurationError.exit_code
        assert not worker.was_killed


def test_the_worker_gets_the_allocator_and_the_threads_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with Worker(cores=2, allocator="tight") as worker:
        worker.give(dry(rows=512))
        _wait_until(lambda: _oom_score(worker.process_id) == 1000)
        environment = psutil.Process(worker.process_id).environ()
        assert held_bytes(worker.process_id) > 10 * 2**20
    assert environment["OMP_NUM_THREADS"] == "2"
    assert ALLOCATORS["tight"].items() <= environment.items()


def test_what_a_library_prints_does_not_disturb_the_answer(tmp_path: Path) -> None:
    """The worker keeps its line to us apart from stdout, where anything may be printed."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import atexit, sys\nprint('noise before', flush=True)\nprint('{\"event\": 5}', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(site), str(Path(__file__).parent.parent)))}
    program = (
        "import sys\nfrom autotune.errands import ERRAND\nfrom autotune.process import ask\n"
        "import json\nprint(json.dumps(list(ask(ERRAND.validate_json(sys.argv[1]), 1))[-1]['event']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, errand(tmp_path).model_dump_json()],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == "result"
