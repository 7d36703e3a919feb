"""The program of the worker: one errand as JSON on stdin, events as JSON lines on stdout. Knows the errands, does none.

Started afresh for each errand, always with the same imports, so that what a dry step measures is what training takes.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain
from math import inf
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from trainer.ties import ERRAND_FILE, die_with_parent

if __name__ == "__main__":  # before what takes seconds to import
    die_with_parent(signal.SIGKILL)
    gc.disable()  # a sixth of the imports' time, for a million objects that all stay

import torch

from autotune.errands import (
    ERRAND,
    LOST_A_PEER,
    Chat,
    Conversation,
    Dry,
    Errand,
    Evaluate,
    Export,
    Exported,
    Follow,
    Import,
    Imported,
    Preprocess,
    Probe,
    Trace,
    Train,
)
from autotune.errors import ConfigurationError, DataError, MachineError, UserError, disk_error
from autotune.plan import Device, Workload
from trainer.attention import attention_of_processors
from trainer.board import Board
from trainer.chat import Chatter
from trainer.compiled import is_compile_error
from trainer.conversion import export_model, import_model
from trainer.dropout import fast_masks, mkl_draws
from trainer.dry import take_dry_steps
from trainer.fingerprints import Hashing
from trainer.loop import train
from trainer.memory import first_line, is_memory_error, tighten_heap
from trainer.model import make_deterministic
from trainer.probe import probe
from trainer.ranks import ALONE, PeerLostError, Ranks, join
from trainer.rows import RowFile
from trainer.scoring import score
from trainer.trace import trace

OUT_OF_MEMORY_EXIT, CRASHED = 9, 1
PEER_SECONDS = 1.0
DRY_HEARTBEAT_SECONDS = 600.0
"""Of ranks that only measure: a supervisor that still lives ends them before."""
NO_COMPILE = "plan and train with --compile off; compiling takes a C++ compiler, and Triton on a card"


class Log(io.FileIO):
    """The stderr that we were given: what a full disk has no room for is let go, and ends nothing."""

    def write(self, words: Any, /) -> int:
        """Write words, or lose them."""
        with contextlib.suppress(OSError):
            return super().write(words)
        return len(words)


class Events:
    """The line to the supervisor: the stdout we were given, kept apart from whatever libraries print there."""

    def __init__(self) -> None:
        self._pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, event: str, **fields: Any) -> None:
        """Write one event; once nobody listens, to nowhere: a run whose supervisor is gone still has to be saved."""
        try:
            self._pipe.write(json.dumps({"event": event} | fields) + "\n")
            self._pipe.flush()
        except BrokenPipeError:
            self._pipe = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 # for as long as we live


def main() -> NoReturn:
    """Do the errand that stands on stdin; exit 0, the code of a user's mistake, or 70."""
    events = Events()
    sys.stdout = sys.stderr = io.TextIOWrapper(
        Log(2, "w", closefd=False), encoding="utf-8", errors="backslashreplace", write_through=True
    )
    file = os.environ.get(ERRAND_FILE)
    errand = ERRAND.validate_json(Path(file).read_bytes() if file else sys.stdin.buffer.readline())
    _tie_to_parent(errand)
    try:
        _do(errand, events)
    except UserError as error:
        _fail(events, error)
    except (RuntimeError, MemoryError) as error:
        if is_memory_error(error):
            traceback.print_exc()
            events.send("out_of_memory", message=first_line(error))
            _leave(OUT_OF_MEMORY_EXIT)
        traceback.print_exc()
        if not is_compile_error(error):
            _leave(CRASHED)
        line = str(error).strip().splitlines()[0]
        _fail(events, ConfigurationError(f"the model does not compile here: {line}", NO_COMPILE))
    except Exception as error:  # noqa: BLE001 # told, and left at once, since what tears down after one may hang
        traceback.print_exc()
        if isinstance(error, OSError) and (told := disk_error(error)) is not None:
            _fail(events, told)
        _leave(CRASHED)
    _leave(0)


