"""The GPU of this process: is there one for the routing kernels, and how tests share it.

A GPU test runs inside `guarded`: it waits for memory that another process holds; a stuck kernel
ends its process with the stack, and so does a device fault, as no later call in that process could
be trusted. Under pytest-xdist the worker is replaced and the tests after it run; the failed test is
reported as the one that crashed the worker. What is built for the tests is built in `build.py`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import time
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pytest_moe_routing.errors import GpuMemoryError
from pytest_moe_routing.flashinfer import FlashInfer, installed_release

#: The standalone routing operator came with this release.
NEEDS_FLASHINFER = "0.7.0"
#: FlashInfer's launchers refuse Hopper, but its routing kernels run there: see `hopper.py`.
HOPPER = 9
#: Seconds after which a GPU test counts as stuck; a JIT build on few cores takes minutes.
STUCK_AFTER = 1800.0
#: Free bytes that a routing test wants, and seconds that a process waits for them, in all its tests
#: together until they are there: if each waited again, it would keep a full GPU's job for days.
MEMORY = 2 * 2**30
PATIENCE = 600.0

_waited = 0.0


@dataclass(frozen=True)
class Gpu:
    """A GPU with everything that the routing kernels need, or the reason why there is none."""

    missing: str = ""
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    uuid: str = ""
    driver: str = ""

    def __str__(self) -> str:
        if self.missing:
            return self.missing
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def place_worker(environ: MutableMapping[str, str], count: int) -> None:
    """Give an xdist worker one of `count` GPUs, or of those that a mask already allows.

    Must run before CUDA is initialized in the process; changes nothing where there is one GPU.
    """
    worker = environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    devices = [d for d in mask.split(",") if d] if mask is not None else [*map(str, range(count))]
    if worker.isdigit() and len(devices) > 1:
        environ["CUDA_VISIBLE_DEVICES"] = devices[int(worker) % len(devices)]


def device_count() -> int:
    """Count the NVIDIA GPUs of this machine."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def share_cores() -> None:
    """Give an xdist worker its part of the cores: torch takes them all, and all workers then wait.

    The reference runs on the CPU. On 16 cores, `-n 4` took six times as long without.
    """
    import torch

    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@cache
def has_driver() -> bool:
    """Return whether there is an NVIDIA driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@cache
def find_gpu() -> Gpu:
    """Return the GPU of this process. Without a driver, torch is not imported."""
    if not has_driver():
        return Gpu("no NVIDIA driver: libcuda.so.1 is not there")
    place_worker(os.environ, device_count())
    import torch

    if not torch.cuda.is_available():
        return Gpu("torch finds no CUDA device")
    share_cores()
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    release = installed_release()
    if release is None:
        return Gpu(f"{name}: flashinfer-python is not installed")
    flashinfer = FlashInfer.of(release)
    if not flashinfer.has(NEEDS_FLASHINFER):
        return Gpu(
            f"{name}: trtllm_gen_routing needs FlashInfer {NEEDS_FLASHINFER} or newer, found "
            f"{release}"
        )
    devices = (*flashinfer.devices, HOPPER)
    if major not in devices:
        majors = ", ".join(f"{m}.x" for m in sorted(devices))
        return Gpu(f"{name}: compute capability {major}.{minor}, but routing kernels need {majors}")
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", "")
    return Gpu("", name, (major, minor), f"GPU-{uuid}" if uuid else "", _driver())


def _driver() -> str:
    """Return the driver's release, which torch does not report."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "unknown"
    text = ctypes.create_string_buffer(80)
    nvml.nvmlInit_v2()
    nvml.nvmlSystemGetDriverVersion(text, len(text))
    return text.value.decode() or "unknown"


def free_memory() -> int:
    """Free bytes on the device, when torch has given back what earlier tests left in its cache."""
    import torch

    free = int(torch.cuda.mem_get_info()[0])
    if free < MEMORY:
        torch.cuda.empty_cache()
        free = int(torch.cuda.mem_get_info()[0])
    return free


def memory_use() -> str:
    """Who holds the device's memory, in words."""
    import torch

    free, total = torch.cuda.mem_get_info()
    own = torch.cuda.memory_reserved()
    sizes = [f"{size / 2**30:.1f} GiB" for size in (free, total, own, total - free - own)]
    return "{} of {} are free, torch holds {} in this process, others hold {}".format(*sizes)


def synchronize() -> None:
    """Wait for the device; raises when anything that ran on it has failed."""
    import torch

    torch.cuda.synchronize()


@contextmanager
def poisoned() -> Iterator[None]:
    """Let memory that is allocated here and not written hold NaN, or the largest integer.

    FlashInfer allocates outputs, index maps and workspaces through torch; without this they would
    hold what an earlier call left there, which is often right.
    """
    import torch

    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # torch declares no types for it.
    mode: Any = torch.utils.deterministic
    filled = mode.fill_uninitialized_memory
    with warnings.catch_warnings():
        # The mode is used for what it fills; kernels may be as they are.
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        mode.fill_uninitialized_memory = True
        try:
            yield
        finally:
            mode.fill_uninitialized_memory = filled
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@contextmanager
def watchdog(stderr: int) -> Iterator[None]:
    """End this process unless done in `STUCK_AFTER`; its stacks go to the descriptor `stderr`."""
    faulthandler.dump_traceback_later(STUCK_AFTER, exit=True, file=stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def guarded(stderr: int) -> Iterator[None]:
    """Run one GPU test, see the module's description; last words go to the descriptor `stderr`.

    Raises:
        GpuMemoryError: Others hold the device's memory, and go on holding it.
    """
    # A kernel that hangs is launched in the test and waited for in `synchronize`: watch both.
    with watchdog(stderr):
        wait_for_memory()
        try:
            yield
        finally:
            try:
                synchronize()
            except Exception as error:
                # Nothing that this process asks of CUDA from here on would be answered.
                test = os.environ.get("PYTEST_CURRENT_TEST", "a test")
                os.write(stderr, f"moe-routing: {test}: device fault: {error}\n".encode())
                os._exit(1)


def wait_for_memory() -> None:
    """Wait until the device has `MEMORY` bytes free, for `PATIENCE` seconds at most.

    Raises:
        GpuMemoryError: It has not.
    """
    global _waited
    while free_memory() < MEMORY:
        if _waited >= PATIENCE:
            wanted = f"{MEMORY / 2**30:.1f} GiB of GPU memory"
            raise GpuMemoryError(f"waited {PATIENCE:.0f} s for {wanted}: {memory_use()}")
        time.sleep(1.0)
        _waited += 1.0
    _waited = 0.0


def explain(error: Exception) -> Exception:
    """Who holds the memory that an error lacks, as FlashInfer's do not say; others as they are."""
    if "out of memory" not in str(error).lower():
        return error
    return GpuMemoryError(f"out of GPU memory: {memory_use()}")
