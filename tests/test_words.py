"""The word table of the style guide, for everything that a person reads."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What is not written here, and what is written instead.
WORDS = {
    r"anew": "again",
    r"beside": "next to, with, or besides",
    r"(comes?|came) to be": "becomes, or is",
    r"heeds?": "honors",
    r"honest (kernel|implementation)s? (may|would)": "a correct kernel",
    r"in force": "that applies",
    r"lattices?": "config sweep",
    r"mend(s|ed)?": "fix",
    r"misread numbers?": "enum mismatch",
    r"neighbours?": "another process, or neighbor",
    r"refuse[sd]?,? (and )?rightly": "correctly rejects",
    r"rounded on (its|the) way": "downcast",
    r"(stands?|stood) in( for)?": "replaces",
    r"says? (it|them) no more": "no longer reports",
    r"troubles": "violations",
    # American spelling.
    r"(behavi|col|hon)our\w*": "-or",
    r"(initial|uninitial|recogn|normal|special|general)is(e|ed|es|ing)": "-ize",
    r"cent(re|red)": "center",
}
_PATTERN = re.compile(rf"\b({'|'.join(f'(?:{word})' for word in WORDS)})\b", re.IGNORECASE)
#: Quoted as others wrote it, or the table itself.
NOT_OURS = {"tests/test_words.py", "LICENSE"}
#: Of these, only what the package and its pages say.
KINDS = ("*.md", "*.py", "*.yaml", "*.yml", "*.toml", "tox.ini")
FILES = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", *KINDS],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
).stdout.split()
READ = [
    name
    for name in FILES
    if name not in NOT_OURS
    and not name.startswith(("tests/", "golden/", "docs/gpu-evidence/"))
    and (ROOT / name).exists()
]


def found(text):
    """Lines with a word of the table, and what to write instead."""
    for number, line in enumerate(text.splitlines(), 1):
        for match in _PATTERN.finditer(line):
            instead = next(w for p, w in WORDS.items() if re.fullmatch(p, match[0], re.IGNORECASE))
            yield f"{number}: {match[0]!r}: write {instead}"


def test_words():
    assert "README.md" in READ
    assert "pytest_moe_routing/plugin.py" in READ
    wrong = [f"{name}:{line}" for name in READ for line in found((ROOT / name).read_text("utf-8"))]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a fix\nthe kernel was Mended", "2: 'Mended': write fix"),
        ("it stands in for torch", "1: 'stands in for': write replaces"),
        ("initialised", "1: 'initialised': write -ize"),
    ],
)
def test_a_word_is_found(text, line):
    assert list(found(text)) == [line]


def test_other_words_are_left_alone():
    assert not list(found("besides, the sidebar recommends standing in line; four hours; raised"))
