"""What a run tells GitHub Actions, and that reports hold every failure of a run."""

from __future__ import annotations

import json

import pytest
from verdict_records import verdict

from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.record import TestRecord
from pytest_moe_routing.report import github, records

SCALE = Finding(Kind.RECIPE, "scale", 2.5, 1.0)
AT = "vllm/model_executor/layers/fused_moe/layer.py:123"
RUN = ("--moe-golden", "--moe-models", "deepseek-r1", "--moe-schemes", "nvfp4")
BAD = (*RUN, "--moe-target", "miniatures:LosesScale")


def test_a_cause_is_an_annotation_at_the_frameworks_line():
    wrong = verdict("a", verdict="wrong", findings=(SCALE,), source=AT)
    records = [wrong, verdict("b", verdict="wrong", findings=(SCALE,), source=AT), verdict("c")]
    [command] = github.commands(records)
    start, _, message = command.partition("::error ")[2].partition("::")
    assert start == (
        "file=vllm/model_executor/layers/fused_moe/layer.py,line=123,"
        "title=a on nvfp4%2C decided by vllm 0.32.0%3A wrong"
    )
    assert "%0A  because  routed_scaling_factor: the router has 2.5, the kernel 1%0A" in message
    assert message.endswith("%0Aalso b nvfp4")
    assert "\n" not in command


def test_what_a_record_quotes_is_no_command():
    evil = TestRecord(
        "0.7.0", "", "t\n::set-output name=x::", "failed", "50% \r\n::error::x\x1b[2J"
    )
    [command] = github.commands([evil])
    assert "\n" not in command
    assert "\x1b" not in command
    assert "50%25 %0A::error::x" in command


def test_github_shows_ten_errors_so_the_worst_are_first():
    many = [verdict(f"m{n}", verdict="missed", rejected_by={f"gate {n}": "no"}) for n in range(20)]
    commands = list(github.commands([*many, verdict("z", verdict="wrong", findings=(SCALE,))]))
    assert len(commands) == 10
    assert "title=z on nvfp4" in commands[0]


@pytest.fixture
def actions(monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("before\n")
    return tmp_path / "summary.md"


def test_a_job_gets_annotations_and_a_summary(host, actions):
    result = host.runpytest_subprocess(*BAD)
    result.stdout.fnmatch_lines(["::error title=deepseek-r1 on nvfp4*wrong::*"])
    text = actions.read_text()
    assert text.startswith("before\n# MoE routing\n")
    assert "## 1 cause of failure" in text
    host.runpytest_subprocess("test_host.py")
    assert actions.read_text() == text


def test_a_summary_that_cannot_be_written_fails_the_run(host, actions):
    actions.unlink()
    actions.mkdir()
    result = host.runpytest_subprocess(*RUN)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["moe-routing: GITHUB_STEP_SUMMARY *: cannot be written: *"])


def test_reports_hold_the_failures_of_other_tests_too(host):
    """Of the host's own, of fixtures, and files that cannot be collected."""
    host.makepyfile(
        test_host="""
        import pytest
        @pytest.fixture
        def broken(): raise RuntimeError("no such thing")
        def test_fine(): pass
        def test_bad(): assert 1 == 2
        def test_with(broken): pass
        """
    )
    host.makepyfile(test_host_two="import nothing_such")
    host.makeini("[pytest]\npython_files = test_host*.py\n")
    reports = ("--moe-report", "r.json", "--moe-report", "r.html", "--moe-report", "r.md")
    paths = ("test_host.py", "test_host_two.py", "--continue-on-collection-errors")
    result = host.runpytest_subprocess(*BAD, *paths, *reports)
    assert result.ret == 1
    found = json.loads((host.path / "r.json").read_text())
    assert found["format"] == records.FORMAT
    assert [v["verdict"] for v in found["verdicts"]] == ["wrong"]
    failed = {test["case"]: test["message"] for test in found["tests"]}
    assert set(failed) == {"test_host.py::test_bad", "test_host.py::test_with", "test_host_two.py"}
    assert "no such thing" in failed["test_host.py::test_with"]
    for name in ("r.html", "r.md"):
        text = (host.path / name).read_text()
        assert "nothing_such" in text
        assert text.index("because  routed_scaling_factor") < text.index(
            "fp4_block_scale_moe for nvfp4" if name == "r.html" else "| scheme |"
        )
