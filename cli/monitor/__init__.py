"""The command: one screen, live, or one picture."""

from __future__ import annotations

import os
import shutil
import sys
import time

from cli.monitor.facts import Glance
from cli.monitor.watch import MOMENT_SECONDS, Watch

WIDEST = 160
"""Columns of one picture."""
DUMB = ("dumb", "unknown")
"""What TERM says of a terminal that cannot move its cursor."""


def monitor_command(named: list[str], *, once: bool, as_json: bool) -> bool:
    """Show runs and machine: on a terminal a screen, else, or where it is asked for, one picture.

    Returns whether it ended as it should: a screen shows an error of ours itself. Raises ConfigurationError for a
    name that is no run.
    """
    watch = Watch(named)
    try:
        if as_json or once or not sys.stdout.isatty() or os.environ.get("TERM") in DUMB:
            time.sleep(MOMENT_SECONDS)
            _tell(watch.look(), as_json=as_json)
            return True
        from cli.render.screen import LiveScreen

        screen = LiveScreen(watch, sys.stdout.encoding)
        screen.run(mouse=False)  # so that text can be marked, and copied
        return not screen.return_code
    finally:
        watch.close()


def _tell(glance: Glance, *, as_json: bool) -> None:
    from cli.render.console import print_json
    from cli.render.monitor import draw, plain

    if as_json:
        print_json(glance.to_json())
        return
    width = min(WIDEST, shutil.get_terminal_size((80, 24)).columns)
    print_json(plain(draw(glance, width, None, sys.stdout.encoding or "ascii")))
