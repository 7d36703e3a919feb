"""Chat templates: programs of strangers, rendered in jinja's sandbox, under limits of time and memory. No torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, NoReturn

import jinja2
import psutil
from transformers.utils.chat_template_utils import _compile_jinja_template

from autotune.errors import ConfigurationError, DataError
from trainer.records import Turn
from trainer.ties import PARENT, die_with_parent

if TYPE_CHECKING:
    from types import FrameType

    from transformers import PreTrainedTokenizerFast

SECONDS = 5
"""Of processor time at most for one conversation: real ones take less than a thousandth of it."""
MIB = 2**20
CHILD_BYTES = 512 * MIB
"""Of address space that a first rendering may take beyond what the process has."""
OVER_LIMIT = 3
PROBE = (Turn("system", "a"), Turn("user", "b"), Turn("assistant", "c"), Turn("user", "d"), Turn("assistant", "e"))


class ChatTemplate:
    """A tokenizer's template, with what it is given beside the messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._given = {"tools": None, "documents": None, **tokenizer.special_tokens_map}

    def render(self, turns: Sequence[Turn], place: str, *, prompt: bool) -> str:
        """Return turns as text, with what an answer begins with if `prompt`.

        Raises DataError, with the place, where the template refuses them, and ConfigurationError where it takes longer
        than any honest one, or more memory than there is.
        """
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            with limited(), _clock:
                template = _compiled(self._tokenizer.get_chat_template())
                return str(template.render(messages=messages, add_generation_prompt=prompt, **self._given))
        except (_TooLongError, MemoryError) as error:
            _refuse(place, "memory" if isinstance(error, MemoryError) else "time")
        except Exception as error:  # noqa: BLE001 # whatever a stranger's program makes of them
            said = str(error) or type(error).__name__
            raise DataError(f"{place}: the tokenizer's chat template refuses this conversation: {said}") from None

    def check(self) -> None:
        """Render a short conversation in a child that is ended at its limits; raises ConfigurationError if it was.

        A single operation, such as a power, cannot be stopped from inside.
        """
        if sys.platform != "linux":  # elsewhere an address space has no limit, or a process no children
            return
        import resource

        taken = psutil.Process().memory_info().vms
        child = os.fork()
        if child == 0:
            code = 0
            try:
                os.environ.pop(PARENT, None)
                die_with_parent(signal.SIGKILL)
                resource.setrlimit(resource.RLIMIT_AS, (taken + CHILD_BYTES, taken + CHILD_BYTES))
                spent = int(sum(os.times()[:2]))
                resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS + 1, spent + SECONDS + 1))
                self._render_probe()
            except (ConfigurationError, MemoryError):
                code = OVER_LIMIT
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            _refuse("a conversation of five short turns", "time or memory")

    def _render_probe(self) -> None:
        for turns in (PROBE, PROBE[1:]):
            for prompt in (False, True):
                try:
                    self.render(turns, "", prompt=prompt)
                except DataError:  # which a row that is like it will tell, with its place
                    continue


def _refuse(place: str, what: str) -> NoReturn:
    raise ConfigurationError(
        f"{place}: the tokenizer's chat template takes more {what} than a chat template can need",
        "it is no chat template: take it out of the tokenizer's folder, or give another --tokenizer",
    )


class _TooLongError(BaseException):
    """Raised inside a template by the clock: nothing there can catch it."""


class _Clock:
    """Ends a rendering that is still the same at a second tick: what is long watched is many that are short."""

    ticking = False

    def __init__(self) -> None:
        self._number, self._running, self._seen = 0, False, 0

    def __enter__(self) -> None:
        self._number += 1
        self._running = True

    def __exit__(self, *_: object) -> None:
        self._running = False

    def tick(self, _number: int, _frame: FrameType | None) -> None:
        """Answer a signal."""
        if self._running and self._seen == self._number:
            raise _TooLongError
        self._seen = self._number


_clock = _Clock()


@contextmanager
def limited() -> Iterator[None]:
    """Interrupt each rendering inside that takes longer than the limit, where signals can.

    Around many, since a timer set for each takes as long as the rendering.
    """
    possible = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if _clock.ticking or not possible:
        yield
        return
    signal.signal(signal.SIGVTALRM, _clock.tick)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS / 2, SECONDS / 2)
    _clock.ticking = True
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _clock.ticking = False


@cache
def _compiled(template: str) -> jinja2.Template:
    """Return what `apply_chat_template` renders by, without what takes it three times as long."""
    compiled: jinja2.Template = _compile_jinja_template(template)
    compiled.globals = dict(compiled.globals)  # which each rendering copies: a chain of maps goes key by key
    return compiled
