"""The fenced blocks of README and of the pages in docs/, with what a test has to know of each.

A comment before a block says how it is tested: `<!-- test: gpu -->`. GitHub and the site hide it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
)
_BLOCK = re.compile(
    r"(?:^<!-- test: (?P<how>[^>]*) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Path from the root.
        kind: The language, such as `console`.
        how: Words of the comment before it.
    """

    page: str
    kind: str
    text: str
    how: tuple[str, ...]

    def __str__(self):
        return f"{self.page}-{'-'.join(self.how) or self.kind}".replace(" ", "-")

    @property
    def commands(self):
        """The commands of a console block, without their comments."""
        lines = re.findall(r"^\$ (.*(?:\\\n.*)*)", self.text, re.M)
        return [line.replace("\\\n", " ").partition("   #")[0].strip() for line in lines]


def blocks_of(page):
    text = (ROOT / page).read_text("utf-8")
    return [
        Block(page, m["kind"], m["text"], tuple(filter(None, (m["how"] or "").split(", "))))
        for m in _BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def example(how, page="docs/kernels.md"):
    """The text of the one Python block of a page with this mark."""
    [text] = [b.text for b in blocks_of(page) if b.kind == "python" and how in b.how]
    return text
