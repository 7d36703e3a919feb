"""The live screen: each second what changed, line by line, and nothing else. All that is said stands in `monitor`."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.events import Resize
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from cli.monitor.facts import Glance
from cli.monitor.watch import Watch
from cli.render.monitor import Line, draw

REFRESH_SECONDS = 1.0
STYLES = {
    "plain": Style(),
    "title": Style(bold=True),
    "dim": Style(dim=True),
    "good": Style(color="green"),
    "warn": Style(color="yellow"),
    "bad": Style(color="red", bold=True),
    "ours": Style(color="cyan"),
    "others": Style(color="magenta"),
    "mark": Style(color="yellow", bold=True),
}


class Board(ScrollView, can_focus=True):
    """Lines that are drawn by themselves: one that is as it was costs nothing."""

    DEFAULT_CSS = "Board { background: transparent; scrollbar-size-vertical: 1; }"

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[Line] = []
        self._strips: dict[int, Strip] = {}

    def show(self, lines: list[Line]) -> None:
        """Show these instead."""
        before, self._lines = self._lines, lines
        if len(before) != len(lines):
            self._strips.clear()
            self.virtual_size = Size(self.size.width, len(lines))
            self.refresh()
            return
        for y, (old, new) in enumerate(zip(before, lines, strict=True)):
            if old != new:
                self._strips.pop(y, None)
                self.refresh_line(y)

    def render_line(self, y: int) -> Strip:
        """Render one line of what is in view."""
        at = y + self.scroll_offset.y
        if at >= len(self._lines):
            return Strip.blank(self.size.width)
        strip = self._strips.get(at)
        if strip is None or strip.cell_length != self.size.width:
            segments = [Segment(text, STYLES[role]) for text, role in self._lines[at] if text]
            strip = self._strips[at] = Strip(segments).adjust_cell_length(self.size.width)
        return strip


class LiveScreen(App[None]):
    """Looks each second, and shows it."""

    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [Binding("q,escape,ctrl+c", "quit", "quit", priority=True)]

    def __init__(self, watch: Watch, encoding: str) -> None:
        super().__init__(ansi_color=True)
        self.animation_level = "none"
        self._watch, self._encoding = watch, encoding
        self.glance: Glance | None = None
        self.board = Board()

    def compose(self) -> ComposeResult:
        """Lay it out: one board."""
        yield self.board

    def on_mount(self) -> None:
        """Begin to look."""
        self.set_interval(REFRESH_SECONDS, self.look)

    def on_resize(self, _: Resize) -> None:
        """Draw anew for the room there is."""
        self.call_after_refresh(self.look)

    def look(self) -> None:
        """Look, and show what changed."""
        self.glance = self._watch.look()
        room = self.board.size
        hint = "arrows scroll, q quits"
        self.board.show(draw(self.glance, room.width, room.height, self._encoding, hint))
