"""A conversation in the terminal: with one model, word by word as it answers, or with several side by side."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from pydantic import ValidationError

from autotune.errands import Answered, Chat, Choosing, Conversation
from autotune.errors import ConfigurationError
from autotune.measure import SILENT_SECONDS
from autotune.plan import Device
from autotune.process import Worker, WorkerCrashedError
from cli.places import Found
from cli.render.chat import Streamed, print_side_by_side
from cli.render.console import print_json, say, warn

LEAVE, CLEAR = ("exit", "quit", "/exit", "/quit"), ("cls", "clear", "/clear")
YOU = "you> "


@dataclass
class Talker:
    """One model in its worker, and what was said with it so far."""

    found: Found
    worker: Worker
    turns: list[tuple[str, str]] = field(default_factory=list)

    def open(self, device: Device, choosing: Choosing) -> None:
        """Have the model loaded, and wait for it."""
        workload = self.found.plan.workload if self.found.plan else None
        errand = Chat(
            saved=self.found.saved,
            device=device,
            stage=self.found.stage,
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
        self.worker.write(Conversation(turns=tuple(turns)))
        answered = None
        events = self._events()
        while answered is None:
            try:
                for event in events:
                    if event["event"] == "words" and streamed is not None:
                        streamed.show(str(event.get("text")))
                    elif event["event"] == "result":
                        answered = self._parsed(event.get("result"))
                        break
                else:
                    raise self._crashed()
            except KeyboardInterrupt:
                self.worker.interrupt()
                events = self._events()
        self.turns += [("user", question), ("assistant", answered.text)]
        if answered.dropped:
            say(f"the oldest {answered.dropped} turns had no room, and were left out")
        return answered

    def _events(self) -> Iterator[dict[str, object]]:
        return (event for event in self.worker.poll(SILENT_SECONDS) if event is not None)

    def _parsed(self, result: object) -> Answered:
        try:
            return Answered.model_validate(result)
        except ValidationError as error:
            raise WorkerCrashedError(f"the worker's answer is none: {error}") from None

    def _crashed(self) -> WorkerCrashedError:
        code = self.worker.exit_code
        return WorkerCrashedError(f"the worker ended with exit code {code}:\n{self.worker.last_words()}")


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
    with ExitStack() as open_ones:
        talkers = [Talker(one, open_ones.enter_context(Worker(cores))) for one in found]
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
        print_side_by_side(question, dict(zip(names, answers, strict=True)))
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
            line = input(YOU) if typed else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        except UnicodeDecodeError:
            warn("what was typed is no UTF-8")
            continue
        if (not typed and not line) or line.strip() in LEAVE:
            return
        if line.strip():
            yield line.strip()


def check_device(asked: str, there: Device) -> Device:
    """Return where to run; raises ConfigurationError for a card that is not there."""
    if asked == "auto":
        return there
    if asked not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device {asked} is none of auto, cpu, cuda")
    if asked == "cuda" and there != "cuda":
        raise ConfigurationError("--device cuda: no GPU was found", "leave it out")
    return "cpu" if asked == "cpu" else "cuda"
