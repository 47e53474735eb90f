"""What SGLang's routers find on a CPU: the Triton runner, and kernels that run in torch."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang import kernels
from pytest_moe_routing.targets.sglang.probe import ways
from pytest_moe_routing.targets.sglang.probe.requests import requested
from pytest_moe_routing.targets.sglang.probe.router_case import function_of
from pytest_moe_routing.targets.sglang.probe.triton_gate import gate
from pytest_moe_routing.targets.sglang.probe.world import choose_runner


def choose_triton(names: Names) -> None:
    """SGLang's own routing on CUDA, with the Triton runner, and nothing else."""
    choose_runner(names.get("router-runner.TRITON").value)


def _stand_ins() -> dict[str, Any]:
    """Return replacements of SGLang's own functions around its routers, by key of the contract."""
    return {
        "router-placement.topk_ids_logical_to_physical": ways.located,
        "router-placement.transform_select_experts_inputs": (
            lambda router_logits, correction_bias, **_: (router_logits, correction_bias)
        ),
        "router-capturer": lambda: requested("capturer"),
        "router-context": lambda: False,
    }


def with_kernels(names: Names, root: str) -> ModuleType:
    """Return the module of TopK, which the world has changed, with kernels that a CPU runs."""
    for module, members in kernels.in_torch().items():
        vars(import_module(module)).update(members)
    if names.has("router-kernels-hash"):
        table = names.spelling("router-kernels-hash")
        setattr(import_module(table.module), table.path, kernels.hash_topk)
    own = names.spelling("router-kernels-gate")
    setattr(import_module(own.module), own.path, gate(root, own.module, own.path))
    for key, value in _stand_ins().items():
        spelling = names.spelling(key)
        setattr(import_module(spelling.module), spelling.path, value)
    fast = names.spelling("router-fast-topk")
    for module in (fast.module, fast.module.rpartition(".")[0]):
        setattr(import_module(module), fast.path, function_of(root, fast.module, fast.path))
    return stubs.real_module(names.spelling("topk").module)
