"""Ids of the suite's tests: the same wherever the package lies, and good for pasting."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from pytest_moe_routing import __version__

RUN = ("--moe-golden", "--moe-models", "minimax-m2", "--moe-schemes", "nvfp4")
VERDICT = "pytest_moe_routing/suite/test_verdicts.py::test_verdict[minimax-m2-nvfp4]"
BAD = ("--moe-target", "miniatures:LosesScale", "--moe-models", "deepseek-r1")


def failed(result):
    return re.findall(r"^FAILED (\S+)", result.stdout.str(), re.M)


def test_ids_do_not_depend_on_where_the_package_lies(host):
    """The host's root directory holds no such file: the package is elsewhere."""
    text = host.runpytest_subprocess(*RUN, "--collect-only", "-q").stdout.str()
    ids = [line for line in text.splitlines() if "::" in line]
    assert VERDICT in ids
    assert {line.partition("::")[0].rpartition("/")[0] + "/" for line in ids} == {
        "pytest_moe_routing/suite/"
    }
    assert not (host.path / "pytest_moe_routing").exists()


def test_tests_come_in_the_order_in_which_children_are_asked(host):
    """What a child answers first is judged while it answers the config sweep."""
    text = host.runpytest_subprocess(
        "--moe-golden", *BAD[:2], "--collect-only", "-q", "-m", "not gpu"
    )
    ids = re.findall(r"::(\w+)", text.stdout.str())
    first = list(dict.fromkeys(reversed(ids)))[::-1]
    assert first[0] == "test_verdict"
    assert first[-4:] == [
        *("test_other_experts", "test_around_call", "test_layouts", "test_quantization_methods")
    ]
    assert first.index("test_model_code") < first.index("test_behind_gates")
    assert first.index("test_behind_gates") == len(first) - 5


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["serial", "n2"])
@pytest.mark.parametrize("golden", [(), RUN], ids=["alone", "golden"])
def test_an_id_can_be_pasted(host, workers, golden):
    result = host.runpytest_subprocess(*golden, VERDICT, *workers)
    result.assert_outcomes(passed=1)


def test_an_id_can_be_pasted_beside_tests_of_the_host_and_below_its_root(host):
    host.runpytest_subprocess(VERDICT, "test_host.py").assert_outcomes(passed=2)
    below = host.mkdir("below")
    pasted = f"../{VERDICT}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(below)
        result = host.runpytest_subprocess("--rootdir", "..", pasted)
    result.assert_outcomes(passed=1)


def test_a_file_of_the_host_with_the_suites_name_is_the_hosts(host):
    folder = host.path / "pytest_moe_routing" / "suite"
    folder.mkdir(parents=True)
    (folder / "test_verdicts.py").write_text("def test_mine(): pass")
    result = host.runpytest_subprocess("pytest_moe_routing/suite/test_verdicts.py::test_mine")
    result.assert_outcomes(passed=1)


def test_an_id_of_no_test_is_not_found(host):
    result = host.runpytest_subprocess("pytest_moe_routing/suite/test_nothing.py::test_x")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_last_failed_runs_what_failed(host):
    run = (*RUN, *BAD, "-rf")
    first = host.runpytest_subprocess(*run)
    assert failed(first) == [VERDICT.replace("minimax-m2", "deepseek-r1")]
    again = host.runpytest_subprocess(*run, "--lf")
    assert failed(again) == failed(first)
    again.assert_outcomes(failed=1, deselected=again.parseoutcomes()["deselected"])


def test_junit_names_the_classes_and_properties(host):
    host.runpytest_subprocess(*RUN, *BAD, "--junitxml", "out.xml")
    cases = {
        case.get("name"): case for case in ElementTree.parse(host.path / "out.xml").iter("testcase")
    }
    case = cases["test_verdict[deepseek-r1-nvfp4]"]
    assert case.get("classname") == "pytest_moe_routing.suite.test_verdicts"
    assert {p.get("name"): p.get("value") for p in case.iter("property")} == {
        "moe_case": "test_verdicts::test_verdict[deepseek-r1-nvfp4]",
        "moe_model": "deepseek-r1",
        "moe_scheme": "nvfp4",
        "moe_target": "loses-scale",
        "moe_release": __version__,
        "moe_flashinfer": "0.7.2.post1",
        "moe_verdict": "wrong",
        "moe_cause": "wrong:recipe-scale",
    }
