"""Report files: what a run writes, what merges, and what each format shows."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from verdict_records import verdict

from pytest_moe_routing import __version__
from pytest_moe_routing.cli import main
from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_model
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.record import Known, Reach, TestRecord, VerdictRecord
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report import brief, files, groups, records
from pytest_moe_routing.report.terminal import plain, summary
from pytest_moe_routing.report.text import story
from pytest_moe_routing.targets import load_target

HOSTILE = "<script>alert(1)</script>|`` ``` ````"


@pytest.fixture(scope="module")
def verdicts():
    """Step-3.7-Flash as vLLM 0.22 and today's tree decide, for the kernels of one release."""
    model = load_model(packaged_directory() / "step-3.7-flash")
    found = []
    for name in ("miniatures:Vllm022", "builtin"):
        target = load_target(name, FlashInfer.of("0.6.12"))
        for scheme in ("fp8_block", "nvfp4"):
            found.append(replace(judge(target, model, scheme).record(), outcome="failed"))
    return found


def gpu_test(n=0, **changes):
    base = {
        "flashinfer": "FlashInfer 0.7.0",
        "device": "NVIDIA B200",
        "case": f"test_gpu_routing::test_model[plain-{n}]",
        "outcome": "passed",
        "message": "",
    }
    return TestRecord(**{**base, **changes})


def line(**changes):
    return json.dumps({"format": records.FORMAT, **gpu_test().as_dict(), **changes})


def write(path, found):
    path.write_text(records.dump(found))
    return path


