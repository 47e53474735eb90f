"""Text of others, shown literally: on a terminal, in HTML and in Markdown."""

from __future__ import annotations

import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.escape import for_html, for_markdown, one_line, printable, shorten

HOSTILE = [
    "\x1b[2J\x1b[31mred",
    "\u202egnp.exe",
    "a\u2066b\u2069c\u200fd\u061ce",
    "\ud800 half of a pair",
    "C1 control \x9b31m and bell \x07",
    "line\rover",
    "![i](http://evil.example/p.png)",
    "[text](javascript:alert(1))",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "http://evil.example https://evil.example www.evil.example",
    "<http://evil.example>",
    "&lt;b&gt; &#x202e;",
    "a | b \\| c",
    "`code` ``more``",
    "*a* __b__ ~~c~~ _d_ fp8_block",
    "@someone and @team/name",
    "# title",
    "- item",
    "+ item",
    "1. item",
    "12) item",
    "> quote",
    "===",
    "    indented",
    "[a]: http://evil.example",
]
#: What acts on a terminal, or turns the direction of what follows.
ACTIVE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def is_harmless(text):
    return not any(unicodedata.category(c) in ACTIVE and c not in "\n\t" for c in text)


@given(st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(categories=None), max_size=40)))
def test_no_character_acts_on_a_terminal(text):
    shown = printable(text)
    assert is_harmless(shown)
    shown.encode("utf-8")
    assert "\n" not in one_line(text)
    assert printable(shown) == shown


def test_ordinary_text_stays_as_it_is():
    text = "Grüße, 空 \u3000\n\tfp8_block (Renormalize) 1.5"
    assert printable(text) == text
    assert printable("a\x1b[1m\u202e") == "a\\x1b[1m\\u202e"


def test_long_text_is_cut():
    assert shorten("x" * 5_000_000) == "x" * 57 + "..."
    assert shorten("a\nb") == "a b"


def test_errors_are_safe_to_show():
    assert str(ModelError("key \x1b[2J")) == "key \\x1b[2J"


class _Reader(HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, *attributes))

    def handle_data(self, data):
        self.text += data


@given(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=40)))
def test_html_shows_the_text(text):
    read = _Reader(f'<p title="{for_html(text)}">{for_html(text)}</p>')
    assert [tag for tag, *_ in read.tags] == ["p"]
    assert read.text == printable(text)


@pytest.mark.parametrize("frame", ["{}", "- {}", "## {}", "| a | b |\n|---|---|\n| {} | x |"])
@given(text=st.one_of(st.sampled_from(HOSTILE), st.text(max_size=40)))
def test_markdown_shows_the_text(frame, text):
    """An independent renderer makes one paragraph, item, heading or cell of it, with the text."""
    markdown_it = pytest.importorskip("markdown_it")
    renderer = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(
        ["table", "strikethrough"]
    )
    read = _Reader(renderer.render(frame.format(for_markdown(text))))
    frame_tags = {tag for tag, *_ in _Reader(renderer.render(frame.format("word"))).tags}
    assert {tag for tag, *_ in read.tags} <= frame_tags
    shown = read.text.replace("a", "", 1).replace("b", "", 1) if "|" in frame else read.text
    shown = shown.strip().removesuffix("x") if "|" in frame else shown
    assert "".join(shown.split()) == "".join(printable(text).split())


def test_markdown_has_no_bare_link_and_no_mention():
    """GitHub makes these of plain text, which CommonMark does not."""
    assert for_markdown("https://a.example") == "https&#58;//a.example"
    assert for_markdown("www.a.example") == "www&#46;a.example"
    assert for_markdown("@someone") == "@<!-- -->someone"
    for text in ("fp8_block", "0.22.1, FlashInfer 0.6.13: 2 exact"):
        assert for_markdown(text) == text
