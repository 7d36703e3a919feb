"""What doctor found, as people read it: each fact with its source, then what is wrong and what mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from cli.doctor.facts import SHARED_MEMORY, CardFacts, Facts, Finding
from cli.render.console import out
from cli.render.sentences import others_line
from cli.render.units import count, gib, rate

MIB = 2**20


class Row(NamedTuple):
    """A line of the table."""

    name: str
    text: str
    source: str = ""


def print_report(
    facts: Facts, findings: Sequence[Finding], mask: Callable[[str], str], width: int | None = None
) -> None:
    """Print all that is known and all that follows, each text masked; as wide as the terminal, where nothing else."""
    out.print(f"[bold]chatlm doctor[/], {facts.made}: this machine, where it is read, and what is wrong\n")
    table = Table.grid(padding=(0, 2))
    table.width = width
    table.add_column(min_width=13, overflow="fold")
    table.add_column(overflow="fold")
    table.add_column(style="dim", overflow="fold", max_width=22)
    for section, rows in _sections(facts):
        table.add_row(f"[bold]{section}[/]")
        for row in rows:
            table.add_row(f"  {row.name}", *(escape(mask(text)) for text in (row.text, row.source)))
        table.add_row()
    out.print(table)
    _print_environment(facts, mask, width)
    _print_findings(findings, mask, width)
    out.print("\nTo report a bug, paste all of this in the issue.")
    out.print("Secrets, the home folder and the names of user and host are masked.")


def _print_environment(facts: Facts, mask: Callable[[str], str], width: int | None) -> None:
    out.print("[bold]Environment[/]")
    table = Table.grid(padding=(0, 0, 0, 2), pad_edge=True)
    table.width = width
    table.add_column(overflow="fold")
    for name, value in facts.environment.items():
        table.add_row(escape(mask(f"{name}={value}")))
    if not facts.environment:
        table.add_row("nothing is set that changes what chatlm does")
    out.print(table)
    out.print()


def _print_findings(findings: Sequence[Finding], mask: Callable[[str], str], width: int | None) -> None:
    problems = sum(finding.severity == "problem" for finding in findings)
    notes = f"{len(findings) - problems} worth knowing" if len(findings) > problems else "nothing else to know"
    out.print(f"[bold]Found: {count(problems, 'problem') if problems else 'no problem'}, {notes}[/]")
    table = Table.grid(padding=(0, 1))
    table.width = width
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for number, finding in enumerate(findings, start=1):
        colour = "red" if finding.severity == "problem" else "yellow"
        table.add_row(f" {number}", f"[bold {colour}]{finding.severity}:[/] {escape(mask(finding.message))}")
        table.add_row("", f"[bold]hint:[/] {escape(mask(finding.hint))}")
    out.print(table)


def _sections(facts: Facts) -> Iterator[tuple[str, Iterator[Row]]]:
    yield "Software", _software(facts)
    yield "Card", _cards(facts)
    yield "Host", _host(facts)
    yield "Speed", _speed(facts)


def _software(facts: Facts) -> Iterator[Row]:
    software, sources = facts.software, facts.sources
    versions = dict(software.versions)
    yield Row(
        "chatlm", f"{versions.pop('chatlm') or '?'}, Python {versions.pop('Python')}", sources["software.versions"]
    )
    torch = versions.pop("torch") or "not installed"
    built = f"built for CUDA {software.torch_cuda}" if software.torch_cuda else "built without CUDA"
    yield Row("torch", f"{torch}, {built}", sources["software.torch_cuda"])
    yield Row(
        "libraries",
        ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()),
        sources["software.versions"],
    )
    around = [f"glibc {software.glibc}"] * (software.glibc is not None)
    around.append("in Windows (WSL)" if software.wsl else f"in a container ({software.container})")
    if not (software.wsl or software.container):
        around[-1] = "no container" if software.windows else "no container, no WSL"
    yield Row("system", ", ".join([software.system, *around]), sources["software.system"])
    yield Row("C++ compiler", "found" if software.compiler else "none")


def _cards(facts: Facts) -> Iterator[Row]:
    driver, source = facts.driver, facts.sources["cards"]
    cuda = f", runs CUDA up to {driver.cuda[0]}.{driver.cuda[1]}" if driver.cuda else ""
    told = f"{driver.version or 'of unknown version'}{cuda}"
    if driver.trouble:
        seen = "an NVIDIA card is seen" if driver.card_is_seen else "no NVIDIA card is seen"
        told = f"{seen}, the driver cannot be asked ({driver.trouble})"
    yield Row("driver", told, facts.sources["driver"])
    for index, card in enumerate(facts.cards):
        yield Row(f"card {index}", _card(card), source)
        if card.memory_total_bytes is not None:
            yield Row("  memory", f"{gib(card.memory_total_bytes)}, {gib(card.memory_free_bytes)} free", source)
        if card.others:
            yield Row("  on it", others_line(card.others), source)
        if card.clock_mhz is not None:
            held = f", held down by {', '.join(card.slowed_by)}" if card.slowed_by else ""
            heat = f", {card.celsius} C" if card.celsius is not None else ""
            yield Row("  clock", f"{card.clock_mhz} of {card.most_clock_mhz or '?'} MHz{heat}{held}", source)
    if facts.cards or facts.visible is not None:
        shown = "not set: all" if facts.visible is None else f"CUDA_VISIBLE_DEVICES={facts.visible}"
        yield Row("visible", shown, facts.sources["visible"])
    on_card = facts.hardware.device == "cuda"
    device = facts.hardware
    room = f"{device.device_name}, {gib(device.device_memory_free_bytes)} may be used"
    yield Row("trains on", room if on_card else "the processor")
    if facts.measured is not None and on_card:
        yield Row("torch", "sees the card" if facts.measured.sees_card else "sees no card", facts.sources["measured"])


def _card(card: CardFacts) -> str:
    capability = ".".join(map(str, card.compute_capability)) if card.compute_capability else "unknown"
    bf16 = "bf16" if card.fast_bf16 else "no bf16"
    return f"{card.name}, compute capability {capability}, {bf16}" + ", in MIG mode" * card.mig


def _host(facts: Facts) -> Iterator[Row]:
    host, hardware, sources = facts.host, facts.hardware, facts.sources
    yield Row("processor", host.processor, sources["host.processor"])
    if host.features:
        yield Row("features", " ".join(host.features), sources["host.processor"])
    yield Row("cores", f"{hardware.cores} of {host.machine_cores} may be used", sources["hardware.cores"])
    yield Row(
        "memory",
        f"{gib(host.memory_total_bytes)}, {gib(host.memory_available_bytes)} free",
        sources["host.memory_total_bytes"],
    )
    for limit in host.limits:
        text = f"{gib(limit.limit_bytes)}, {gib(limit.available_bytes)} of it free: {limit.path}"
        yield Row("  limit", text, "control group")
    room = f"{gib(hardware.host_memory_available_bytes)} may be used"
    yield Row("  what binds", f"{room}, by {hardware.host_memory_limited_by}", "the least of these")
    swap = f"{gib(host.swap_used_bytes)} of {gib(host.swap_total_bytes)} in use" if host.swap_total_bytes else "none"
    yield Row("swap", swap, sources["host.swap_used_bytes"])
    if host.shared_memory_bytes is not None:
        yield Row(SHARED_MEMORY, f"{host.shared_memory_bytes / MIB:,.0f} MiB", sources["host.shared_memory_bytes"])
    for place in host.places:
        written = f"cannot be written: {place.refused}" if place.refused else "can be written"
        free = "" if place.free_bytes is None else f"{gib(place.free_bytes)} free, "
        text = f"{free}{written}: {place.path}"
        yield Row(place.what, text, sources["host.places"])


def _speed(facts: Facts) -> Iterator[Row]:
    other = f" (T5: {facts.t5_precision})" if facts.t5_precision != facts.precision else ""
    yield Row("precision", f"{facts.precision}{other} is taken here", facts.sources["precision"])
    measured, table = facts.measured, facts.table
    if measured is None:
        yield Row("measured", f"nothing: {facts.worker_failed}")
        return
    for precision, flops in measured.matrix_flops.items():
        best = table.flops.get(precision) if table else None
        yield Row(precision, f"matrices {_of_best(flops, best, 'FLOP/s')}", _source(facts, best))
    if measured.copy_bytes is not None:
        best = table.bytes_per_second if table else None
        yield Row(
            "memory", f"copied {_of_best(measured.copy_bytes, best, 'B/s')}, read and write", _source(facts, best)
        )
    if facts.hardware.device == "cuda" and not measured.sees_card:
        yield Row("measured", "nothing: torch sees no card")
    if measured.failed:
        yield Row("not measured", measured.failed, facts.sources["measured"])
    yield Row("torch uses", f"{count(measured.threads, 'thread')}, {measured.instructions}", facts.sources["measured"])


def _of_best(measured: float, best: float | None, unit: str) -> str:
    share = f", {measured / best:.0%} of the card's {rate(best, unit)}" if best else ""
    return f"at {rate(measured, unit)}{share}"


def _source(facts: Facts, best: float | None) -> str:
    return facts.sources["measured"] + (f"; {facts.sources['table']}" if best else "")