class Document(HTMLParser):
    """Tags, targets of links, and text by tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], "", {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        self.open = tag

    def handle_data(self, data):
        self.text.setdefault(self.open, []).append(data)


# -- merging ------------------------------------------------------------------------------------


def test_runs_of_several_machines_merge(tmp_path, verdicts, capsys):
    """What both have is one; a message may name another place; every format says it all."""
    skipped = gpu_test(device="no NVIDIA driver", outcome="skipped", message="no NVIDIA driver")
    failed = {"outcome": "failed", "message": f"/one/place {HOSTILE}"}
    one = write(tmp_path / "one.jsonl", [*verdicts[:3], skipped, gpu_test(1, **failed)])
    other_place = gpu_test(1, **{**failed, "message": "/another/place"})
    two = write(tmp_path / "two.jsonl", [*verdicts[2:], gpu_test(), other_place])
    for suffix in files.FORMATS:
        out = tmp_path / f"all{suffix}"
        assert main(["report", str(out), str(one), str(two)]) == 0
        assert capsys.readouterr().out == f"report {out}\n"
    merged = records.load(tmp_path / "all.jsonl")
    assert len(merged) == 4 + 3
    assert records.dump(records.merge([two, one])).count("\n") == 7
    data = json.loads((tmp_path / "all.json").read_text())
    assert [v["verdict"] for v in data["verdicts"]] == ["missed", "missed", "wrong", "wrong"]
    assert sorted(t["outcome"] for t in data["tests"]) == ["failed", "passed", "skipped"]
    page = Document((tmp_path / "all.html").read_text())
    text = (tmp_path / "all.md").read_text()
    cells = " ".join(text for tag in ("th", "td", "a") for text in page.text[tag])
    for shown in (text, cells):
        assert "step-3.7-flash" in shown
        assert "1 failed, 1 passed" in shown
    for shown in (text, "".join(page.text["pre"])):
        assert "because  routed_scaling_factor: the router has 3, the kernel 1" in shown
        assert "wanted   0-7: 0.375" in shown
        assert HOSTILE in shown
    assert "| nvfp4 | missed (Unspecified) | wrong (MiniMax2) |" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "bad.jsonl:2: not valid JSON"),
        ("[]", "bad.jsonl:2: format: found None, expected 2"),
        ('{"format": 1}', "bad.jsonl:2: format: found 1, expected 2"),
        ('{"format": 2, "kind": "x"}', "kind: found 'x', expected verdict or test"),
        (line(device=3), "device: found 3, expected text"),
        (line(known={}), "known: found {}, expected a reason"),
        (None, "none.jsonl: cannot be read: No such file"),
    ],
)
def test_a_line_that_is_no_record(tmp_path, capsys, text, message):
    bad = write(tmp_path / "bad.jsonl", [gpu_test()])
    bad.write_text(bad.read_text() + str(text))
    given = bad if text else tmp_path / "none.jsonl"
    assert main(["report", str(tmp_path / "out.md"), str(given)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.md").exists()


def test_only_reports_are_merged_and_none_is_written_over(tmp_path, capsys, monkeypatch):
    before = write(tmp_path / "one.jsonl", [gpu_test()]).read_text()
    (tmp_path / "link.jsonl").symlink_to("one.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (("one.jsonl", "one.jsonl"), "one.jsonl: found as the report to write and as one to merge"),
        (("link.jsonl", "one.jsonl"), "one.jsonl: found as the report to write and"),
        (("out.md", "one.json"), "one.json: found '.json', expected a .jsonl report"),
        (("out.md", "loop.jsonl"), "loop.jsonl: cannot be read: Too many levels"),
    ):
        assert main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert Path("one.jsonl").read_text() == before


def test_a_report_that_is_given_twice(tmp_path, capsys, monkeypatch):
    """By another name as well: what a machine found would count as found by two."""
    write(tmp_path / "one.jsonl", [gpu_test()])
    (tmp_path / "link.jsonl").symlink_to("one.jsonl")
    monkeypatch.chdir(tmp_path)
    for again in ("one.jsonl", "./one.jsonl", str(tmp_path / "one.jsonl"), "link.jsonl"):
        assert main(["report", "out.md", "one.jsonl", again]) == 2
        shown = capsys.readouterr()
        assert shown.err == f"moe-routing: {Path(again)}: the file was given twice\n"
        assert not shown.out
    assert not Path("out.md").exists()


def test_runs_that_disagree(tmp_path, verdicts, capsys):
    """Nothing is chosen silently: both files are named, and what differs."""
    one = write(tmp_path / "one.jsonl", verdicts)
    two = write(tmp_path / "two.jsonl", [replace(verdicts[0], verdict=Verdict.EXACT)])
    out = tmp_path / "out.html"
    out.write_text("before")
    assert main(["report", str(out), str(one), str(two)]) == 2
    error = capsys.readouterr().err
    assert f"{one} and {two} disagree on vllm-0.22-classifier" in error
    assert "step-3.7-flash fp8_block: verdict: 'wrong' or 'exact'" in error
    assert out.read_text() == "before"


# -- formats ------------------------------------------------------------------------------------


def hostile(record, **changes):
    finding = Finding(Kind.LIMIT, "top_k", fact=HOSTILE)
    return replace(record, model=HOSTILE, findings=(finding,), **changes)


def test_the_html_needs_nothing_and_lets_nothing_in(verdicts):
    """What a record says is text; a link leads to the web or is none."""
    known = Known(HOSTILE, "javascript:alert(1)")
    good = Known("known", 'https://example.com/?a=1&b="2"')
    records = [hostile(verdicts[0], known=known), replace(verdicts[1], known=good), gpu_test()]
    text = files.html.page(records)
    document = Document(text)
    assert not {"link", "img", "iframe"} & set(document.tags)
    # The one script is ours, and the browser runs no other.
    assert document.tags.count("script") == 1
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert ("meta", "content", policy) in document.attributes
    assert not any(name in ("src", "onclick", "style") for _, name, _ in document.attributes)
    links = {value for _, name, value in document.attributes if name == "href"}
    assert {link for link in links if not link.startswith("#")} == {good.link}
    anchors = [f"#{value}" for _, name, value in document.attributes if name == "id"]
    assert len(anchors) == len(set(anchors))
    assert {link for link in links if link.startswith("#")} <= set(anchors)


def test_the_page_begins_with_what_fails(verdicts):
    """Each cause once, with its other cases; then the matrix, then every model."""
    passed = replace(verdicts[0], model="m", verdict=Verdict.EXACT, outcome="passed")
    text = files.html.page([*verdicts[:2], passed, gpu_test(outcome="failed", message="assert 0")])
    parts = [
        '<h2 id="failures">Failures: 2</h2>',
        "step-3.7-flash on fp8_block, decided by",
        "  also     step-3.7-flash nvfp4",
        f"  cause    {verdicts[0].cause}",
        "test_gpu_routing::test_model[plain-0]",
        "assert 0",
        '<h2 id="matrix">',
        '<h2 id="models">',
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_a_verdict_has_its_cause_in_every_report(verdicts):
    """As in the terminal: it is what a ledger names. A test's message has it already."""
    told = "  because  x\n  cause    router:weights:f"
    test = gpu_test(outcome="failed", message=told, causes=("router:weights:f",))
    for form in (files.markdown, files.html):
        page = form.page([*verdicts[:2], test])
        assert page.count(f"  cause    {verdicts[0].cause}") == 1
        assert page.count("  cause    router:weights:f") == 1


