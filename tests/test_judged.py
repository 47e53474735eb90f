"""A run that judges less than it could is red."""

from __future__ import annotations

import json

import pytest
from configs import R1

from pytest_moe_routing.cli import main
from pytest_moe_routing.report.unanswered import AROUND, METHODS
from pytest_moe_routing.targets.expected import is_known_reason

RUN = (
    *("--moe-golden", "-m", "not gpu", "-k", "test_verdict["),
    *("--moe-schemes", "nvfp4,fp8_block", "--moe-models", "deepseek-r1"),
)
#: A vLLM in which nothing is where the contract expects it.
EMPTY = {
    "vllm/__init__.py": "",
    "vllm-{version}.dist-info/METADATA": "Name: vllm\nVersion: {version}\n",
}


@pytest.fixture
def empty_vllm(tmp_path):
    def make(version):
        for name, text in EMPTY.items():
            path = tmp_path / name.format(version=version)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.format(version=version))
        return f"vllm@{tmp_path}"

    return make


@pytest.mark.parametrize("xdist", [("-p", "no:xdist"), ("-n2",)], ids=["serial", "n2"])
def test_a_framework_that_is_not_judged_is_red(pytester, empty_vllm, xdist):
    target = empty_vllm("99.0")
    result = pytester.runpytest_subprocess(*RUN, *xdist, "--moe-target", target)
    assert result.ret == 1
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(
        [
            "moe-routing: 2 cases are not judged, although this framework release* fails the run; "
            "--moe-min-verdicts 0 accepts it",
            "  test_verdict[[]deepseek-r1-*: vllm 99.0: not judged: vLLM 99.0 has no "
            "vllm.model_executor.layers.fused_moe.config:RoutingMethodType *contract row 'methods'*",
        ]
    )


def test_a_scheme_in_which_no_model_can_be_asked_is_red(pytester, empty_vllm):
    asked = ("test_layouts", "test_other_experts", "test_around_call", "test_placements")
    chosen = (
        "-k",
        " or ".join((*asked, "test_method_numbers")),
        "--moe-schemes",
        "nvfp4",
        "-p",
        "no:xdist",
    )
    chosen += ("-q", "--moe-report", "r.json")
    result = pytester.runpytest_subprocess(
        *("--moe-golden", "-m", "not gpu"), *chosen, "--moe-target", empty_vllm("99.0")
    )
    assert result.ret == 1
    result.assert_outcomes(skipped=5)
    result.stdout.fnmatch_lines(
        [
            "moe-routing: not judged: 2 skipped tests, * questions within tests",
            "moe-routing: 5 cases are not judged, although this framework *",
        ]
    )
    rows = json.loads((pytester.path / "r.json").read_text())["unanswered"]
    assert {(row["target"], row["release"]) for row in rows} == {("vllm", "99.0")}
    whole = [row for row in rows if row["what"] == "whole tests: tests are not judged"]
    tests = {row["case"].partition("::")[2] for row in whole}
    assert tests == {"test_method_numbers", "test_placements[nvfp4]"}
    # The others count their own questions.
    counted = {row["case"].partition("::")[2] for row in rows if row not in whole}
    assert counted == {f"{test}[nvfp4]" for test in asked} - tests


def test_a_release_older_than_all_known_ones_is_held_to_nothing(pytester, empty_vllm):
    options = (*RUN, "--moe-target", empty_vllm("0.1.0"))
    result = pytester.runpytest_subprocess(*options, "--moe-min-verdicts", "0")
    assert result.ret == 0
    result.assert_outcomes(skipped=2)
    # But a run that gives no verdict at all is no pass.
    result = pytester.runpytest_subprocess(*options)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["moe-routing: no verdict was given, 2 cases are not judged: this fails the run; *"]
    )


def test_a_model_of_the_users_own_may_be_left_open(pytester, empty_vllm):
    folder = pytester.path / "golden"
    assert main(["init", str(folder)]) == 0
    (folder / "deepseek-r1").rename(folder / "mine")
    options = ("--moe-golden-dir", str(folder), "--moe-models", "mine", *RUN[:-2])
    result = pytester.runpytest_subprocess(*options, "--moe-target", empty_vllm("99.0"))
    # It is not held to what is known of packaged models, but no verdict at all is no pass.
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["moe-routing: no verdict was given, 2 cases are not judged: *"])
    result.stdout.no_fnmatch_line("*questions have no answer*")
    assert result.ret == 1


