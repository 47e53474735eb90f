"""A conftest that stands for a machine with GPUs, by fakes of what a GPU would do."""

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
