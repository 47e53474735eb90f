"""`moe-routing diff`: what is new in the second of two reports or releases."""

from __future__ import annotations

import json

import pytest
from test_history import wheel
from verdict_records import verdict

from pytest_moe_routing.cli import main
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.record import TestRecord
from pytest_moe_routing.report import files

SCALE = Finding(Kind.RECIPE, "scale", 2.5, 1.0)
BIAS = Finding(Kind.RECIPE, "bias", True, False)
WRONG = verdict("a", verdict="wrong", findings=(SCALE,))
FAILED = TestRecord("0.7.0", "B200", "test_x[a]", "failed", "why")


@pytest.fixture
def diff(tmp_path, capsys):
    """Compare two lists of records, the first as JSON lines and the second as JSON."""

    def compare(before, after, *args):
        sides = [tmp_path / "a.jsonl", tmp_path / "b.json"]
        for path, records in zip(sides, (before, after), strict=True):
            files.write_report(path, records)
        status = main(["diff", *map(str, sides), *args])
        return status, capsys.readouterr().out.splitlines()

    return compare


@pytest.mark.parametrize(
    ("before", "after", "status", "lines"),
    [
        ([verdict("a")], [verdict("a", release="0.33.0")], 0, ["nothing differs"]),
        ([verdict("a")], [WRONG], 1, ["new failures: 1", "  a nvfp4: exact -> wrong (wrong:recipe-scale)"]),
        ([], [WRONG], 1, ["new failures: 1", "  a nvfp4: absent -> wrong (wrong:recipe-scale)"]),
        ([WRONG], [WRONG], 0, ["nothing differs"]),
        (
            [WRONG],
            [verdict("a", verdict="wrong", findings=(SCALE, BIAS))],
            1,
            ["new failures: 1", "  a nvfp4: wrong (wrong:recipe-scale) -> wrong (wrong:recipe-scale+recipe-bias)"],
        ),
        ([verdict("a", verdict="fallback")], [verdict("a", verdict="crash")], 1, ["new failures: 1", "  a nvfp4: fallback -> crash (crash)"]),
        ([WRONG], [verdict("a")], 0, ["other changes: 1", "  a nvfp4: wrong (wrong:recipe-scale) -> exact"]),
        ([verdict("a")], [verdict("a", verdict="missed")], 0, ["other changes: 1", "  a nvfp4: exact -> missed (missed)"]),
        ([verdict("a")], [verdict("a", verdict="missed", lost_since="1.0")], 1, ["new failures: 1", "  a nvfp4: exact -> missed (lost)"]),
        ([verdict("a")], [], 1, ["no longer judged: 1", "  a nvfp4: exact -> absent"]),
        ([verdict("a")], [verdict("a", verdict="not judged")], 1, ["no longer judged: 1", "  a nvfp4: exact -> not judged"]),
        ([], [FAILED], 1, ["new failures: 1", "  test_x[a]: absent -> failed"]),
        ([FAILED], [], 0, ["other changes: 1", "  test_x[a]: failed -> absent"]),
    ],
)  # fmt: skip
def test_a_new_failure_is_exit_code_1(diff, before, after, status, lines):
    assert diff(before, after) == (status, lines)


def test_new_failures_come_first_and_json_says_the_same(diff):
    before = [verdict("a"), verdict("b", verdict="missed"), verdict("c")]
    after = [WRONG, verdict("b")]
    status, lines = diff(before, after)
    assert (status, lines[0]) == (1, "new failures: 1")
    assert [line for line in lines if ":" in line and "->" not in line] == [
        "new failures: 1",
        "no longer judged: 1",
        "other changes: 1",
    ]
    status, lines = diff(before, after, "--json")
    found = json.loads("\n".join(lines))["changes"]
    assert (status, [change["kind"] for change in found]) == (
        1,
        [line.split(":")[0] for line in ["new failures", "no longer judged", "other changes"]],
    )
    assert found[0]["after"] == "wrong (wrong:recipe-scale)"


def test_nothing_to_compare_is_misuse(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    files.write_report(path, [])
    assert main(["diff", str(path), str(path)]) == 2
    told = "found no case on either side, expected verdicts or tests to compare"
    assert told in capsys.readouterr().err


def test_a_change_is_one_line_whatever_its_names(diff):
    status, lines = diff([], [verdict("a\n  b: exact -> wrong")])
    assert (status, lines) == (
        0,
        ["other changes: 1", "  a b: exact -> wrong nvfp4: absent -> exact"],
    )


def test_a_report_of_several_releases_is_no_side(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    files.write_report(path, [verdict(), verdict(release="0.33.0")])
    assert main(["diff", str(path), str(path)]) == 2
    assert "verdicts of several releases, expected one: vllm 0.32.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"format": 2, "verdicts": 3}', '{"format": 2, "verdicts": [3]}']
)
def test_json_that_is_no_report_is_one_line(tmp_path, capsys, text):
    (tmp_path / "a.json").write_text(text)
    assert main(["diff", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 2
    error = capsys.readouterr().err
    assert "a.json: " in error
    assert error.count("\n") == 1


def test_two_releases_are_judged_and_compared(tmp_path, monkeypatch, capsys):
    info = tmp_path / "site" / "faketarget-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: faketarget\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moe_routing.targets]\nfake = test_history:Fake\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    old, new = (f"fake@{wheel(tmp_path, release)}" for release in ("0.22.1", "0.23.0"))
    args = ("--models", "step-3.7-flash", "--schemes", "nvfp4")
    assert main(["diff", new, old, *args]) == 1
    assert "  step-3.7-flash nvfp4: missed " in capsys.readouterr().out
    assert main(["diff", old, new, *args]) == 0
    assert main(["diff", old, str(tmp_path / "nowhere.whl"), *args]) == 2