def test_a_verdict_that_only_a_switch_leads_to_comes_after_the_others():
    wrong = verdict("m1", verdict=Verdict.WRONG, reach=Reach.OPT_IN, site="a")
    crash = verdict("m2", verdict=Verdict.CRASH, site="b")
    records = [wrong, crash, gpu_test(outcome="failed", message="assert 0")]
    assert [group.title.split()[0] for group in groups.failed(records)][:2] == ["m2", "m1"]


def test_a_cause_is_shown_with_the_case_that_most_people_can_meet():
    rare = verdict("a", verdict=Verdict.WRONG, reach=Reach.PRODUCIBLE, by_default=True)
    common = verdict("b", verdict=Verdict.WRONG, by_default=True)
    [group] = groups.failed([rare, common])
    assert (group.title.split()[0], group.others) == ("b", ["a nvfp4"])


def test_a_test_that_states_causes_says_what_is_wrong_in_its_title():
    """In Markdown, an explanation is folded: its title is all that a reader of a comment sees."""
    message = "grouped_topk (cuda): weights differ\n  because  the factor is missing"
    failed = gpu_test(case="test_router[A]", outcome="failed", message=message)
    told = replace(failed, causes=("router:weights:grouped_topk",))
    title = "test_router[A]: grouped_topk (cuda): weights differ"
    assert f"<summary>{title}</summary>" in files.markdown.page([told])
    assert "<summary>test_router[A]</summary>" in files.markdown.page([failed])


CALLED = {"source": "vllm/f.py:7", "received": "DeepSeekV3(n_group=8, topk_group=0)"}


@pytest.mark.parametrize(
    ("changes", "at"),
    [
        (CALLED, ["  at       vllm/f.py:7 with DeepSeekV3(n_group=8, topk_group=0)"]),
        (
            {**CALLED, "verdict": Verdict.CRASH},
            ["  at       vllm/f.py:7 with DeepSeekV3(n_group=8, topk_group=0)"],
        ),
        ({**CALLED, "source": ""}, []),
        ({**CALLED, "received": ""}, []),
        ({**CALLED, "verdict": Verdict.MISSED}, []),
    ],
)
def test_a_verdict_about_a_call_names_its_line_and_arguments(changes, at):
    record = verdict(**{"verdict": Verdict.WRONG, **changes})
    assert [line for line in story(record) if line.startswith("  at ")] == at
    # A terminal has it on the line of the method, or on that of the switch that leads to it.
    shown = [line for line in brief.story(record) if "vllm/f.py:7" in line]
    path = "  decided  scoring_func is softmax -> not renormalize -> Default"
    assert shown == [line.replace("  at       ", f"{path}, called at ") for line in at]
    opt_in = replace(record, reach=Reach.OPT_IN)
    shown = [line for line in brief.story(opt_in) if "vllm/f.py:7" in line]
    path = "  reach    only with an opt-in switch"
    assert shown == [line.replace("  at       ", f"{path}, called at ") for line in at]


def test_the_router_does_not_matter_where_a_call_fails_for_another_reason():
    def shown(*findings):
        lines = brief.story(verdict(verdict=Verdict.CRASH, findings=findings))
        return any(line.startswith("  router  ") for line in lines)

    raised = Finding(Kind.RAISED, "AssertionError", None, "no such size", "vllm/f.py:7")
    assert not shown(raised)
    assert not shown(Finding(Kind.LIMIT, "activation", fact="no kernel for relu2"))
    limit = Finding(Kind.LIMIT, "group_size", "at most 32", 64)
    assert shown(limit)
    assert shown(raised, limit)


