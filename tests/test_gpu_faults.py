"""Faults of GPUs, and memory that others hold: each test fails for itself, and nothing hangs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
from fake_gpu import FAKE_GPU


@dataclass(frozen=True)
class Fault:
    """What happens in a test, and what is said of it.

    A fault that is found only after the test passed counts twice for pytest, but not for us.
    """

    code: str
    message: str
    counted: str = "1 crashed"
    passes_first: bool = False


CRASHED = "crashed while running"
FAULTS = {
    "device fault": Fault(
        "conftest.state['fault'] = True",
        "device fault: an illegal memory access",
        passes_first=True,
    ),
    "exit": Fault("import os; os._exit(7)", CRASHED),
    "segmentation fault": Fault("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", CRASHED),
    "stuck": Fault("import time; time.sleep(60)", "Timeout"),
    "stuck kernel": Fault(
        "conftest.gpu.synchronize = lambda: conftest.time.sleep(60)", "Timeout", passes_first=True
    ),
    "out of memory": Fault(
        "raise RuntimeError('CUDA error: out of memory')",
        "out of GPU memory: 1.5 GiB of 139.8",
        counted="1 failed",
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_fails_its_own_test_and_no_other(host, fault):
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
                {fault.code}
        """
    )
    result = host.runpytest_subprocess("-n", "2", "-p", "no:faulthandler", "--moe-require-gpu")
    failed = set(re.findall(r"^FAILED \S+::(test_kernel\S+)", result.stdout.str(), re.M))
    assert failed == {"test_kernel[3]"}
    assert fault.message in result.stdout.str() + result.stderr.str()
    result.assert_outcomes(passed=8 if fault.passes_first else 7, failed=1)
    counts = "".join(re.findall(r"test_host.py::test_kernel  (.*)", result.stdout.str()))
    assert sum(map(int, re.findall(r"(\d+) passed", counts))) == 7
    assert fault.counted in counts


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
