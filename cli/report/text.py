"""Text of strangers as HTML: no markup, no control of what stands around it. Pure."""

from __future__ import annotations

import html
import unicodedata

TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
"""What turns the direction of words around, or is not seen at all; joiners stay, some scripts need them."""
HIDDEN = {"Cc", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories of Unicode: control, halves of characters, what is no character, ends of lines."""
KEPT = frozenset("\n\t")


def escaped(text: str) -> str:
    """Return text as HTML that shows it and no more, in elements and in quoted attributes; what is not seen by name."""
    return html.escape("".join(_seen(character) for character in text))


def shortened(text: str, most: int) -> str:
    """Return text of at most so many characters, and three points where it went on."""
    return text if len(text) <= most else text[: most - 3] + "..."


def _seen(character: str) -> str:
    if character in TURNING or (character not in KEPT and unicodedata.category(character) in HIDDEN):
        return ascii(character)[1:-1]
    return character