def test_markdown_fits_a_comment_and_says_what_does_not(verdicts):
    many = [replace(verdicts[0], model=f"model-{n}", site=f"site-{n}") for n in range(200)]
    text = files.markdown.page(many)
    assert len(text) < 65_536
    assert "## 200 causes of failure" in text
    assert re.search(r"\n\d+ more parts do not fit here; `--moe-report FILE.html` has them", text)
    assert text.count("<details>") == text.count("</details>")
    assert "do not fit" not in files.markdown.page(many[:3])


def test_markdown_cannot_be_broken_out_of(verdicts):
    text = files.markdown.page([hostile(verdicts[0])])
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    fences = [
        n for n, line in enumerate(lines) if line.strip("`") in ("", "text") and "```" in line
    ]
    inside = lines[fences[0] + 1 : fences[1]]
    assert f"  because  {HOSTILE}" in inside
    assert "<script>" not in "".join(lines[: fences[0]])


def test_markdown_lists_known_failures(verdicts):
    """Each entry of a ledger that silenced failures is there, with some of their cases."""
    one, other = Known("rejected *on purpose*", "https://example.com/1"), Known("no link", "")
    many = [replace(verdicts[2], model=f"m{n}", outcome="xfailed", known=one) for n in range(7)]
    text = files.markdown.page([*many, replace(verdicts[0], outcome="xfailed", known=other)])
    listed = text.partition("## 8 known failures\n\n")[2].partition("\n\n")[0].splitlines()
    assert listed == [
        "- rejected \\*on purpose\\* (<https://example.com/1>): m0 fp8_block, m1 fp8_block, "
        "m2 fp8_block, m3 fp8_block, m4 fp8_block and 2 more",
        "- no link: step-3.7-flash fp8_block",
    ]
    assert text.index("known failures") < text.index("<details>")
    assert "known failure" not in files.markdown.page(verdicts)


def test_a_run_with_nothing_to_report_is_told_from_no_run(tmp_path, capsys, verdicts):
    """A file without lines is what a job leaves that was cut off before its run."""
    nothing, empty = write(tmp_path / "nothing.jsonl", []), tmp_path / "empty.jsonl"
    some, out = write(tmp_path / "some.jsonl", verdicts), tmp_path / "out.jsonl"
    assert main(["report", str(out), str(nothing), str(some)]) == 0
    assert records.load(out) == records.load(some)
    assert records.load(nothing) == []
    for text in ("", "\n \n"):
        empty.write_text(text)
        assert main(["report", str(tmp_path / "x.md"), str(some), str(empty)]) == 2
        error = capsys.readouterr().err
        assert error == f"moe-routing: {empty}: found no line, expected the report of a run\n"


def test_no_record_is_said(tmp_path):
    for suffix in (".html", ".md"):
        files.write_report(tmp_path / f"none{suffix}", [])
        assert "Nothing was judged." in (tmp_path / f"none{suffix}").read_text()


def test_several_deciders_are_told_apart(verdicts):
    """One row where they differ, and the totals of each: as short as that."""
    lines = list(map(plain, summary(verdicts, width=150)))
    assert [line.split()[0] for line in lines] == ["model", *["step-3.7-flash"] * 2, "2", "2"]
    cells = re.split(r"  +", lines[1])
    assert cells == ["step-3.7-flash", "fp8_block", "missed (Unspecified)", "wrong (MiniMax2)"]
    assert lines[-1] == f"2 wrong; vllm-0.22-classifier {__version__}, FlashInfer 0.6.12"


def test_a_file_is_there_in_full_or_as_before(tmp_path, monkeypatch, verdicts):
    out = tmp_path / "folder" / "out.md"
    files.write_report(out, verdicts)
    before = out.read_text()

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MoERoutingError, match=r"out.md: cannot be written: No space left"):
        files.write_report(out, [])
    assert {p.name: p.read_text() for p in out.parent.iterdir()} == {"out.md": before}


