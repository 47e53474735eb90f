"""What records quote acts in no report, and lines that are no records are one error."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_moe_routing.cli import main
from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.oracle.record import Known, Reach, TestRecord, VerdictRecord
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report import files, records

EVIL = "\x1b[2J\u202e\ud800 ![i](http://evil.example/p.png) <img src=x> @team"
TEST = TestRecord(flashinfer="0.7.0", device="B200", case="test_x[a]", outcome="passed", message="")
VERDICT = VerdictRecord(
    model="m",
    scheme="nvfp4",
    target="vllm",
    release="0.32.0",
    flashinfer="0.7.0",
    judged_as="0.7.0",
    verdict=Verdict.ERROR,
    reach=Reach.PUBLISHED,
    router="r",
    reason="why",
    outcome="failed",
)
KNOWN = Known(EVIL, "https://a.example/x")


def changed(record, **changes):
    return type(record)(**{**vars(record), **changes})


class Document(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links |= {value for name, value in attributes if name in ("href", "src")}


@pytest.mark.parametrize("suffix", files.FORMATS)
def test_what_a_record_says_acts_nowhere(tmp_path, suffix):
    """Escape sequences, overrides, halves of surrogates, pictures, releases without end."""
    texts = dict.fromkeys(("model", "reason", "router", "method", "site"), EVIL)
    found = [
        changed(VERDICT, **texts, path=(EVIL,), known=KNOWN),
        changed(VERDICT, release="1" * 10_000),
        changed(TEST, case=EVIL, device=EVIL, outcome="failed", message=EVIL, known=KNOWN),
    ]
    (tmp_path / "one.jsonl").write_text(records.dump(found))
    out = tmp_path / f"out{suffix}"
    assert main(["report", str(out), str(tmp_path / "one.jsonl")]) == 0
    text = out.read_text("utf-8")
    assert not {"\x1b", "\u202e", "\ud800"} & set(text)
    if suffix == ".md":
        markdown_it = pytest.importorskip("markdown_it")
        text = markdown_it.MarkdownIt("commonmark").enable("table").render(text)
    if suffix in (".md", ".html"):
        page = Document(text)
        assert "img" not in page.tags
        assert {link for link in page.links if not link.startswith("#")} == {KNOWN.link}


LINE = {"format": records.FORMAT, **TEST.as_dict()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2, "kind": "test", "kind": "test"}', "kind: found the key twice"),
        ('{"format": NaN}', "found NaN, expected a number"),
        ('{"format": ' + "9" * 5000 + "}", "found a number of 5000 digits"),
        ('{"format": ' + "[" * 500 + "]" * 500 + "}", "not valid JSON: nested too deeply"),
        (json.dumps({**LINE, "format": "x" * 500}), "format: found 'xxxxxxxxx"),
        (json.dumps({**LINE, "kind": ["x" * 500]}), "kind: found ['xxxxxxxx"),
        (json.dumps({**LINE, "case": ["x" * 500]}), "case: found ['xxxxxx"),
        (
            json.dumps({**LINE, **VERDICT.as_dict(), "verdict": "fine"}),
            "verdict: found 'fine', expected one of exact, wrong, crash, ",
        ),
        ('"' + "x" * 2_000_001, "found 2000002 characters, expected at most 2000000"),
    ],
)
def test_a_line_that_means_to_harm(tmp_path, capsys, text, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text)
    assert main(["report", str(tmp_path / "out.md"), str(bad)]) == 2
    error = capsys.readouterr().err
    assert f"{bad}:1: {message}" in error
    assert error.count("\n") == 1
    assert len(error) < 300


def test_a_file_without_end(tmp_path, capsys):
    link = tmp_path / "zero.jsonl"
    link.symlink_to("/dev/zero")
    assert main(["report", str(tmp_path / "out.md"), str(link)]) == 2
    assert "found a device, expected a regular file" in capsys.readouterr().err


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_one_line_or_records(tmp_path, data):
    good = records.dump([VERDICT, TEST, changed(TEST, case="b", known=KNOWN)])
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 30)))
    piece = data.draw(st.text(max_size=6) | st.sampled_from(["null", "[]", "1e999", '"\\ud800"']))
    file = tmp_path / "x.jsonl"
    file.write_text(good[:start] + piece + good[end:], "utf-8", "surrogatepass")
    try:
        found = records.merge([file])
    except MoERoutingError as error:
        assert "\n" not in str(error)
        return
    for form in files.FORMATS.values():
        form(found).encode("utf-8")
