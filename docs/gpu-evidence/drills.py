"""What the CPU tests fake, on a real GPU: memory, a stuck kernel, a fault, a worker that dies.

    pytest docs/gpu-evidence/drills.py -n 2

Four tests fail, each for its own reason, and the others pass. Output of an H200: drills.txt.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from pytest_moe_routing.kernels import gpu

gpu.STUCK_AFTER = 30.0

NEIGHBOUR = """
import time, torch
held = torch.empty(torch.cuda.mem_get_info()[0] - 2**30, dtype=torch.uint8, device="cuda")
print("held", flush=True)
time.sleep(8)
"""


def works():
    assert int(torch.arange(8, device="cuda").sum()) == 28


@pytest.fixture(scope="module")
def neighbour():
    """Another process that leaves 1 GiB, for eight seconds."""
    with subprocess.Popen([sys.executable, "-c", NEIGHBOUR], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield time.monotonic()


@pytest.mark.gpu(kernels="routing")
@pytest.mark.parametrize("n", range(4))
def test_before(moe_gpu, n):
    works()


def test_waits_for_a_neighbour(neighbour, moe_gpu):
    assert time.monotonic() - neighbour > 6
    works()


def test_out_of_memory(moe_gpu):
    torch.empty(2**40, dtype=torch.uint8, device="cuda")


def test_fault(moe_gpu):
    import triton
    import triton.language as tl

    @triton.jit
    def wild_store(pointer):
        tl.store(pointer + (1 << 40), 1)

    wild_store[(1,)](torch.arange(8, device="cuda"))


def test_stuck_kernel(moe_gpu):
    torch.cuda._sleep(10**12)


def test_segmentation_fault(moe_gpu):
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize("n", range(8))
def test_after(moe_gpu, n):
    works()