# -- in a run -----------------------------------------------------------------------------------


@pytest.fixture
def host(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    return pytester


RUN = (
    *("-p", "no:cacheprovider", "--moe-golden", "--moe-models", "step-3.7-flash,minimax-m2"),
    *("--moe-flashinfer", "0.6.12", "-k", "test_verdict or test_expert_parallel_shard"),
)


def test_a_run_writes_what_its_workers_found(host):
    """The same file with and without workers; GPU tests with the reason why they did not run."""
    host.makeini("[pytest]\nmoe_report = a.jsonl b/c.html\n")
    args = (*RUN, "--moe-target", "miniatures:Vllm022")
    result = host.runpytest_subprocess(*args, "-n", "2")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["moe-routing: report */a.jsonl", "moe-routing: report */b/c.html"])
    parallel = (host.path / "a.jsonl").read_text()
    host.runpytest_subprocess(*args, "-p", "no:xdist", "--moe-report", "s.jsonl")
    assert (host.path / "s.jsonl").read_text() == parallel
    found = records.load(host.path / "a.jsonl")
    judged = [r for r in found if isinstance(r, VerdictRecord)]
    tests = [r for r in found if isinstance(r, TestRecord)]
    outcomes = {(v.model, v.scheme): v.outcome for v in judged}
    assert outcomes["step-3.7-flash", "nvfp4"] == "failed"
    assert set(outcomes.values()) > {"failed"}
    assert tests
    for test in tests:
        assert "::test_expert_parallel_shard[" in test.case
        assert test.outcome == "skipped"
        assert test.message.startswith("Skipped: no NVIDIA driver")
    assert any(record.counterexample for record in judged)


def test_what_has_no_verdict_is_in_the_report_too(host):
    """A target that does not answer is `not judged`, with the reason."""
    args = (*RUN, "--moe-report", "r.jsonl", "--moe-target")
    host.runpytest_subprocess(*args, "miniatures:OnlyClassifies")
    found = [r for r in records.load(host.path / "r.jsonl") if isinstance(r, VerdictRecord)]
    assert {r.verdict for r in found} == {"not judged"}
    assert found[0].reason == "the crystal ball is cloudy"


@pytest.mark.parametrize("target", ["miniatures:FailsToStart", "nosuch:X", "os:system", ":"])
@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["serial", "n2"])
def test_a_target_that_cannot_be_asked_ends_the_run_with_one_message(host, target, workers):
    result = host.runpytest_subprocess(*RUN, "--moe-target", target, *workers)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert len(result.errlines) <= 3
    assert result.errlines[0].startswith("ERROR: ")
    assert target in result.errlines[0]


def test_a_report_that_cannot_be_written_fails_the_run(host):
    """A wrong suffix at once; a folder that is none at the end; nothing after an interruption."""
    result = host.runpytest_subprocess(*RUN, "--moe-report", "r.txt")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            "ERROR: report r.txt: found '.txt', expected a name that ends in .html, .md, .json or .jsonl"
        ]
    )
    (host.path / "file").touch()
    passing = ("-p", "no:cacheprovider", "--moe-models", "minimax-m2")
    host.makepyfile("def test_own(moe_model): pass")
    result = host.runpytest_subprocess(*passing, "--moe-report", "file/r.md")
    result.assert_outcomes(passed=1)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["moe-routing: report */file/r.md: cannot be written: *"])
    interrupt = "def pytest_runtest_call(item): raise KeyboardInterrupt\n"
    # The second Ctrl-C comes while pytest handles the first one.
    again = interrupt + "def pytest_keyboard_interrupt(excinfo): raise KeyboardInterrupt"
    failure = "def pytest_runtest_call(item): assert 0"
    for conftest, args in [(interrupt, ()), (again, ()), (failure, ("-x",))]:
        host.makeconftest(conftest)
        result = host.runpytest_subprocess(*passing, "--moe-report", "r.md", *args)
        assert not (host.path / "r.md").exists()
        if conftest != again:
            result.stdout.fnmatch_lines(
                ["moe-routing: report */r.md: not written, because the run stopped early"]
            )
        assert not (host.path / "r.md").exists()
