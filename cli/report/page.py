"""Sections -> one HTML page that needs nothing else: no network, no script, no font but the system's. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cli.report.text import escaped

MARKER = '<meta name="generator" content="chatlm">'
"""By which a file is known to be one of ours, that may be written over."""


class Section(NamedTuple):
    """A part of the page under a heading of its own; `body` is HTML."""

    heading: str
    body: str


def page(title: str, lead: Sequence[str], facts: Sequence[tuple[str, str]], sections: Iterable[Section]) -> str:
    """Return the page: what it is in words, the figures that sum it up, and the sections that are not empty."""
    told = "".join(f"<p>{escaped(line)}</p>" for line in lead)
    figures = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(said)}</dd></div>" for name, said in facts)
    body = "".join(
        f"<section><h2>{escaped(section.heading)}</h2>{section.body}</section>" for section in sections if section.body
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARKER}\n{POLICY}\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{escaped(title)}</h1><div class="lead">{told}</div>'
        + (f'<dl class="facts">{figures}</dl>' if figures else "")
        + f"</header>\n{body}\n</main>\n</body>\n</html>\n"
    )


def figure(title: str, drawing: str, note: str = "") -> str:
    """Return a chart under its title, with a sentence that says how to read it."""
    said = f"<span>{escaped(note)}</span>" if note else ""
    return f"<figure><figcaption><b>{escaped(title)}</b>{said}</figcaption>{drawing}</figure>"


def beside(*made: str) -> str:
    """Return charts one below another, as one of those that stand side by side."""
    return f'<div class="column">{"".join(made)}</div>' if any(made) else ""


def figures(made: Iterable[str]) -> str:
    """Return charts side by side where there is room."""
    return f'<div class="figures">{"".join(made)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table of text; `kind` is a class of the style: `numbers` sets all but the first column to the right."""
    top = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{_cells(*row)}</tr>" for row in rows)
    whole = f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide-table">{whole}</div>'


