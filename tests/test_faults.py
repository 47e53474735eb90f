"""Every fault of the simulated kernels is caught by the test that its row names, and named there."""

import re
from pathlib import Path

import pytest

from pytest_moe_routing.flashinfer import known_releases
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.simulator.faults import FAULTS
from pytest_moe_routing.suite.selection import SUITE


def run(pytester, kernels, *tests):
    """The suite's own tests, on the model that their ids begin with."""
    models = sorted(load_models(packaged_directory()), key=len, reverse=True)
    named = {next((m for m in models if f"[{m}-" in test), "mixtral-8x7b") for test in tests}
    return pytester.runpytest_inprocess(
        *(f"{SUITE}/{test}" for test in tests),
        f"--moe-kernels={kernels}",
        f"--moe-models={','.join(named)}",
        f"--moe-flashinfer={known_releases()[-1]}",
        *("-p", "no:cacheprovider", "-p", "no:xdist", "-q"),
    )


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault_is_caught_and_named(pytester, fault):
    result = run(pytester, f"simulator:{fault.name}", fault.test)
    result.assert_outcomes(failed=1)
    named = re.findall(r"^E? *diagnosis  (.*) \(as in (.*)\)$", result.stdout.str(), re.MULTILINE)
    assert (fault.what, fault.imitates) in named, result.stdout.str()


def test_right_kernels_pass_the_same_tests(pytester):
    tests = list(dict.fromkeys(fault.test for fault in FAULTS.values()))
    result = run(pytester, "simulator", *tests)
    result.assert_outcomes(passed=len(tests))


def test_unknown_fault(pytester):
    result = run(pytester, "simulator:nothing", next(iter(FAULTS.values())).test)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    message = "ERROR: --moe-kernels: unknown fault 'nothing'; faults: all-negative, *"
    result.stderr.fnmatch_lines([message])


def test_page_is_up_to_date():
    from pytest_moe_routing.report.faults import page

    assert (Path(__file__).parents[1] / "docs/gpu-faults.md").read_text() == page()