def _fail(events: Events, error: UserError) -> NoReturn:
    events.send("error", type=type(error).__name__, message=error.message, hint=error.hint)
    _leave(error.exit_code)


def _do(errand: Errand, events: Events) -> None:
    if isinstance(errand, Preprocess):
        from trainer.preprocess import preprocess

        answer = preprocess(errand, lambda doing, rows: events.send("progress", doing=doing, rows=rows))
        events.send("result", result=answer.model_dump(mode="json"))
        return
    if isinstance(errand, Import | Export):
        _convert(errand, events)
        return
    if isinstance(errand, Trace):
        for report in trace(errand):
            events.send("result", result=report.model_dump(mode="json"))
        return
    if isinstance(errand, Probe):
        _take_threads()
        events.send("result", result=probe(errand).model_dump(mode="json"))
        return
    _prepare_device(errand)
    with ExitStack() as faster:
        if _device(errand) == "cpu":
            faster.enter_context(attention_of_processors())
            faster.enter_context(nullcontext() if mkl_draws() else fast_masks())
        if isinstance(errand, Chat):
            _chat(errand, events)
        elif isinstance(errand, Evaluate):
            scored = score(errand, lambda doing: events.send("note", message=doing))
            events.send("result", result=scored.model_dump(mode="json"))
        elif isinstance(errand, Dry):
            with _ranks_of(errand, events) as ranks:
                measured = take_dry_steps(errand, ranks)
                if ranks.leads:
                    events.send("result", result=measured.model_dump(mode="json"))
        else:
            stopped = _Stop()
            with _ranks_of(errand, events) as ranks:
                _train_together(errand, events, stopped, ranks)


def _convert(errand: Import | Export, events: Events) -> None:
    if isinstance(errand, Import):
        made: Imported | Exported = import_model(errand, lambda doing: events.send("note", message=doing))
    else:
        made = export_model(errand)
    events.send("result", result=made.model_dump(mode="json"))


def _chat(errand: Chat, events: Events) -> None:
    """Answer one conversation after the other; a signal ends the answer that is being given."""
    stopped, chatter = _Stop(), Chatter(errand)
    events.send("ready")
    for line in sys.stdin.buffer:
        stopped.forget()
        asked = Conversation.model_validate_json(line)
        answered = chatter.answer(asked, lambda words: events.send("words", text=words), stopped)
        events.send("result", result=answered.model_dump(mode="json"))


@contextmanager
def _ranks_of(errand: Dry | Train | Follow, events: Events) -> Iterator[Ranks]:
    """Join the other ranks, if there are any; one that loses another leaves, which its launcher then explains."""
    seconds = DRY_HEARTBEAT_SECONDS if isinstance(errand, Dry) else errand.heartbeat_seconds

    def lost(rank: int) -> None:
        events.send("error", type="MachineError", message=f"rank {rank} has given no sign of life for {seconds:g} s",
                    hint="go on from the last checkpoint: --resume")  # fmt: skip
        _leave(LOST_A_PEER)

    if isinstance(errand, Dry) and errand.ranks == 1:  # whatever ranks the environment names
        yield ALONE
        return
    try:
        with join(torch.device(_device(errand)), errand.backend, seconds, lost) as ranks:
            yield ranks
    except PeerLostError:
        traceback.print_exc()
        time.sleep(PEER_SECONDS)  # so that it is seen that the other was first
        _leave(LOST_A_PEER)