def _cells(first: str, *others: str) -> str:
    """Return a row; long names break at their underscores."""
    name = escaped(first).replace("_", "_<wbr>")
    return f"<td>{name}</td>{''.join(f'<td>{escaped(cell)}</td>' for cell in others)}"


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Return names with what is said of them."""
    told = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(said)}</dd>" for name, said in rows)
    return f'<dl class="pairs">{told}</dl>'


def details(summary: str, body: str) -> str:
    """Return what is shown when it is asked for."""
    return f"<details><summary>{escaped(summary)}</summary>{body}</details>"


def paragraph(text: str) -> str:
    """Return a paragraph."""
    return f"<p>{escaped(text)}</p>"


def nothing(text: str) -> str:
    """Return a sentence that says why there is nothing."""
    return f'<p class="empty">{escaped(text)}</p>'


def quoted(text: str, kind: str) -> str:
    """Return text of the data or of a model, in the direction that it has of itself."""
    return f'<div class="quoted {kind}" dir="auto">{escaped(text)}</div>'


POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
)
"""That a browser fetches nothing and runs nothing, whatever stands in the data."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #d9dee3; --wash: #f5f7f9;
  --c0: #0b5cad; --c1: #b34700; --c2: #00765a; --c3: #8a3a83; --c4: #7a6a00; --c5: #444c56;
  --plan: #59636e; --limit: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e6e9ec; --soft: #a3adb8; --line: #343a41; --wash: #1c2126;
    --c0: #6cb2f5; --c1: #f0935a; --c2: #4fc3a1; --c3: #d69ad0; --c4: #d6c34f; --c5: #c2c9d1;
    --plan: #a3adb8; --limit: #ff8f85;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC", "Microsoft YaHei",
    "Noto Sans CJK SC", sans-serif;
  overflow-wrap: anywhere;
}
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .5rem; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 1rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: 0 0 .5rem; max-width: 76ch; }
.lead { font-size: 1.0625rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 1.25rem 0 0; }
.facts div { background: var(--wash); border-radius: 6px; padding: 10px 14px; }
.facts dt { font-size: .8125rem; color: var(--soft); }
.facts dd { margin: 0; font-size: 1.0625rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 28px 40px; }
.column { display: grid; gap: 28px; align-content: start; min-width: 0; }
figure { margin: 0; min-width: 0; max-width: 760px; container-type: inline-size; }
figcaption { margin-bottom: 8px; }
figcaption b { display: block; font-weight: 600; }
figcaption span { display: block; color: var(--soft); font-size: .875rem; line-height: 1.4; }
svg { display: block; width: 100%; height: auto; }
svg.narrow { display: none; }
@container (max-width: 470px) { svg.wide { display: none; } svg.narrow { display: block; } }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.title { fill: var(--ink); }
svg text.name { fill: var(--ink); font-size: 13px; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linecap: round; stroke-linejoin: round; }
.faint { stroke-width: 1; stroke-opacity: .4; }
.rule { stroke-width: 1.75; fill: none; }
.d1 { stroke-dasharray: 8 4; } .d2 { stroke-dasharray: 1.5 4.5; } .d3 { stroke-dasharray: 10 4 1.5 4; }
.d4 { stroke-dasharray: 4 3; } .d5 { stroke-dasharray: 14 4; }
.c0 { --own: var(--c0); } .c1 { --own: var(--c1); } .c2 { --own: var(--c2); }
.c3 { --own: var(--c3); } .c4 { --own: var(--c4); } .c5 { --own: var(--c5); }
.plan { --own: var(--plan); } .limit { --own: var(--limit); }
.line, .rule, .mark { stroke: var(--own); }
.bar { fill: var(--own); }
.bar.second { fill-opacity: .5; }
.mark.solid { fill: var(--own); stroke-width: 0; }
.mark.hollow { fill: var(--paper); stroke-width: 1.75; stroke-dasharray: none; }
.hit { fill: transparent; }
.hit:hover { fill: var(--soft); fill-opacity: .12; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 6px 0 0; padding: 0; }
.legend { font-size: .8125rem; color: var(--soft); line-height: 1.5; }
.legend li { display: flex; align-items: center; gap: 7px; }
svg.swatch { display: block; width: 32px; height: 14px; flex: none; }
.wide-table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); white-space: nowrap; }
table.numbers td:not(:first-child), table.numbers th:not(:first-child) { text-align: right; }
table.numbers td { white-space: nowrap; }
table.numbers td, table.events td:nth-child(-n+2) { overflow-wrap: normal; }
table.events td:nth-child(-n+2) { white-space: nowrap; }
td:first-child { overflow-wrap: break-word; }
.pairs { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; }
.pairs { margin: 0 0 1.5rem; font-size: .9375rem; }
.pairs dt { color: var(--soft); } .pairs dd { margin: 0; max-width: 90ch; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--soft); }
details[open] > summary { margin-bottom: .5rem; }
.quoted { white-space: pre-wrap; max-width: 90ch; }
.prompt { border-left: 3px solid var(--line); padding-left: 12px; margin: 1.5rem 0 .5rem; font-weight: 600; }
.answers { display: grid; grid-template-columns: fit-content(24ch) minmax(0, 1fr); gap: 6px 18px; font-size: .9375rem; }
.answers > span { color: var(--soft); }
.reference { color: var(--soft); }
.empty { color: var(--soft); font-size: .875rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .8125rem; }
@media (max-width: 600px) {
  main { padding: 18px 16px 40px; } h1 { font-size: 1.375rem; }
  .pairs, .answers { grid-template-columns: 1fr; gap: 0; } .pairs dd { margin-bottom: 10px; }
  .answers > div { margin-bottom: 10px; } .facts { grid-template-columns: 1fr 1fr; gap: 8px; }
  th, td { padding-right: 12px; } table.numbers td { white-space: normal; }
}
@media print { section { break-inside: avoid-page; } .hit { display: none; } }
"""
