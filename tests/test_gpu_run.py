"""Running the GPU suite: faults, memory, builds, counts. On a CPU, by fakes of what a GPU would do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

SHARD = ("--moe-models", "minimax-m2", "-k", "test_gpu_routing and test_expert_parallel_shard")


def test_gpu_tests_skip_with_the_reason(host):
    result = host.runpytest_subprocess("--moe-golden", "-m", "gpu", *SHARD)
    result.assert_outcomes(skipped=6)
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
            f"moe-routing: {option}, but no GPU tests ran; 6 were skipped",
        ]
    )


def test_a_gpu_job_that_selected_nothing_fails_if_required(host):
    result = host.runpytest_subprocess("--moe-golden", "-k", "nothing", "--moe-require-gpu")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["moe-routing: *, but no GPU tests ran; 0 were skipped"])


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["serial", "n2"])
def test_simulated_kernels_run_gpu_tests_and_are_no_gpu(host, workers):
    args = ("--moe-golden", "-m", "gpu", *SHARD, "--moe-kernels", "simulator", *workers)
    result = host.runpytest_subprocess(*args, "--moe-require-gpu")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*--moe-require-gpu, but no GPU tests ran*", "* 6 passed*"])


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("kernels", "cuda", r"flashinfer|simulator(:[\w-]+)?"),
        ("scale", "large", "reduced|full"),
    ],
)
def test_choices_are_checked(host, option, value, expected):
    result = host.runpytest_subprocess(f"--moe-{option}", value)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    text = f"ERROR: --moe-{option}: found {value!r}, expected {expected}"
    assert text in result.stderr.str()


FAKE_GPU = """
import os, time
import pytest
from pytest_moe_routing.kernels import build, gpu

state = {"fault": False}

def synchronize():
    if state["fault"]:
        raise RuntimeError("an illegal memory access was encountered")

worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
gpu.find_gpu = lambda: gpu.Gpu("", "a fake GPU", (10, 0), f"GPU-{int(worker[2:]) % 2}", "580.1")
gpu.synchronize = synchronize
gpu.free_memory = lambda: gpu.MEMORY
gpu.memory_use = lambda: "1.5 GiB of 139.8 GiB are free"
"""


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
    message = "moe-routing: --moe-min-gpu-tests 9, but 8 GPU tests ran; 1 were skipped"
    assert (message in result.stdout.str()) is not ran


def test_a_minimum_that_is_no_number(host):
    result = host.runpytest_subprocess("--moe-min-gpu-tests", "many")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --moe-min-gpu-tests: found 'many', expected a number"])


# -- faults: each fails its own test, and the tests of other workers and after it run ----------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("conftest.state['fault'] = True", "device fault: an illegal memory access"),
        ("import os; os._exit(7)", "crashed while running"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed while running"),
        ("import time; time.sleep(60)", "Timeout"),
        ("conftest.gpu.synchronize = lambda: conftest.time.sleep(60)", "Timeout"),
        ("raise RuntimeError('CUDA error: out of memory')", "out of GPU memory: 1.5 GiB of 139.8"),
    ],
    ids=["device fault", "exit", "segmentation fault", "stuck", "stuck kernel", "out of memory"],
)
def test_a_fault_fails_its_own_test_and_no_other(host, fault, message):
    host.makeconftest(FAKE_GPU + "gpu.STUCK_AFTER = 2.0\n")
    host.makepyfile(
        test_host=f"""
        import conftest, pytest

        @pytest.fixture
        def kernels(request):
            return request.getfixturevalue("moe_gpu")

        @pytest.mark.gpu
        @pytest.mark.parametrize("n", range(8))
        def test_kernel(kernels, n):
            if n == 3:
                {fault}
        """
    )
    result = host.runpytest_subprocess("-n", "2", "-p", "no:faulthandler", "--moe-require-gpu")
    failed = set(re.findall(r"^FAILED \S+::(test_kernel\S+)", result.stdout.str(), re.M))
    assert failed == {"test_kernel[3]"}
    assert message in result.stdout.str() + result.stderr.str()
    # A fault that is found after the test passed: pytest counts that test twice, we do not.
    passed_first = "state" in fault or "synchronize" in fault
    result.assert_outcomes(passed=8 if passed_first else 7, failed=1)
    counts = "".join(re.findall(r"test_host.py::test_kernel  (.*)", result.stdout.str()))
    assert sum(map(int, re.findall(r"(\d+) passed", counts))) == 7
    assert ("1 failed" if "raise" in fault else "1 crashed") in counts


def test_every_outcome_is_counted_on_its_gpu(host):
    host.makeconftest(FAKE_GPU)
    host.makepyfile(
        test_host="""
        import os, pytest

        @pytest.fixture
        def broken_afterwards():
            yield
            raise ValueError

        def test_passes(moe_gpu): pass
        def test_fails(moe_gpu): assert not moe_gpu
        def test_skips(moe_gpu): pytest.skip("no bias")
        def test_dies(moe_gpu): os._exit(1)
        def test_broken(moe_gpu, broken_afterwards): pass
        @pytest.mark.xfail
        def test_known(moe_gpu): assert not moe_gpu
        def test_of_no_gpu(): raise RuntimeError("out of memory")
        """
    )
    result = host.runpytest_subprocess("-n", "1", "--max-worker-restart", "1")
    shown = result.stdout.str().split("MoE routing on GPUs")[1]
    assert dict(re.findall(r"^  test_host.py::(\w+) +(.*)$", shown, re.M)) == {
        "test_passes": "1 passed",
        "test_fails": "1 failed",
        "test_skips": "1 skipped",
        "test_dies": "1 crashed",
        "test_broken": "1 failed",
        "test_known": "1 xfailed",
    }
    result.stdout.fnmatch_lines(
        [
            "driver 580.1",
            "torch *",
            "flashinfer-cubin *",
            "a fake GPU (compute capability 10.0), GPU-0: gw0",
            "a fake GPU (compute capability 10.0), GPU-1: gw1",
            "1 skipped: no bias",
            "FAILED test_host.py::test_of_no_gpu - RuntimeError: out of memory",
        ]
    )


# -- memory -----------------------------------------------------------------------------------


def test_memory_of_a_neighbour_is_waited_for(host):
    host.makeconftest(
        FAKE_GPU
        + "free = [0, 0, gpu.MEMORY]\ngpu.free_memory = lambda: free.pop(0)\nslept = []\ngpu.time.sleep = slept.append\n"
    )
    host.makepyfile(
        test_host="import conftest\ndef test_kernel(moe_gpu): assert conftest.slept == [1.0, 1.0]"
    )
    host.runpytest_subprocess("-p", "no:xdist").assert_outcomes(passed=1)


def test_memory_that_never_comes_is_waited_for_once(host):
    """Ten tests that each wait ten minutes are a job that hangs."""
    host.makeconftest(
        FAKE_GPU
        + "gpu.free_memory = lambda: 0\nslept = []\ngpu.time.sleep = slept.append\n"
        + "def pytest_sessionfinish(): assert sum(slept) == gpu.PATIENCE\n"
    )
    host.makepyfile(
        test_host="import pytest\n@pytest.mark.parametrize('n', range(10))\ndef test_kernel(moe_gpu, n): pass"
    )
    result = host.runpytest_subprocess("-p", "no:xdist")
    result.assert_outcomes(errors=10)
    result.stdout.fnmatch_lines(
        [
            "*GpuMemoryError: waited 600 s for 2.0 GiB of GPU memory: 1.5 GiB of 139.8 GiB are free",
            "  test_host.py::test_kernel  10 failed",
        ]
    )


# -- builds -----------------------------------------------------------------------------------

BUILDS = """
import time
from pathlib import Path

LOG = Path(__file__).with_name("builds.log")

def note(text):
    with LOG.open("a") as log:
        log.write(text + "\\n")

def build():
    note("begin")
    time.sleep(0.5)
    note("end")

def build_that_fails():
    note("failed")
    raise RuntimeError("nvcc is not here")