def test_a_config_that_is_not_judged_is_no_pass(pytester):
    """A misspelt key leaves the model open, in a run about it alone."""
    config = {key: value for key, value in R1.items() if key != "norm_topk_prob"}
    (pytester.path / "mine").mkdir()
    (pytester.path / "mine/config.json").write_text(json.dumps({**config, "norm_topk_porb": True}))
    options = ("--moe-config", "mine/config.json", "--moe-models", "mine", *RUN[:5])
    result = pytester.runpytest_subprocess(*options)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["moe-routing: no verdict was given, *"])


@pytest.mark.parametrize(("wanted", "ret"), [("0", 0), ("2", 0), ("3", 1)])
def test_a_number_of_verdicts(pytester, wanted, ret):
    result = pytester.runpytest_subprocess(*RUN, "--moe-min-verdicts", wanted)
    assert result.ret == ret
    if ret:
        message = f"moe-routing: --moe-min-verdicts: found 2 verdicts, expected at least {wanted}"
        result.stdout.fnmatch_lines([message])


def test_a_number_takes_the_place_of_what_is_known(pytester, empty_vllm):
    target = ("--moe-target", empty_vllm("99.0"))
    assert pytester.runpytest_subprocess(*RUN, *target, "--moe-min-verdicts", "0").ret == 0
    result = pytester.runpytest_subprocess(*RUN, *target, "--moe-min-verdicts", "1")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["moe-routing: --moe-min-verdicts: found 0 verdicts, expected at least 1"]
    )


def test_no_number(pytester):
    result = pytester.runpytest_subprocess("--moe-min-verdicts", "many")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --moe-min-verdicts: found 'many', expected a number"])


KNOWN = "vllm 99.0: this release has no AXK2ForCausalLM"
NEW = "vllm 99.0: this release has no MixtralForCausalLM"


@pytest.mark.parametrize(
    ("sentence", "reason", "options", "is_red"),
    [
        (AROUND, NEW, (), True),
        (AROUND, KNOWN, (), False),
        # Nothing is expected of code that no packaged model runs.
        (METHODS, NEW, (), False),
        # Nothing is known of these: another FlashInfer, and a model of the user's.
        (AROUND, NEW, ("--moe-flashinfer", "0.6.18"), False),
        (AROUND, NEW, ("--moe-config", "config.json"), False),
        (AROUND, NEW, ("--moe-min-verdicts", "0"), False),
    ],
)
def test_a_part_that_is_open_for_a_new_reason_is_red(
    pytester, empty_vllm, sentence, reason, options, is_red
):
    pytester.path.joinpath("config.json").write_text(json.dumps(R1))
    pytester.makepyfile(
        f"def test_part(moe_target, record_property):\n"
        f"    record_property('moe_unanswered', {{{sentence!r}: {{{reason!r}: 1}}}})"
    )
    # A release whose FlashInfer is known.
    target = empty_vllm("99.0")
    result = pytester.runpytest_subprocess("--moe-target", target, *options)
    result.assert_outcomes(passed=1)
    assert result.ret == int(is_red)
    said = "1 case is not judged, although this framework release" in result.stdout.str()
    assert said == is_red
    assert (f"  test_part[]: {reason}" in result.stdout.str()) == is_red


@pytest.mark.parametrize("count", [2, 13])
def test_each_new_reason_of_a_part_is_named(pytester, empty_vllm, count):
    """Those of one test, and of another one that has the first as well; at most ten."""
    reasons = {f"{NEW} {number}": 1 for number in range(1, count + 1)}
    first = dict([*reasons.items()][:1])
    pytester.makepyfile(
        f"def test_part(moe_target, record_property):\n"
        f"    record_property('moe_unanswered', {{{AROUND!r}: {reasons}}})\n"
        f"def test_other(moe_target, record_property):\n"
        f"    record_property('moe_unanswered', {{{AROUND!r}: {{{KNOWN!r}: 1, **{first}}}}})"
    )
    result = pytester.runpytest_subprocess("--moe-target", empty_vllm("99.0"))
    assert result.ret == 1
    told = [line for line in result.outlines if line.startswith("  ")]
    assert told[:2] == [f"  test_part[], test_other[]: {NEW} 1", f"  test_part[]: {NEW} 2"]
    assert (
        told[2:]
        == {
            2: [],
            13: [
                *(f"  test_part[]: {NEW} {number}" for number in range(3, 11)),
                "  and 3 more reasons; a report lists them all",
            ],
        }[count]
    )


@pytest.mark.parametrize("package", ["vllm", "sglang"])
def test_reasons_of_open_parts_are_of_their_framework(package):
    """Nothing is known of releases before the first row, and the newest stands for later ones."""
    assert is_known_reason(package, "0.1.0", "anything") is None
    assert is_known_reason(package, "99.0", "anything") is False
    assert is_known_reason(package, "99.0", KNOWN.replace("vllm", package)) is True
    assert is_known_reason(package, "99.0", NEW.replace("vllm", package)) is False
