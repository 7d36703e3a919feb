"""A training from the first row to the last: its worker, its signals, and what became of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import typer

from autotune.errands import LOST_A_PEER, Follow, Preprocessed, TimeLimit, Train
from autotune.errors import MachineError, NothingFitsError, UserError
from autotune.hardware import count_memory_kills, read_host_memory
from autotune.plan import Hardware, Plan
from autotune.process import Event, Worker, WorkerCrashedError
from cli.progress import RunProgress
from cli.render.console import err, say, show_command
from cli.render.run import print_run
from cli.render.units import gib
from cli.runs import RunPlace
from cli.wiring import choose_backend, make_recipe, make_saving
from profiles import Settings

ENDINGS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, n)]
"""Signals after which a run is saved: a queue that wants its machine back sends SIGUSR1, a closed terminal SIGHUP."""
STOPPED = 75
"""Exit code of a run that can go on: EX_TEMPFAIL of sysexits.h."""


@dataclass(frozen=True)
class Job:
    """All that a training needs, decided."""

    settings: Settings
    facts: Preprocessed
    hardware: Hardware
    plan: Plan
    evidence: str | None


@dataclass(frozen=True)
class Going:
    """How a training begins, and how it goes on."""

    write: Callable[[], None]
    """Writes down what the run was given; of one that goes on, once its checkpoint is known to be of the same run."""
    again: Sequence[str]
    """The command that goes on after a stop."""
    launches: bool
    """Whether the other ranks are to be launched, and were not with this command."""
    limit: TimeLimit | None
    """When it has to end."""


def train(job: Job, run: RunPlace, lock: int, going: Going) -> None:
    """Run the worker to its end, showing its rows; a signal lets it finish its step and save.

    The worker holds the run's folder too, by `lock`.
    """
    ranks = job.plan.batching.world_size if going.launches else 1
    allocator, kills = job.plan.workload.cpu_allocator, count_memory_kills()
    with (
        (run.folder / "log.txt").open("a+b" if run.resume else "w+b") as log,
        Worker(job.hardware.cores, allocator, log, (lock,), ranks) as worker,
        _signals_to(worker) as signals,
        RunProgress(job.plan) as progress,
    ):
        worker.give(make_errand(job, run, going.limit))
        failed: Event = {}
        for event in worker.events():
            if event["event"] == "metrics":
                if run.resume is not None and event["row"].get("event") == "started":
                    going.write()
                progress.show(event["row"])
            elif event["event"] == "out_of_memory":
                raise _no_longer_fits(job.plan, progress, str(event["message"]))
            elif event["event"] == "rank_failed":
                failed = event
        if not progress.ended and (progress.steps or not signals):
            raise _unexpected_end(worker, job.plan, progress, failed, count_memory_kills() - kills)
    print_run(progress, job.plan)
    if progress.ended == "stopped":
        show_command(err, "go on with:" if going.launches else "go on, by the same launcher, with:", going.again)
        raise typer.Exit(STOPPED)
    if signals and not progress.steps:
        raise typer.Exit(128 + signals[0])


def make_errand(job: Job, run: RunPlace, limit: TimeLimit | None) -> Train:
    """Say what a worker has to train."""
    facts, settings = job.facts, job.settings
    assert facts.data is not None
    assert facts.tokenizer_dir is not None
    assert facts.ids is not None
    return Train(
        plan=job.plan,
        recipe=make_recipe(settings, job.plan.workload.stage),
        store=facts.data.store,
        validation_store=facts.validation.store if facts.validation else None,
        tokenizer_dir=facts.tokenizer_dir,
        ids=facts.ids,
        output_dir=str(run.folder),
        data_contents=facts.data.contents,
        saving=make_saving(settings),
        time_limit=limit,
        longest=None,
        resume=run.resume,
        backend=choose_backend(settings),
        heartbeat_seconds=settings.heartbeat,
        tensorboard=settings.report_to == "tensorboard",
    )


def follow(settings: Settings, facts: Preprocessed, hardware: Hardware) -> None:
    """Run the worker of another rank than the first to its end."""
    assert facts.data is not None
    assert facts.tokenizer_dir is not None
    errand = Follow(
        device=hardware.device,
        store=facts.data.store,
        validation_store=facts.validation.store if facts.validation else None,
        tokenizer_dir=facts.tokenizer_dir,
        data_contents=facts.data.contents,
        backend=choose_backend(settings),
        heartbeat_seconds=settings.heartbeat,
    )
    with Worker(hardware.cores) as worker, _signals_to(worker, quietly=True):
        worker.give(errand)
        for _ in worker.events():
            pass
        if worker.exit_code:
            raise _ended(worker.exit_code, worker)


def _ended(code: int, worker: Worker, rank: str = "the worker ") -> Exception:
    if code == LOST_A_PEER:
        return MachineError(
            "another rank has ended, so this one ends too", "see what that one says; then go on: --resume"
        )
    return WorkerCrashedError(f"{rank}ended with exit code {code}:\n{worker.last_words()}")


@contextmanager
def _signals_to(worker: Worker, *, quietly: bool = False) -> Iterator[list[int]]:
    """Hand the first signal on as a wish to stop, and end at once on the second; yields those that came."""
    came: list[int] = []

    def take(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if came.count(number) > 1:  # a queue may send two kinds, one after the other
            worker.kill()
            raise typer.Exit(128 + number)
        if not quietly and len(came) == 1:
            say("stopping: finishing the step and saving; once more ends at once")
        worker.interrupt()

    before = {number: signal.signal(number, take) for number in ENDINGS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _no_longer_fits(plan: Plan, progress: RunProgress, message: str) -> UserError:
    saved = f"; go on from step {progress.saved} with --resume" if progress.saved else ""
    peak = plan.memory.measured_peak_bytes or plan.memory.predicted_peak_bytes
    return NothingFitsError(
        f"memory ran out after step {progress.steps} ({message}); the plan says a peak of "
        f"{gib(peak)} of {gib(plan.memory.limit_bytes)} free then",
        f"another program has taken memory since: close it, or give less to each step with --batch-size-per-gpu{saved}",
    )


def _unexpected_end(worker: Worker, plan: Plan, progress: RunProgress, failed: Event, kills: int) -> Exception:
    """Explain how a worker ended that said nothing, by the rank that failed first, if there are several.

    `kills` are those of the kernel for memory since it was started.
    """
    rank = f"rank {failed['rank']}, " if failed else ""
    if worker.was_killed or failed.get("exit_code") == -9:
        host = read_host_memory()
        by = (
            f"the kernel killed {kills} for memory in our control group" if kills else "as an out-of-memory killer does"
        )
        now = f"{gib(host.available_bytes)} are free now by {host.limited_by}"
        return _no_longer_fits(plan, progress, f"{rank}killed by signal 9: {by}; {now}")
    return _ended(failed.get("exit_code", worker.exit_code), worker, rank or "the worker ")