"""


def builds(host, builder, *args):
    """Run eight tests that call `builder`'s kernels; the result, and what was built."""
    host.makepyfile(fake_kernels=BUILDS)
    host.makeconftest(
        FAKE_GPU
        + f"build.BUILDERS = {{'routing': ('fake_kernels', '{builder}')}}\n"
        + f"build.lock_path = lambda: build.Path({str(host.path)!r}) / 'lock'\n"
        + "build.SAY_EVERY = 0.1\n"
    )
    host.makepyfile(
        test_host=f"""
        import fake_kernels, pytest

        @pytest.mark.gpu(kernels="routing")
        @pytest.mark.parametrize("n", range(8))
        def test_kernel(moe_gpu, n):
            if "fails" in "{builder}":
                fake_kernels.{builder}()
        """
    )
    result = host.runpytest_subprocess(*args)
    return result, (host.path / "builds.log").read_text().split()


def test_workers_build_one_at_a_time_and_before_the_tests(host):
    result, built = builds(host, "build", "-n", "3", "--durations=0")
    result.assert_outcomes(passed=8)
    assert built == ["begin", "end"] * 3
    result.stderr.fnmatch_lines(
        ["moe-routing: gw? waits to build fake_kernels.build: *lock, held by gw? (process *"]
    )
    took = re.findall(r"^([0-9.]+)s (setup|call)", result.stdout.str(), re.M)
    assert [phase for seconds, phase in took if float(seconds) >= 0.5] == ["setup"] * 3


def test_a_build_that_fails_is_not_tried_by_every_test(host):
    result, built = builds(host, "build_that_fails", "-p", "no:xdist")
    result.assert_outcomes(failed=8)
    assert built == ["failed"]
    assert result.stdout.str().count("E   ") == 8
    result.stdout.fnmatch_lines(["*RuntimeError: nvcc is not here"])


def test_the_wait_for_a_build_ends(tmp_path, monkeypatch):
    from pytest_moe_routing.errors import MoERoutingError
    from pytest_moe_routing.kernels import build

    monkeypatch.setattr(build, "PATIENCE", 0.5)
    held = build.one_at_a_time(tmp_path / "lock", "one", 2)
    wanted = build.one_at_a_time(tmp_path / "lock", "two", 2)
    with held, pytest.raises(MoERoutingError, match=r"build two: .*, which builds one"), wanted:
        pass
    with build.one_at_a_time(tmp_path / "lock", "two", 2):
        pass


def test_a_build_that_hangs_ends_its_worker(host):
    host.makepyfile(fake_kernels="import time\ndef build(): time.sleep(60)")
    host.makeconftest(
        FAKE_GPU
        + "gpu.STUCK_AFTER = 1.0\nbuild.BUILDERS = {'routing': ('fake_kernels', 'build')}\n"
        + f"build.lock_path = lambda: build.Path({str(host.path)!r}) / 'lock'\n"
    )
    host.makepyfile(
        test_host="import pytest\n@pytest.mark.gpu(kernels='routing')\ndef test_kernel(moe_gpu): pass"
    )
    result = host.runpytest_subprocess("-n", "1", "--max-worker-restart", "0")
    assert result.ret != 0
    result.stderr.fnmatch_lines(["Timeout*", '*fake_kernels.py", line 2 in build'])


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


# -- placement --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "mask", "count", "device"),
    [
        ("gw0", None, 4, "0"),
        ("gw5", None, 4, "1"),
        ("gw1", "2,3", 4, "3"),
        ("gw1", "GPU-a,GPU-b", 8, "GPU-b"),
        ("gw3", None, 1, None),
        ("gw3", "6", 8, "6"),
        ("gw3", "", 8, ""),
        (None, None, 4, None),
    ],
)
def test_each_worker_gets_its_gpu(worker, mask, count, device):
    from pytest_moe_routing.kernels.gpu import place_worker

    environ = {"PYTEST_XDIST_WORKER": worker, "CUDA_VISIBLE_DEVICES": mask}
    environ = {key: value for key, value in environ.items() if value is not None}
    place_worker(environ, count)
    assert environ.get("CUDA_VISIBLE_DEVICES") == device


@pytest.mark.parametrize(("workers", "threads"), [(None, 8), ("3", 2), ("16", 1)])
def test_workers_share_the_cores(monkeypatch, workers, threads):
    import torch

    from pytest_moe_routing.kernels import gpu

    if workers:
        monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", workers)
    else:
        monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    given = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    gpu.share_cores()
    assert given == [threads]
