"""Runs the routing kernels of one library, and compares them with the models' routers.

It is run by `targets.server` with the argument NAME or NAME@PATH, as `--moe-kernels` has it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from pytest_moe_routing.compare import compare_routing
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.kernels import gpu
from pytest_moe_routing.kernels.routers import RouterCall, RouterKernels, load_kernels
from pytest_moe_routing.logits import make_case
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.targets.server import serve

#: On both sides of a warp, of a block and of the kernels' own switches.
TOKENS = (1, 7, 64, 515)


class Comparisons:
    """Answers about the kernels of one adapter, which is loaded by the first question."""

    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def _kernels(self) -> RouterKernels:
        gpu.share_cores()
        return load_kernels(self._name)

    def environment(self) -> dict[str, Any]:
        """Describe the GPU and the library.

        Raises:
            Unsupported: There is no GPU, or the library does not load here.
        """
        return self._kernels.environment()

    def compare(
        self, router: Mapping[str, Any], pattern: str, logits_dtype: str
    ) -> dict[str, list[str]]:
        """Run every call for a router on one logits pattern.

        Returns:
            The names of the `kernels` that ran, and the `problems` that were found.

        Raises:
            Unsupported: A kernel does not run here.
        """
        config = RouterConfig(**router)
        calls = list(self._kernels.calls(config))
        problems: list[str] = []
        for call in calls:
            try:
                dtype = getattr(torch, logits_dtype)
                problems += _problems(call, config, pattern, dtype, self._kernels.device)
            except Unsupported:
                raise
            except Exception as error:
                _end_after_a_fault(error, self._kernels.device)
                explained = gpu.explain(error)
                raise explained from (None if explained is error else error)
        return {"kernels": [call.kernel for call in calls], "problems": problems}


def _problems(
    call: RouterCall, router: RouterConfig, pattern: str, dtype: torch.dtype, device: str
) -> Iterator[str]:
    """Yield what is wrong with one call: its results, or those of a second call."""
    case = make_case(pattern, call.recipe, num_tokens=max(TOKENS), num_experts=router.num_experts)
    logits = case.logits.to(dtype)
    bias = None if case.bias is None else case.bias.to(device)
    for tokens in TOKENS:
        some = logits[:tokens]
        weights, ids = (x.cpu() for x in call.run(some.to(device), bias))
        found = compare_routing(
            ids, weights, some, call.recipe, case.bias, precision=call.precision, lower_index=False
        )
        where = f"{call.kernel}, {tokens} tokens"
        if not found.ok:
            yield f"{where}: {found.message()}"
            return
        again = [x.cpu() for x in call.run(some.to(device), bias)]
        if not (torch.equal(again[1], ids) and torch.equal(again[0], weights)):
            yield f"{where}: a second call gives different results"


def _end_after_a_fault(error: Exception, device: str) -> None:
    """End this process if the device has failed: no later call in it could be trusted."""
    if device != "cuda":
        return
    try:
        gpu.synchronize()
    except Exception:
        print(f"device fault: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def main() -> None:
    comparisons = Comparisons(sys.argv[1])
    serve({"environment": comparisons.environment, "compare": comparisons.compare})
