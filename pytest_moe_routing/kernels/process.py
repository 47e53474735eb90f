"""The parent's side of the compiled routers: a child process, which is replaced when it ends.

A kernel that crashes, hangs or leaves the device unusable ends its child. The test that asked has
failed, and the next one asks a new child.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from pytest_moe_routing.errors import TargetError, Unsupported
from pytest_moe_routing.kernels import gpu
from pytest_moe_routing.kernels.routers import kernel_names
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.targets.probe import Probe


class Comparison(TypedDict):
    """The kernels that ran for a router, and what is wrong with their results."""

    kernels: list[str]
    problems: list[str]


_ANSWERS: Mapping[str, Any] = {"environment": dict[str, Any], "compare": Comparison}
#: What compilers and caches of kernels read. CUDA's own variables are passed to every child.
_SWITCHES = (
    *("CC", "CXX", "MAX_JOBS", "NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "TORCH_CUDA_ARCH_LIST"),
    *("FLASHINFER_CUDA_ARCH_LIST", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"),
)
#: Where kernels that are built are kept, in the user's home unless a variable says otherwise: a
#: child has a home of its own, which is removed with it.
_CACHES = {
    "FLASHINFER_WORKSPACE_BASE": "",
    "SGLANG_JIT_CACHE_DIR": ".cache/sglang/jit",
    "TRITON_CACHE_DIR": ".triton/cache",
    "TVM_FFI_CACHE_DIR": ".cache/tvm-ffi",
}
#: Children that are started; a library that ends so many ends the next one as well.
_CHILDREN = 3


class RouterProcess:
    """The compiled routers that `--moe-kernels` names."""

    def __init__(self, name: str) -> None:
        self.name = name
        #: How many children ended without an answer.
        self._ends = 0
        self._probe = self._start()

    def _start(self) -> Probe:
        caches = {
            variable: os.environ.get(variable) or str(Path.home() / folder)
            for variable, folder in _CACHES.items()
        }
        return Probe(
            self.name,
            "pytest_moe_routing.kernels.child",
            _absolute(self.name),
            answers=_ANSWERS,
            switches=_SWITCHES,
            variables=caches,
        )

    @cached_property
    def environment(self) -> dict[str, Any]:
        """The GPU and the library, for reports.

        Raises:
            Unsupported: There is no GPU, or the library does not load here.
            TargetError: The child ended.
        """
        environment: dict[str, Any] = self._ask("environment")
        return environment

    def compare(self, router: RouterConfig, pattern: str, logits_dtype: str) -> Comparison:
        """Run the kernels that the framework may call for a router, on one logits pattern.

        Raises:
            Unsupported: A kernel does not run here, or too many children ended.
            TargetError: A kernel raised, or the child ended: the message has its last words.
        """
        question = {"router": vars(router), "pattern": pattern, "logits_dtype": logits_dtype}
        comparison: Comparison = self._ask("compare", **question)
        return comparison

    def _ask(self, question: str, **arguments: Any) -> Any:
        if self._ends == _CHILDREN:
            raise Unsupported(
                f"not judged: the process of {self.name} ended {_CHILDREN} times, and will "
                "not be restarted"
            )
        try:
            return self._probe.ask(question, **arguments)
        except TargetError as error:
            if error.cause == "no answers":
                self._ends += 1
                self._probe = self._start()
            raise

    def close(self) -> None:
        """End the child."""
        self._probe.close()


def _absolute(name: str) -> str:
    """Return `NAME@PATH` with a path that a child finds, whose working directory is another."""
    registered, at, path = name.partition("@")
    return f"{registered}@{Path(path).expanduser().absolute()}" if at else name


def find(name: str) -> RouterProcess | str:
    """Start the routers of this name, or return why they are not judged here."""
    if name.partition("@")[0] not in kernel_names():
        return f"compiled routers need --moe-kernels {' or '.join(kernel_names())}"
    if not gpu.has_driver():
        return "no NVIDIA driver: libcuda.so.1 is not there"
    gpu.place_worker(os.environ, gpu.device_count())
    process = RouterProcess(name)
    try:
        _ = process.environment
    except (Unsupported, TargetError) as reason:
        process.close()
        return f"--moe-kernels {name}: not judged: {reason}"
    return process
