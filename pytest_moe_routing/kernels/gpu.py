"""The GPU of this process: is there one for the routing kernels, and how tests share it.

A GPU test runs inside `guarded`: it waits for memory that a neighbour holds; a stuck kernel ends
its process with the stack, and so does a device fault, as no later call in that process could be
trusted. Under pytest-xdist the worker is replaced and the tests after it run; the failed test is
reported as the one that crashed the worker.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pytest_moe_routing.backends import FlashInfer, installed_release

#: The standalone routing operator came with this release.
NEEDS_FLASHINFER = "0.7.0"
#: FlashInfer's launchers refuse Hopper, but its routing kernels run there: see `hopper.py`.
HOPPER = 9
#: Seconds after which a GPU test counts as stuck; a JIT build on few cores takes minutes.
STUCK_AFTER = 1800.0
#: Free bytes that a routing test wants, and seconds that it waits for them.
MEMORY = 2 * 2**30
PATIENCE = 600.0


@dataclass(frozen=True)
class Gpu:
    """A GPU with everything that the routing kernels need, or the reason why there is none."""

    missing: str = ""
    name: str = ""
    capability: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        if self.missing:
            return self.missing
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def place_worker(environ: MutableMapping[str, str], count: int) -> None:
    """Give an xdist worker one of `count` GPUs, or of those that a mask already allows.

    Must run before CUDA is initialised in the process; changes nothing where there is one GPU.
    """
    worker = environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    devices = [d for d in mask.split(",") if d] if mask is not None else [*map(str, range(count))]
    if worker.isdigit() and len(devices) > 1:
        environ["CUDA_VISIBLE_DEVICES"] = devices[int(worker) % len(devices)]


@cache
def find_gpu() -> Gpu:
    """The GPU of this process. Cheap questions come first: no torch where there is no driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Gpu("no NVIDIA driver: libcuda.so.1 is not there")
    place_worker(os.environ, len(list(Path("/dev").glob("nvidia[0-9]*"))))
    import torch

    if not torch.cuda.is_available():
        return Gpu("torch finds no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    release = installed_release()
    if release is None:
        return Gpu(f"{name}: flashinfer-python is not installed")
    flashinfer = FlashInfer.of(release)
    if not flashinfer.has(NEEDS_FLASHINFER):
        return Gpu(f"{name}: trtllm_gen_routing needs FlashInfer {NEEDS_FLASHINFER}, not {release}")
    devices = (*flashinfer.devices, HOPPER)
    if major not in devices:
        majors = ", ".join(f"{m}.x" for m in sorted(devices))
        return Gpu(f"{name}: compute capability {major}.{minor}, but routing kernels want {majors}")
    return Gpu("", name, (major, minor))


def free_memory() -> int:
    """Free bytes on the device."""
    import torch

    return int(torch.cuda.mem_get_info()[0])


def synchronize() -> None:
    """Wait for the device; raises when anything that ran on it has failed."""
    import torch

    torch.cuda.synchronize()


@contextmanager
def guarded(stderr: int) -> Iterator[None]:
    """Run one GPU test, see the module's description; last words go to the descriptor `stderr`."""
    wait_for_memory()
    faulthandler.dump_traceback_later(STUCK_AFTER, exit=True, file=stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        try:
            synchronize()
        except Exception as error:
            # Nothing that this process asks of CUDA from here on would be answered.
            test = os.environ.get("PYTEST_CURRENT_TEST", "a test")
            os.write(stderr, f"moe-routing: {test}: device fault: {error}\n".encode())
            os._exit(1)


def wait_for_memory() -> None:
    """Wait until the device has `MEMORY` bytes free; give up after `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    while free_memory() < MEMORY and time.monotonic() < deadline:
        time.sleep(1.0)
