"""Text that somebody else wrote, made safe to show: one function for each place to show it in."""

from __future__ import annotations

import html
import re

_WIDTH = 60
#: Characters that are not printable in Python's sense and harmless: line breaks, tabs, wide spaces.
_KEPT = frozenset("\n\t\xa0\u1680\u202f\u205f\u3000").union(map(chr, range(0x2000, 0x200B)))
#: What begins a block of Markdown at the start of a line.
_BLOCK = re.compile(r"^(?:(?=[-+=#])|\d+(?=[.)](?:\s|$)))")
_PUNCTUATION = re.compile(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def printable(text: str) -> str:
    """Return the text with every character that acts on a terminal or hides written as its escape.

    These are control characters, right-to-left overrides, zero-width characters and halves of
    surrogate pairs. Newlines, tabs and spaces of every width stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT else _code(c) for c in text)


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def one_line(text: str) -> str:
    """Return the text as `printable` does, on one line."""
    return " ".join(printable(text).split())


def shorten(text: str, width: int = _WIDTH) -> str:
    """Return the beginning of the text, on one line and with dots if something is left out."""
    return one_line(text if len(text) <= width else text[: width - 3] + "...")


def excerpt(text: str, lines: int, width: int = 1000) -> str:
    """Return the beginning of each of the first lines; says what is left out."""
    found = text.splitlines()
    shown = [line if len(line) <= width else line[:width] + " ..." for line in found[:lines]]
    if len(found) > lines:
        shown.append(f"... {len(found) - lines} more lines")
    return "\n".join(shown)


def brief(text: str) -> str:
    """Return the first and last line of the text, which may be a message with a traceback."""
    first, *more = text.strip().splitlines() or [""]
    return f"{first} ... {more[-1].strip()}" if more else first


def is_web_address(text: str) -> bool:
    """Return whether the text is an address of the web, safe to be the target of a link."""
    return text.isprintable() and re.fullmatch(r"https?://[^\s<>\\]+", text) is not None


def for_html(text: str) -> str:
    """Return the text as the content of an HTML element or quoted attribute."""
    return html.escape(printable(text))


def for_markdown(text: str) -> str:
    """Return the text as one line of Markdown that shows it literally, also in a cell of a table.

    Nothing in it becomes a link, an image, an HTML element or a mention.
    """
    escaped = _PUNCTUATION.sub(r"\\\g<0>", one_line(text))
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # GitHub turns bare addresses into links, and names after @ into mentions.
    escaped = escaped.replace("://", "&#58;//").replace("www.", "www&#46;")
    escaped = re.sub(r"@(?=\w)", "@<!-- -->", escaped)
    return _BLOCK.sub(r"\g<0>\\", escaped)
