"""A rehearsal as people read it: a numbered line for each check, as it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cli.rehearsal import Check
from cli.render.console import tell
from cli.render.units import count, duration, size


def show_checks(checks: Iterable[Check]) -> Iterator[Check]:
    """Print each check as it comes, and hand it on."""
    for number, check in enumerate(checks, 1):
        figures = [f"{check.seconds:.1f} s"] * (check.seconds >= 0.05)
        figures += [size(check.bytes)] if check.bytes is not None else []
        told = f"{check.told} ({', '.join(figures)})" if figures else check.told
        tell(f"{number:2}  {check.verdict:<9}  {check.name:<10}  {told}")
        yield check


def tell_outcome(checks: list[Check], seconds: float) -> None:
    """Say how many of them passed, and which did not."""
    failed = [check.name for check in checks if check.verdict == "FAILED"]
    untried = sum(check.verdict == "not tried" for check in checks)
    tried = len(checks) - untried
    said = f"rehearsed in {duration(seconds)}: {tried - len(failed)} of {count(tried, 'check')} passed"
    said += f"; FAILED: {', '.join(failed)}" if failed else ""
    tell(said + (f"; {untried} not tried" if untried else ""))
