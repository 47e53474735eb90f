"""How far long work has come: one line that is rewritten on a terminal, and nothing in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from pytest_moe_routing.escape import one_line

_T = TypeVar("_T")
_WIDTH = 79
#: Seconds between two lines: more often than a reader can follow costs time.
_PAUSE = 0.1


class Progress:
    """The line of one piece of work.

    Args:
        stream: Where the line is shown; nothing is written unless it is a terminal.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.is_shown = self.stream.isatty()
        self._last = 0.0

    def show(self, text: str) -> None:
        """Replace the line, unless it was replaced a moment ago."""
        if self.is_shown and time.monotonic() - self._last >= _PAUSE:
            self._last = time.monotonic()
            self._write(one_line(text)[:_WIDTH])

    def clear(self) -> None:
        """Remove the line, so that other output starts on an empty one."""
        if self.is_shown and self._last:
            self._write("")

    def _write(self, text: str) -> None:
        self.stream.write(f"\r{text}\x1b[K")
        self.stream.flush()


def each(items: Iterable[_T], what: str, stream: TextIO | None = None) -> Iterator[_T]:
    """Yield the items, and show on a terminal which of how many is being worked on."""
    work, progress = list(items), Progress(stream)
    try:
        for number, item in enumerate(work, 1):
            progress.show(f"{what} {number} of {len(work)}: {item}")
            yield item
    finally:
        progress.clear()
