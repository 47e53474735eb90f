"""Running the GPU suite: what is counted, required, simulated, and split over runners."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from fake_gpu import FAKE_GPU

SHARD = ("--moe-models", "minimax-m2", "-k", "test_gpu_routing and test_expert_parallel_shard")


def test_gpu_tests_skip_with_the_reason(host):
    result = host.runpytest_subprocess(
        "--moe-golden", "-m", "gpu", *SHARD, "-p", "no:cacheprovider"
    )
    result.assert_outcomes(skipped=6)
    # One line for all of them: neither letters nor a table of what did not run.
    result.stdout.no_re_match_line(r".*\.py s+ +\[100%\]")
    result.stdout.no_fnmatch_line("no GPU")
    result.stdout.fnmatch_lines(["6 skipped: no NVIDIA driver: *"])
    result = host.runpytest_subprocess("--moe-golden", "-m", "gpu", *SHARD, "-v")
    result.stdout.fnmatch_lines(
        [
            "*MoE routing on GPUs*",
            "no GPU",
            "  test_gpu_routing.py::test_expert_parallel_shard  6 skipped",
            "6 skipped: no NVIDIA driver: *",
        ]
    )


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["serial", "n2"])
@pytest.mark.parametrize("option", ["--moe-require-gpu", "--moe-min-gpu-tests 3"])
def test_a_gpu_job_that_ran_nothing_fails_if_required(host, option, workers):
    result = host.runpytest_subprocess(
        "--moe-golden", "-m", "gpu", *SHARD, *option.split(), *workers
    )
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "6 skipped: no NVIDIA driver: *",
            f"moe-routing: {option}: 0 GPU tests ran, expected at least *; 6 were skipped",
        ]
    )


def test_a_gpu_job_that_selected_nothing_fails_if_required(host):
    result = host.runpytest_subprocess("--moe-golden", "-k", "nothing", "--moe-require-gpu")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["moe-routing: *: 0 GPU tests ran, expected at least 1; 0 were skipped"]
    )


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["serial", "n2"])
def test_simulated_kernels_run_gpu_tests_and_are_no_gpu(host, workers):
    args = ("--moe-golden", "-m", "gpu", *SHARD, "--moe-kernels", "simulator", *workers)
    result = host.runpytest_subprocess(*args, "--moe-require-gpu")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*--moe-require-gpu: 0 GPU tests ran*", "* 6 passed*"])


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("kernels", "cuda", "flashinfer, simulator, simulator:FAULT, sglang[@PATH] or vllm[@PATH]"),
        ("scale", "large", "reduced or full"),
    ],
)
def test_choices_are_checked(host, option, value, expected):
    result = host.runpytest_subprocess(f"--moe-{option}", value)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    text = f"ERROR: --moe-{option}: found {value!r}, expected {expected}"
    assert text in result.stderr.str()


@pytest.mark.parametrize(("wanted", "ran"), [("8", True), ("9", False)])
def test_a_minimum_of_gpu_tests(host, wanted, ran):
    host.makeconftest(FAKE_GPU)
    host.makepyfile(
        test_host="""
        import pytest

        @pytest.mark.parametrize("n", range(9))
        def test_kernel(moe_gpu, n):
            if n == 4:
                pytest.skip("not today")
        """
    )
    host.makeini(f"[pytest]\nmoe_min_gpu_tests = {wanted}\n")
    result = host.runpytest_subprocess("-n", "2")
    result.assert_outcomes(passed=8, skipped=1)
    assert result.ret == (0 if ran else 1)
    message = "--moe-min-gpu-tests 9: 8 GPU tests ran, expected at least 9; 1 were skipped"
    assert (message in result.stdout.str()) is not ran


def test_a_minimum_that_is_no_number(host):
    result = host.runpytest_subprocess("--moe-min-gpu-tests", "many")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --moe-min-gpu-tests: found 'many', expected a number"])


# -- several runners ---------------------------------------------------------------------------


def test_a_suite_split_over_runners_is_the_whole_suite(host):
    pytest.importorskip("pytest_split")

    def collect(*args):
        out = host.runpytest_subprocess("--moe-golden", "-m", "gpu", "--collect-only", "-q", *args)
        return re.findall(r"^\S*::.*$", out.stdout.str(), re.M)

    whole = collect()
    parts = [collect("--splits", "3", "--group", group) for group in "123"]
    assert len(set(whole)) == len(whole) > 1000
    assert [*parts[0], *parts[1], *parts[2]] == whole
    assert max(map(len, parts)) - min(map(len, parts)) < 3


def test_the_documented_jobs_are_yaml():
    """Two of each system; the jobs of a system differ in how they are split."""
    text = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text()
    jobs = [
        yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)
    ]
    buildkite = [job["steps"][0] for job in jobs if "steps" in job]
    github = [job["jobs"]["moe-routing-kernels"] for job in jobs if "jobs" in job]
    assert [step.get("parallelism") for step in buildkite] == [None, 3]
    assert [job.get("strategy", {}).get("matrix") for job in github] == [None, {"group": [1, 2, 3]}]
    commands = [step["command"] for step in buildkite]
    commands += ["\n".join(step.get("run", "") for step in job["steps"]) for job in github]
    assert all("pytest --moe-golden -m gpu -n 4" in command for command in commands)
    assert [("--splits" in c, "pip install" in c) for c in commands] == [
        (False, True),
        (True, True),
    ] * 2


def test_a_split_is_the_same_under_xdist(host):
    pytest.importorskip("pytest_split")
    group = ("--splits", "3", "--group", "2", "--moe-models", "minimax-m2")
    collected = host.runpytest_subprocess("--moe-golden", "-m", "gpu", "--collect-only", *group)
    count = int(re.findall(r"(\d+) selected", collected.stdout.str())[-1])
    result = host.runpytest_subprocess("--moe-golden", "-m", "gpu", "-n", "2", *group)
    result.assert_outcomes(skipped=count)
