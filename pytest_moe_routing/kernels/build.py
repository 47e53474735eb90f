"""Builds the kernels that a GPU test calls before the test runs, one build at a time on a machine.

FlashInfer compiles at the first call, for minutes and with every core. Its lock is one per module;
ours is one for all, so that workers that need several modules do not compile them all at once. A
build that failed is not tried again in this process: every test that needs it gets the same error.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.kernels.gpu import HOPPER, Gpu, watchdog
from pytest_moe_routing.kernels.hopper import PREBUILT

#: What builds and loads the kernels of a test marked `gpu(kernels=...)`: module and function.
BUILDERS = {
    "routing": ("flashinfer.fused_moe.trtllm_gen_routing", "get_trtllm_gen_routing_module"),
    "fused": ("flashinfer.fused_moe.core", "get_trtllm_moe_sm100_module"),
}
BUILDERS_ON_HOPPER = {"routing": ("pytest_moe_routing.kernels.hopper", "install_routing_module")}
#: Seconds that a worker waits for the builds of others: two builds as slow as the watchdog allows.
PATIENCE = 3600.0
#: Seconds between two words about what is waited for.
SAY_EVERY = 60.0


@cache
def warm_up(gpu: Gpu, kernels: str, stderr: int) -> None:
    """Build and load the kernels of that name, if no test of this process has yet.

    Never raises: a failure is the failure of the tests that call these kernels.
    """
    builders = BUILDERS_ON_HOPPER if gpu.capability[0] == HOPPER else BUILDERS
    if kernels not in builders:
        return
    where, name = builders[kernels]
    try:
        import_module(BUILDERS[kernels][0])  # takes seconds that no other worker need wait for
        module = import_module(where)
        build = getattr(module, name)
    except (ImportError, AttributeError):
        return  # another release's name: it is built by the first test, and by its lock
    try:
        with one_at_a_time(lock_path(), f"{where}.{name}", stderr), watchdog(stderr):
            build()
    except Exception as error:
        setattr(module, name, _raising(error))


def _raising(error: Exception) -> Callable[..., NoReturn]:
    def build(*_: Any, **__: Any) -> NoReturn:
        raise error.with_traceback(None)

    return build


def lock_path() -> Path:
    """One lock for each user of a machine. The system frees it when its holder ends."""
    return Path(tempfile.gettempdir()) / f"moe-routing-build-{os.getuid()}.lock"


@contextmanager
def one_at_a_time(path: Path, what: str, stderr: int) -> Iterator[None]:
    """Hold the lock at `path` while building `what`; say on `stderr` what is waited for.

    Raises:
        MoERoutingError: Others held it for `PATIENCE` seconds.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "this process")
    started = said = time.monotonic()
    with path.open("a+") as lock:
        while not _taken(lock.fileno()):
            now = time.monotonic()
            holder = f"{path}, held by {path.read_text() or 'another process'}"
            if now - started > PATIENCE:
                raise MoERoutingError(
                    f"waited {PATIENCE:.0f} s to build {what}: the build lock is {holder}"
                )
            if now - said > SAY_EVERY:
                said = now
                text = f"moe-routing: {worker} waits to build {what}: the build lock is {holder}\n"
                os.write(stderr, text.encode())
            time.sleep(0.2)
        lock.truncate(0)
        lock.write(f"{worker} (process {os.getpid()}), which builds {what}")
        lock.flush()
        if os.isatty(stderr):
            os.write(stderr, f"\nmoe-routing: building {what}, which takes minutes\n".encode())
        yield


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@cache
def software() -> dict[str, str]:
    """Versions and places of what the GPU tests of this process run, for the report."""
    packages = ("torch", "flashinfer-python", "flashinfer-cubin", "flashinfer-jit-cache")
    found = {package: _version(package) for package in packages}
    try:
        env, artifacts = import_module("flashinfer.jit.env"), import_module("flashinfer.artifacts")
    except ImportError:
        return found
    path = getattr(getattr(artifacts, "ArtifactPath", None), "TRTLLM_GEN_BMM", "unknown")
    return {
        **found,
        "cubins": f"{path} in {getattr(env, 'FLASHINFER_CUBIN_DIR', 'unknown')}",
        "kernels": os.environ.get(PREBUILT) or str(getattr(env, "FLASHINFER_JIT_DIR", "unknown")),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
