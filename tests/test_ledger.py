"""The ledger of known failures: what it may say, and what a run makes of it."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_moe_routing.errors import ModelError, MoERoutingError, Unsupported
from pytest_moe_routing.failure import PROPERTY, Failure, Rank
from pytest_moe_routing.ledger import KnownFailure, LedgerPlugin, in_force, load_ledger
from pytest_moe_routing.report import records
from pytest_moe_routing.report.known import LedgerWriter

LINK = "https://example.com/1"
ENTRY = {"cause": "a:cause", "target": "builtin", "reason": "because", "link": LINK}


def ledger(path, *entries):
    """A ledger with an entry on each line from the second on."""
    lines = ["- {" + ", ".join(f"{k}: {v}" for k, v in entry.items()) + "}\n" for entry in entries]
    path.write_text("# Failures that are known.\n" + "".join(lines))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None}, "target: found no key of this name, expected text"),
        ({"link": "JIRA-17"}, "link: found 'JIRA-17', expected https://..., where"),
        ({"reason": "''"}, "reason: found nothing, expected text"),
        ({"target": "vlm"}, "target: found 'vlm', expected one of builtin, "),
        ({"since": "0.30"}, "since: found '0.30', expected text or null (YAML reads '0.30' as a number; write it in quotes)"),
        ({"until": "later"}, "until: found 'later', expected a release such as 0.30.0"),
        ({"since": "0.30.0", "until": "0.30.0"}, "until: found '0.30.0', expected a release after"),
        ({"flashinfer_since": "1.0.0", "flashinfer_until": "0.9.0"}, "flashinfer_until: found '0.9.0'"),
        ({"cause": "' '"}, "cause: found nothing, expected the id of a cause"),
        ({"cause": "target:no-answers"}, "cause: found 'target:no-answers', expected another one: such"),
        ({"case": "' '"}, "case: found nothing, expected text"),
        ({"cases": "x"}, "cases: found 'x', expected a non-empty list, each item text"),
        ({"cases": "[a, ' ']"}, "cases: found nothing, expected a list of shell patterns"),
        ({"cases": "[a]", "case": "b"}, "cases: found case as well, expected one of the two"),
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
        ("- {case: *-nvfp4}", ":1: not valid YAML: found undefined alias '-nvfp4'; text that starts with * needs quotes"),
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
        ({"target": "vllm"}, "vllm", None, "0.7.0", True),
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


@pytest.mark.parametrize(
    ("changes", "is_again"),
    [
        ({"reason": "again"}, True),
        ({"cases": "[x-*, a-nvfp4]"}, True),
        ({"cause": "wrong:other"}, False),
        ({"case": "x-*"}, False),
        ({"target": "vllm"}, False),
        ({"flashinfer_since": "0.7.1"}, False),
    ],
    ids=str,
)
def test_a_cause_of_a_case_is_in_one_entry(tmp_path, changes, is_again):
    """The reason and link of a second entry would never be shown."""
    first = {**ENTRY, "case": "a-nvfp4"}
    second = {**(ENTRY if "cases" in changes else first), **changes}
    file = ledger(tmp_path / "known.yaml", first, second)
    entries = load_ledger(file)
    release = {"target": "builtin", "release": lambda: "1", "flashinfer": "0.7.0"}
    if not is_again:
        assert in_force(entries, **release) == [
            e for e in entries if e.target == "builtin" and not e.flashinfer_since
        ]
        return
    with pytest.raises(MoERoutingError) as caught:
        in_force(entries, **release)
    assert str(caught.value) == (
        f"{file}:3: found the case 'a-nvfp4' for the cause 'a:cause' again, expected it once; it "
        f"is also in the entry at {file}:2"
    )


def test_a_target_that_does_not_say_its_release(tmp_path):
    entries = load_ledger(ledger(tmp_path / "known.yaml", {**ENTRY, "since": "0.30.0"}))

    def silent():
        raise Unsupported("builtin does not state its version")

    for release, message in [(silent, "does not state its version"), (lambda: "main", "'main'")]:
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


LOST_SCALE = "wrong:recipe-scale"


@pytest.mark.parametrize("workers", [("-n", "2"), ("-p", "no:xdist")], ids=["n2", "serial"])
def test_an_entry_silences_one_cause(host, workers):
    """The lost factor is known, in one scheme of two; another cause and another model are not.

    An entry's cases are followed one by one: what fails in others is named, and so are those that
    are right again, or that no test has.
    """
    ledger(
        host.path / "known.yaml",
        {
            **OLD,
            "cause": LOST_SCALE,
            "cases": [
                "step-3.7-flash-fp8_block",
                "step-3.7-flash-f*",
                "minimax-m2-fp8_block",
                "minimax-m9-*",
            ],
            "until": "99.0.0",
        },
        {**OLD, "cause": "wrong:recipe-bias", "case": "step-3.7-flash-nvfp4"},
        {**OLD, "cause": LOST_SCALE, "case": "minimax-m2-nvfp4"},
        {**OLD, "cause": LOST_SCALE, "case": "minimax-m3-*"},
        {**OLD, "cause": LOST_SCALE, "since": "99.0.0"},
        {**OLD, "cause": LOST_SCALE, "target": "vllm"},
    )
    args = ("--moe-known-failures=known.yaml", "--moe-report=r.jsonl", *workers)
    schemes = ("--moe-schemes", "fp8_block,nvfp4", "-k", "test_verdict[", "-v")
    result = host.runpytest_subprocess(*RUN, *TWO, *schemes, *args)
    counts = result.parseoutcomes()
    assert (counts["xfailed"], counts["failed"]) == (1, 1)
    assert result.ret == 1
    result.stdout.fnmatch_lines_random(
        [
            f"XFAIL *::test_verdict[[]step-3.7-flash-fp8_block] - PR 1 was not yet there ({LINK})",
            "FAILED *::test_verdict[[]step-3.7-flash-nvfp4]*",
            f"  cause    {LOST_SCALE}",
            "  known    in other cases: known.yaml:2 does not list these",
            "moe-routing: known causes in new cases; fix them, or add the cases to the entry:",
            "  known.yaml:2: step-3.7-flash-nvfp4",
            f"  test_verdict[[]minimax-m2-fp8_block] (known.yaml:2): PR 1 was not yet there ({LINK})",
            f"  test_verdict[[]minimax-m9-[*]] (known.yaml:2): PR 1 was not yet there ({LINK})",
            "2 exact, 2 fallback, 2 wrong (1 known); vllm-0.22-classifier *",
            "moe-routing: known failures that no longer occur; remove or narrow them, unless their "
            "cases are now missed or not judged, or fail for another cause:",
        ]
    )
    text = result.stdout.str()
    # Entries of one reason are told apart by their cases and lines.
    stale = rf"^  test_verdict\[(.*)\] \((known.yaml:\d+)\): {re.escape(OLD['reason'])} "
    gone, unmatched = text.split("match no case (only part of the suite was chosen):")
    assert re.findall(stale, gone, re.M) == [
        ("minimax-m2-fp8_block", "known.yaml:2"),
        ("step-3.7-flash-nvfp4", "known.yaml:3"),
        ("minimax-m2-nvfp4", "known.yaml:4"),
    ]
    assert re.findall(stale, unmatched, re.M) == [
        ("minimax-m9-*", "known.yaml:2"),
        ("minimax-m3-*", "known.yaml:5"),
    ]
    found = {(r.model, r.scheme): r for r in records.load(host.path / "r.jsonl")}
    known = found["step-3.7-flash", "fp8_block"]
    assert (known.known.reason, known.known.link) == (OLD["reason"], LINK)
    assert known.outcome == "xfailed"
    assert found["step-3.7-flash", "nvfp4"].known is None


def sweep_causes(text):
    """The causes of a run's failures; in a CI job pytest's short summary repeats the first."""
    lines = [line for line in text.splitlines() if not line.startswith("FAILED ")]
    return re.findall(r"(?:^  cause    |\[)(\w+:[^\]\s]+)\]?$", "\n".join(lines), re.M)


def test_a_known_cause_of_a_test_leaves_the_others(host):
    """The config sweep of a scheme has many causes: one known one silences itself alone."""
    # Latent causes are told with their ids only where a line may be long.
    args = (*RUN, *TWO, "-v", "--moe-schemes", "nvfp4", "-k", "test_config_sweep", "-n", "2")
    text = host.runpytest_subprocess(*args).stdout.str()
    causes = sweep_causes(text)
    assert len(set(causes)) == len(causes) > 2
    entries = [{**OLD, "test": "test_config_sweep", "cause": cause} for cause in causes]
    ledger(host.path / "one.yaml", entries[0])
    result = host.runpytest_subprocess(*args, "--moe-known-failures", "one.yaml")
    assert result.parseoutcomes()["failed"] == 1
    assert sweep_causes(result.stdout.str()) == causes[1:]
    # Of models that are not chosen: that it is not seen here says nothing.
    other = {**OLD, "test": "test_config_sweep", "cause": "wrong:another", "cases": ["nvfp4"]}
    ledger(host.path / "all.yaml", *entries, other)
    result = host.runpytest_subprocess(*args, "--moe-known-failures", "all.yaml")
    assert (result.ret, result.parseoutcomes()["xfailed"]) == (0, 1)
    # An entry that names no cause silences nothing here.
    ledger(host.path / "none.yaml", {**OLD, "test": "test_config_sweep"})
    result = host.runpytest_subprocess(*args, "--moe-known-failures", "none.yaml")
    assert result.parseoutcomes()["failed"] == 1
    assert "names no cause, but this test states its causes; add 'cause: ID'" in result.stdout.str()


@pytest.mark.parametrize("workers", [("-n", "2"), ("-p", "no:xdist")], ids=["n2", "serial"])
def test_an_entry_without_a_case_fails_a_run_of_the_whole_suite(host, workers):
    stale = {**OLD, "cause": LOST_SCALE, "case": "nothing-*"}
    ledger(host.path / "known.yaml", stale, {**OLD, "test": "test_method_numbers"})
    host.makeini("[pytest]\nmoe_known_failures = known.yaml\n")
    # What -m leaves out is collected nonetheless, and matches.
    result = host.runpytest_subprocess(*RUN, "-m", "gpu and not gpu", *workers)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "moe-routing: known failures that match no case (remove them):",
            "  test_verdict[[]nothing-[*]] (*/known.yaml:2): PR 1 was not yet there *",
        ]
    )
    assert "known.yaml:3" not in result.stdout.str()
    if workers == ("-p", "no:xdist"):
        chosen = host.runpytest_subprocess(*RUN, "-k", "test_method_numbers", *workers)
        chosen.assert_outcomes(failed=1, deselected=chosen.parseoutcomes()["deselected"])
        chosen.stdout.fnmatch_lines(["test_method_numbers: known failure is gone: *known.yaml:3 *"])
        chosen.stdout.fnmatch_lines(
            "moe-routing: known failures that match no case: 1 (only part of the suite was chosen; "
            "-v lists them)"
        )


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
    entry = {k: v for k, v in ENTRY.items() if k != "cause"} | {"case": "minimax-m2"}
    ledger(host.path / "k", *({**entry, "test": f"test_{t}"} for t in ("own", "broken", "skipped")))
    args = ("--moe-models", "minimax-m2", "--moe-known-failures", "k", "test_host.py", "-rxs")
    result = host.runpytest_subprocess(*args, "--moe-report", "r.md")
    result.assert_outcomes(xfailed=1, errors=1, skipped=1)
    result.stdout.fnmatch_lines([f"XFAIL *::test_own[[]minimax-m2] - because ({LINK})"])
    report = (host.path / "r.md").read_text()
    listed = f"## 1 known failure\n\n- because (<{LINK}>): test_host::test_own\\[minimax-m2\\]\n"
    assert listed in report
    host.runpytest_subprocess(*args, "--runxfail").assert_outcomes(failed=1, errors=1, skipped=1)


def test_a_mistake_is_misuse(host):
    ledger(host.path / "known.yaml", {**ENTRY, "target": "vlm"})
    for workers in (("-n", "2"), ()):
        result = host.runpytest_subprocess("--moe-known-failures", "known.yaml", *workers)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["ERROR: known.yaml:2: target: found 'vlm', expected one of *"])
        assert "Traceback" not in result.stderr.str() + result.stdout.str()


def test_a_cause_of_a_test_that_did_not_fail_is_not_written(tmp_path):
    """Such as one that another plugin runs again, and that passes then."""
    failure = Failure("a:cause", Rank.LOUD, "deepseek-r1-nvfp4", ("what is wrong",))
    stated = [(PROPERTY, [failure.as_dict()])]
    writer = LedgerWriter(SimpleNamespace(), tmp_path / "known.yaml")
    for failed in (False, True):
        report = SimpleNamespace(
            nodeid="t.py::test_verdict[x]", user_properties=stated, failed=failed
        )
        writer.pytest_runtest_logreport(report)
        assert bool(writer.causes) is failed


@pytest.mark.parametrize("whole_suite", [True, False])
def test_a_run_of_a_part_knows_a_cause_that_models_outside_it_meet(whole_suite):
    """A ledger of the whole suite has the id of the cause that those models show."""
    lines = ("fp8: x",)
    failure = Failure("requested-experts:x", Rank.LATENT, "m", lines, if_met="other-experts:x")
    entry = KnownFailure("vllm", "because", "other-experts:x", "fp8", test="test_other_experts")
    plugin = LedgerPlugin([entry], whole_suite=whole_suite)
    item = SimpleNamespace(
        stash=pytest.Stash(),
        callspec=SimpleNamespace(id="fp8", params={}),
        config=SimpleNamespace(getoption=lambda *_: False),
    )
    plugin.mark(item, "test_other_experts", "fp8")
    report = SimpleNamespace(
        outcome="failed",
        skipped=False,
        passed=False,
        user_properties=[(PROPERTY, [failure.as_dict()])],
    )
    hook = plugin.pytest_runtest_makereport(item, SimpleNamespace(when="call"))
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(report)
    assert report.outcome == ("failed" if whole_suite else "skipped")
