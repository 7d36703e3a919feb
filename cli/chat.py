"""A conversation in the terminal: with one model, word by word as it answers, or with several side by side."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from pydantic import ValidationError

from autotune.errands import Answered, Chat, Choosing, Conversation
from autotune.errors import ConfigurationError, MachineError
from autotune.measure import SILENT_SECONDS
from autotune.plan import Device
from autotune.process import Worker, WorkerCrashedError
from cli.places import Found
from cli.render.chat import Streamed, print_side_by_side
from cli.render.console import print_json, say, warn

LEAVE, CLEAR = ("exit", "quit", "/exit", "/quit"), ("cls", "clear", "/clear")
SMALLER = "close other programs, or give a smaller model or --max-new-tokens"
YOU = "you> "


@dataclass
class Talker:
    """One model in its worker, and what was said with it so far."""

    found: Found
    worker: Worker
    typed: bool
    """Whether somebody types the questions."""
    turns: list[tuple[str, str]] = field(default_factory=list)

    def open(self, device: Device, choosing: Choosing) -> None:
        """Have the model loaded, and wait for it."""
        workload = self.found.plan.workload if self.found.plan else None
        errand = Chat(
            saved=self.found.saved,
            device=device,
            longest_prompt=workload.max_seq_len if workload and workload.task == "seq2seq" else None,
            choosing=choosing,
        )
        self.worker.give(errand, more=True)
        for event in self.worker.poll(SILENT_SECONDS):
            if event is not None and event["event"] == "ready":
                return
        raise self._crashed()

    def ask(self, system: str | None, question: str, exchanges: int, streamed: Streamed | None) -> Answered:
        """Ask with so many of the exchanges before; Ctrl-C ends the answer, and what there is of it is returned."""
        before = self.turns[-2 * exchanges :] if exchanges else []
        turns = [*([("system", system)] if system else []), *before, ("user", question)]
        with _interrupting(self.worker, leaves=not self.typed):
            self.worker.write(Conversation(turns=tuple(turns)))
            answered = self._answered(streamed)
        self.turns += [("user", question), ("assistant", answered.text)]
        if answered.dropped:
            del self.turns[: answered.dropped]
            say(f"the oldest {answered.dropped} turns had no room, and are left out from now on")
        return answered

    def _answered(self, streamed: Streamed | None) -> Answered:
        for event in self.worker.poll(SILENT_SECONDS):
            if event is None:
                continue
            if event["event"] == "words" and streamed is not None:
                streamed.show(str(event.get("text")))
            elif event["event"] == "result":
                return self._parsed(event.get("result"))
            elif event["event"] == "out_of_memory":
                raise MachineError(f"{self.found.saved.place}: memory ran out: {event.get('message')}", SMALLER)
        raise self._crashed()

    def _parsed(self, result: object) -> Answered:
        try:
            return Answered.model_validate(result)
        except ValidationError as error:
            raise WorkerCrashedError(f"the worker's answer is none: {error}") from None

    def _crashed(self) -> Exception:
        code = self.worker.exit_code
        if self.worker.was_killed:
            return MachineError(
                f"{self.found.saved.place}: its process was killed, as it is where memory runs out", SMALLER
            )
        return WorkerCrashedError(f"the worker ended with exit code {code}:\n{self.worker.last_words()}")


@contextmanager
def _interrupting(worker: Worker, *, leaves: bool) -> Iterator[None]:
    """Have Ctrl-C end the answer that is being given, and all where nobody types the next question."""
    asked = False

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal asked
        asked = True
        worker.interrupt()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked and leaves:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class Manner:
    """How is talked."""

    choosing: Choosing
    system: str | None
    exchanges: int | None
    """Of those before that a question is given with; None: all with a decoder, none with a seq2seq model of pairs."""

    def given_with(self, talker: Talker) -> int:
        """Return how many."""
        if self.exchanges is not None:
            return self.exchanges
        plan = talker.found.plan
        seq2seq = plan.workload.task == "seq2seq" if plan else talker.found.seq2seq
        return 0 if seq2seq else sys.maxsize // 2


def chat(
    found: Sequence[Found], device: Device, cores: int, manner: Manner, prompts: Sequence[str], *, as_json: bool
) -> None:
    """Answer the prompts, each by itself; without any, what is typed, until it ends."""
    for said in (*prompts, manner.system or ""):
        if not _is_text(said):
            raise ConfigurationError("a prompt is no UTF-8", "give it in the terminal's own encoding, or pipe it in")
    typed = not prompts and sys.stdin.isatty()
    with ExitStack() as open_ones:
        talkers = [Talker(one, open_ones.enter_context(Worker(cores)), typed) for one in found]
        for talker in talkers:
            say(f"loading {talker.found.saved.place}")
            talker.open(device, manner.choosing)
        if prompts:
            answers = []
            for prompt in prompts:
                for talker in talkers:
                    talker.turns.clear()
                answers.append(_ask_all(talkers, prompt, manner, quiet=as_json, shown=len(prompts) > 1))
            if as_json:
                told = [
                    {
                        "prompt": prompt,
                        "answers": {t.found.saved.place: a.model_dump() for t, a in zip(talkers, made, strict=True)},
                    }
                    for prompt, made in zip(prompts, answers, strict=True)
                ]
                print_json(json.dumps(told, indent=2, ensure_ascii=False))
            return
        for question in _questions():
            if question in CLEAR:
                for talker in talkers:
                    talker.turns.clear()
                say("what was said is forgotten")
            else:
                _ask_all(talkers, question, manner, quiet=False, shown=False)


def _ask_all(talkers: list[Talker], question: str, manner: Manner, *, quiet: bool, shown: bool) -> list[Answered]:
    """Ask each model, and show what it says."""
    if len(talkers) == 1:
        streamed = None if quiet else Streamed(f"{YOU}{question}" if shown else None)
        answered = talkers[0].ask(manner.system, question, manner.given_with(talkers[0]), streamed)
        if streamed is not None:
            streamed.end(answered)
        return [answered]
    answers = [talker.ask(manner.system, question, manner.given_with(talker), None) for talker in talkers]
    if not quiet:
        names = [talker.found.saved.place for talker in talkers]
        print_side_by_side(question, [*zip(names, answers, strict=True)])
    return answers


def _questions() -> Iterator[str]:
    """Yield what is typed, or piped; an empty line is none."""
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 # input() then has a history and an editable line
        say("Ctrl-C ends an answer, /clear forgets what was said, /exit or Ctrl-D leaves")
    while True:
        try:
            line = input(YOU) if typed else sys.stdin.buffer.readline().decode(errors="surrogateescape")
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        if (not typed and not line) or line.strip() in LEAVE:
            return
        if not _is_text(line):
            warn("a line that is no UTF-8 is no question")
        elif line.strip():
            yield line.strip()


def _is_text(line: str) -> bool:
    """Whether it has no bytes that were no characters."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_device(asked: str, there: Device) -> Device:
    """Return where to run; raises ConfigurationError for a card that is not there."""
    if asked == "auto":
        return there
    if asked not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device {asked} is none of auto, cpu, cuda")
    if asked == "cuda" and there != "cuda":
        raise ConfigurationError("--device cuda: no GPU was found", "leave it out")
    return "cpu" if asked == "cpu" else "cuda"