def _train_together(errand: Train | Follow, events: Events, stopped: Callable[[], bool], ranks: Ranks) -> None:
    """Train what the first rank was told."""
    told = Train.model_validate_json(ranks.tell(errand.model_dump_json(by_alias=True)))
    if isinstance(errand, Follow):  # which was started before there was a plan
        if told.plan.workload.deterministic == "on":
            make_deterministic()
        if told.plan.workload.cpu_allocator == "tight":
            tighten_heap()
    if ranks.any(told.data_contents != errand.data_contents)[0]:
        raise DataError("the ranks do not have the same data", "give each machine the same files")
    if ranks.leads:
        _train(told, events, stopped, ranks)
        return
    here = errand.model_dump(include={"store", "validation_store", "tokenizer_dir"})
    for _ in train(told.model_copy(update=here), stopped, ranks):
        pass


def _train(errand: Train, events: Events, stopped: Callable[[], bool], ranks: Ranks = ALONE) -> None:
    """Train until the end or a signal; each row goes to its file first, then to the supervisor."""
    folder = Path(errand.output_dir)
    hashing = Hashing([Path(store) for store in (errand.store, errand.validation_store) if store])
    hashing.start()
    rows = _and_changes(train(errand, stopped, ranks), hashing)
    first = next(rows)  # which says whether it goes on from a checkpoint
    with (
        RowFile(folder / "metrics.jsonl", first.get("step", 0)) as metrics,
        RowFile(folder / "samples.jsonl", first.get("evaluated_at", 0)) as samples,
        Board(folder) if errand.tensorboard else nullcontext() as board,
    ):
        for row in chain([first], rows):
            # JSON has no word for a loss that is not finite.
            row = {name: None if value != value or value in (inf, -inf) else value for name, value in row.items()}
            ended = ""
            if row["kind"] == "sample":
                refused = samples.write({name: value for name, value in row.items() if name != "kind"})
            else:
                refused = metrics.write(row, sync=row.get("event") == "checkpoint")
                if board is not None:
                    ended = board.add(row)
            events.send("metrics", row=row)
            for event, message in (("rows_wait", refused), ("curves_end", ended)):
                if message:
                    told = {"kind": "event", "event": event, "step": row["step"], "message": message}
                    events.send("metrics", row=told)


def _and_changes(rows: Iterator[dict[str, Any]], hashing: Hashing) -> Iterator[dict[str, Any]]:
    """Yield rows, and before the next one an event for each data file that is not what was tokenized."""
    step = 0
    for row in rows:
        while hashing.changed:
            yield {"kind": "event", "event": "data_changed", "step": step, "file": hashing.changed.pop(0)}
        step = row["step"]
        yield row


class _Stop:
    """Whether a signal has asked for the end; the step that runs is finished first."""

    def __init__(self) -> None:
        self._asked = False
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGBREAK"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    def forget(self) -> None:
        """Take it as not asked for."""
        self._asked = False

    def __call__(self) -> bool:
        return self._asked


def _workload(errand: Dry | Train) -> Workload:
    return errand.workload if isinstance(errand, Dry) else errand.plan.workload


def _device(errand: Dry | Train | Follow | Evaluate | Chat) -> Device:
    return errand.plan.hardware.device if isinstance(errand, Train) else errand.device


def _prepare_device(errand: Dry | Train | Follow | Evaluate | Chat) -> None:
    if _device(errand) == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            f"this plan is for a GPU, and torch {torch.__version__} finds none that it can use",
            "install a torch build with CUDA, or hide the GPU with CUDA_VISIBLE_DEVICES= to train on the processor",
        )
    if isinstance(errand, Dry | Train) and _workload(errand).deterministic == "on":
        make_deterministic()
    _take_threads()


def _take_threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))


def _tie_to_parent(errand: Errand) -> None:
    """Die with the supervisor (a training run saves first), and let a dry step be the one that an OOM killer takes."""
    die_with_parent(signal.SIGTERM if isinstance(errand, Train | Follow) else signal.SIGKILL)
    if isinstance(errand, Dry) and sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):  # some containers mount /proc read-only
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _leave(code: int) -> NoReturn:
    """Exit without tearing down: all is written, and a destructor may still hang or crash."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    main()
