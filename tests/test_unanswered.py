"""What a run could not ask is in every report, and shown by a quiet run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from pytest_moe_routing.oracle.record import TestRecord, UnansweredRecord
from pytest_moe_routing.report import html, markdown, records
from pytest_moe_routing.report.diff import changes
from pytest_moe_routing.report.files import write_report

WHAT, REASON = "model code: models are not judged", "Fused*: no ranks | here"


def unanswered(count=2, release="1.0", case="test_model_code.py::test_model_code"):
    return UnansweredRecord("vllm", release, "FlashInfer 0.7", case, WHAT, REASON, count)


def test_a_quiet_run_says_so_and_writes_it_into_its_reports(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    files = [("--moe-report", f"r{suffix}") for suffix in (".json", ".jsonl", ".md", ".html")]
    result = pytester.runpytest_subprocess(
        *("--moe-golden", "--moe-target", "miniatures:KnowsNoRanks", "--moe-models", "minimax-m2"),
        *("-k", "test_model_code", "-q", "-p", "no:cacheprovider", "--junitxml", "junit.xml"),
        *(word for option in files for word in option),
    )
    shown = "moe-routing: not judged: 2 questions within tests"
    result.stdout.fnmatch_lines([shown])
    rows = json.loads((pytester.path / "r.json").read_text())["unanswered"]
    what = "model code: models are not judged on ranks with other tokens"
    [row] = (row for row in rows if row["what"] == what)
    assert (row["count"], row["target"]) == (1, "miniatures:KnowsNoRanks")
    assert row["case"] == "test_model_code::test_model_code[minimax-m2]"
    assert row["reason"]
    kept = [r for r in records.load(pytester.path / "r.jsonl") if isinstance(r, UnansweredRecord)]
    assert [record.as_dict() for record in kept] == rows
    assert kept == [
        r for r in records.load_document(pytester.path / "r.json") if r.KIND == "unanswered"
    ]
    assert what in (pytester.path / "r.md").read_text()
    assert what in (pytester.path / "r.html").read_text()
    junit = (pytester.path / "junit.xml").read_text()
    told = "model code: 1 model is not judged on ranks with other tokens"
    assert f'<property name="moe_unanswered" value="{told}" />' in junit


def test_counts_of_one_reason_are_one_row_for_each_release():
    found = [unanswered(2), unanswered(3, case="another"), unanswered(4, release="2.0")]
    page = markdown.page(found)
    assert "Nothing was judged." in page
    rows = [line for line in page.splitlines() if WHAT in line]
    assert [line.rpartition("| ")[2] for line in rows] == ["5 |", "4 |"]
    assert all(line.count(" | ") == 3 for line in (row.replace("\\|", "") for row in rows))
    cells = re.findall(rf"<td>{WHAT}</td><td>[^<]*</td><td>(\d)</td>", html.page(found))
    assert cells == ["5", "4"]


def test_reports_of_several_runs_are_merged_and_compared(tmp_path):
    """Parallel jobs ask about models of their own, so counts of one test are added up."""
    runs = [unanswered(2)], [unanswered(3), unanswered(4, release="2.0")]
    for place, run in enumerate(runs):
        write_report(tmp_path / f"{place}.jsonl", run)
    merged = records.merge([tmp_path / "0.jsonl", tmp_path / "1.jsonl"])
    assert [(record.release, record.count) for record in merged] == [("1.0", 5), ("2.0", 4)]
    failed = TestRecord("FlashInfer", "", "test", "failed", "it fails")
    assert changes([unanswered(2), failed], [unanswered(3), failed]) == []


def test_a_named_runner_that_is_not_judged_is_counted(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    result = pytester.runpytest_subprocess(
        *("--moe-golden", "--moe-target", "miniatures:NamesNoRunner", "-k", "test_verdict"),
        *("--moe-models", "deepseek-r1", "--moe-schemes", "nvfp4", "-v", "-p", "no:cacheprovider"),
    )
    told = "runners that are named: 1 case is not judged"
    result.stdout.fnmatch_lines([told, "1 x no runner here"])
