"""The ledger of known failures: what it may say, and what a run makes of it."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_moe_routing.errors import ModelError, MoERoutingError, Unsupported
from pytest_moe_routing.ledger import in_force, load_ledger
from pytest_moe_routing.report import records

LINK = "https://example.com/1"
ENTRY = {"case": "'*'", "target": "builtin", "reason": "because", "link": LINK}


def ledger(path, *entries):
    """A ledger with an entry on each line from the second on."""
    lines = ["- {" + ", ".join(f"{k}: {v}" for k, v in entry.items()) + "}\n" for entry in entries]
    path.write_text("# Failures that are known.\n" + "".join(lines))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None}, "target: found nothing: the key is missing, expected text"),
        ({"link": None}, "link: found nothing: the key is missing"),
        ({"link": "JIRA-17"}, "link: found 'JIRA-17', expected https://..., where"),
        ({"reason": "''"}, "reason: found nothing, expected text"),
        ({"target": "vlm"}, "target: found 'vlm', expected one of builtin, "),
        ({"since": "0.30"}, "since: found '0.30', expected text or null (YAML reads '0.30' as a number; write it in quotes)"),
        ({"until": "later"}, "until: found 'later', expected a release such as 0.30.0"),
        ({"since": "0.30.0", "until": "0.30.0"}, "until: found '0.30.0', expected a release after"),
        ({"flashinfer_since": "1.0.0", "flashinfer_until": "0.9.0"}, "flashinfer_until: found '0.9.0'"),
        ({"verdict": "exact"}, "verdict: found 'exact', expected one of wrong, crash, missed"),
        ({"cases": "x"}, "cases: found an unknown key, expected did you mean case?"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_names_file_line_and_key(tmp_path, change, message):
    wrong = {k: v for k, v in {**ENTRY, **change}.items() if v is not None}
    file = ledger(tmp_path / "known.yaml", ENTRY, wrong)
    with pytest.raises(ModelError) as caught:
        load_ledger(file)
    assert str(caught.value).startswith(f"{file}:3: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case: x", ":1: the file: found a mapping, expected a list of entries"),
        ("- x", ":1: the file: found 'x', expected a mapping of keys to values"),
        ("- {", ":1: not valid YAML"),
        ("- {case: *-nvfp4}", ":1: not valid YAML: found undefined alias '-nvfp4'; text that starts with * wants quotes"),
        (None, ": cannot be read: No such file or directory"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_ledger(tmp_path, text, message):
    file = tmp_path / "known.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ModelError, match=f"known.yaml{re.escape(message)}"):
        load_ledger(file)


def test_an_empty_ledger_is_one(tmp_path):
    assert load_ledger(ledger(tmp_path / "known.yaml")) == []


@pytest.mark.parametrize(
    ("keys", "target", "release", "flashinfer", "is_in_force"),
    [
        ({}, "builtin", None, "0.7.0", True),
        ({}, "vllm", None, "0.7.0", False),
        ({"target": "vllm"}, "vllm@/somewhere", None, "0.7.0", True),
        ({"target": "a.b:C"}, "a.b:C", None, "0.7.0", True),
        ({"since": "0.30.0"}, "builtin", "0.29.9", "0.7.0", False),
        ({"since": "0.30.0"}, "builtin", "0.30.0rc1", "0.7.0", False),
        ({"since": "0.30.0"}, "builtin", "0.30.0+cpu", "0.7.0", True),
        ({"until": "0.34.0"}, "builtin", "0.33.9", "0.7.0", True),
        ({"until": "0.34.0"}, "builtin", "0.34.0", "0.7.0", False),
        ({"since": "0.9.0", "until": "0.34.0"}, "builtin", "0.10.0", "0.7.0", True),
        ({"flashinfer_since": "0.6.13"}, "builtin", None, "0.6.12", False),
        ({"flashinfer_until": "0.6.13"}, "builtin", None, "0.6.11.post2", True),
        # A release is not asked of a target that the entry is not about, nor for other kernels.
        ({"since": "0.30.0"}, "vllm", None, "0.7.0", False),
        ({"since": "0.30.0", "flashinfer_since": "1.0.0"}, "builtin", None, "0.7.0", False),
    ],
)  # fmt: skip
def test_entries_in_force(tmp_path, keys, target, release, flashinfer, is_in_force):
    def version():
        assert release is not None, "must not be asked"
        return release

    entries = load_ledger(ledger(tmp_path / "known.yaml", {**ENTRY, **keys}))
    found = in_force(entries, target=target, release=version, flashinfer=flashinfer)
    assert found == (entries if is_in_force else [])


def test_a_target_that_does_not_say_its_release(tmp_path):
    entries = load_ledger(ledger(tmp_path / "known.yaml", {**ENTRY, "since": "0.30.0"}))

    def silent():
        raise Unsupported("builtin does not say its version")

    for release, message in [(silent, "does not say its version"), (lambda: "main", "'main'")]:
        with pytest.raises(MoERoutingError, match=rf"known.yaml:2: .*{message}"):
            in_force(entries, target="builtin", release=release, flashinfer="0.7.0")


def test_which_case_an_entry_is_about(tmp_path):
    (entry,) = load_ledger(ledger(tmp_path / "l", {**ENTRY, "case": "llama-4-*-nvfp4"}))
    assert entry.matches("test_verdict", "llama-4-scout-nvfp4")
    assert not entry.matches("test_verdict", "llama-4-scout-fp8_block")
    assert not entry.matches("test_scheme", "llama-4-scout-nvfp4")
    assert replace(entry, case="*", test="test_method_numbers").matches("test_method_numbers", "")


# -- in a run -----------------------------------------------------------------------------------

OLD = {"target": "miniatures:Vllm022", "reason": "PR 1 was not yet there", "link": LINK}
RUN = (
    *("-p", "no:cacheprovider", "--moe-golden", "-m", "not gpu"),
    *("--moe-target", "miniatures:Vllm022", "--moe-flashinfer", "0.6.12", "-rxf"),
)
TWO = ("--moe-models", "step-3.7-flash,minimax-m2")


@pytest.fixture
def host(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    return pytester


@pytest.mark.parametrize("workers", [("-n", "2"), ("-p", "no:xdist")], ids=["n2", "serial"])
def test_known_failures_are_expected_and_others_are_not(host, workers):
    """fp8_block fails as known, nvfp4 in another way than known; what passes is known no more."""
    ledger(
        host.path / "known.yaml",
        {**OLD, "case": "step-3.7-flash-fp8_block", "verdict": "wrong", "until": "99.0.0"},
        {**OLD, "case": "step-3.7-flash-nvfp4", "verdict": "missed"},
        {**OLD, "case": "minimax-m2-*"},
        {**OLD, "case": "minimax-m3-*"},
        {**OLD, "case": "'*'", "since": "99.0.0"},
        {**OLD, "case": "'*'", "target": "vllm"},
    )
    args = ("--moe-known-failures=known.yaml", "--moe-report=r.jsonl", *workers)
    result = host.runpytest_subprocess(*RUN, *TWO, *args)
    # The config sweep is wrong on either scheme, in ways that nobody knows. Model code, recorded calls
    # and modular experts, which this target does not have, are not asked.
    result.assert_outcomes(passed=1, xfailed=1, failed=5, skipped=14)
    text = result.stdout.str()
    # Once for each test; a CI's summary quotes them in full, behind the tests' names.
    assert text.count("\nknown failure is gone: remove or narrow the entry known.yaml:4") == 2
    result.stdout.fnmatch_lines_random(
        [
            f"XFAIL *::test_verdict[[]step-3.7-flash-fp8_block] - PR 1 was not yet there ({LINK})",
            "FAILED *::test_verdict[[]step-3.7-flash-nvfp4]*",
            "another failure than the known: known.yaml:3 knows missed",
            "step-3.7-flash  wrong (MiniMax2), known  wrong (MiniMax2)",
            "2 exact, 2 wrong (1 known); vllm-0.22-classifier *",
        ]
    )
    unmatched = re.findall(r"^  (known.yaml:\d+): (\S+):", text, re.M)
    assert unmatched == [("known.yaml:5", "test_verdict[minimax-m3-*]")]
    assert "match no case (not all of the suite was chosen):" in text
    found = [r for r in records.load(host.path / "r.jsonl") if r["kind"] == "verdict"]
    reported = {(r["model"], r["scheme"]): r for r in found}
    known = reported["step-3.7-flash", "fp8_block"]
    assert known["known"] == {"reason": OLD["reason"], "link": LINK}
    assert known["outcome"] == "xfailed"
    assert "known" not in reported["step-3.7-flash", "nvfp4"]
    gone = reported["minimax-m2", "nvfp4"]
    assert (gone["verdict"], gone["outcome"]) == ("exact", "failed")
    assert "known failure is gone" in gone["notes"][-1]


@pytest.mark.parametrize("workers", [("-n", "2"), ("-p", "no:xdist")], ids=["n2", "serial"])
def test_an_entry_without_a_case_fails_a_run_of_the_whole_suite(host, workers):
    stale = {**OLD, "case": "nothing-*"}
    ledger(host.path / "known.yaml", stale, {**OLD, "case": "'*'", "test": "test_method_numbers"})
    host.makeini("[pytest]\nmoe_known_failures = known.yaml\n")
    # What -m leaves out is collected nonetheless, and matches.
    result = host.runpytest_subprocess(*RUN, "-m", "gpu and not gpu", *workers)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["moe-routing: known failures that match no case (remove them):", "  */known.yaml:2: *"]
    )
    assert "known.yaml:3" not in result.stdout.str()
    if workers == ("-p", "no:xdist"):
        chosen = host.runpytest_subprocess(*RUN, "-k", "test_method_numbers", *workers)
        chosen.assert_outcomes(failed=1, deselected=chosen.parseoutcomes()["deselected"])
        assert "known failure is gone" in chosen.stdout.str()
        assert "(not all of the suite was chosen)" in chosen.stdout.str()


def test_what_is_not_the_case_itself_stays_an_error(host):
    """The host's own tests count, a broken fixture is no known failure, a skip stays a skip."""
    host.makepyfile(
        test_host="""
        import pytest

        @pytest.fixture
        def broken(moe_model): raise RuntimeError("not known")

        def test_own(moe_model): assert moe_model.id != "minimax-m2"

        def test_broken(moe_model, broken): pass

        def test_skipped(moe_model): pytest.skip("cannot tell")
        """
    )
    entry = {**ENTRY, "case": "minimax-m2"}
    ledger(host.path / "k", *({**entry, "test": f"test_{t}"} for t in ("own", "broken", "skipped")))
    args = ("--moe-models", "minimax-m2", "--moe-known-failures", "k", "test_host.py", "-rxs")
    result = host.runpytest_subprocess(*args)
    result.assert_outcomes(xfailed=1, errors=1, skipped=1)
    result.stdout.fnmatch_lines([f"XFAIL *::test_own[[]minimax-m2] - because ({LINK})"])
    host.runpytest_subprocess(*args, "--runxfail").assert_outcomes(failed=1, errors=1, skipped=1)


def test_a_mistake_is_misuse(host):
    ledger(host.path / "known.yaml", {**ENTRY, "target": "vlm"})
    for workers in (("-n", "2"), ()):
        result = host.runpytest_subprocess("--moe-known-failures", "known.yaml", *workers)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["ERROR: known.yaml:2: target: found 'vlm', expected one of *"])
        assert "Traceback" not in result.stderr.str() + result.stdout.str()
