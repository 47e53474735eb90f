"""Finds wrong Mixture-of-Experts routing in seconds, most of it without a GPU.

Names are loaded on first use: importing this package, as every pytest start does through the
plugin's entry point, costs nothing and never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "ModelSpec": "models",
    "RouterConfig": "models",
    "load_model": "models",
    "load_models": "models",
    "read_config": "models",
    "dump_model": "models",
    "Recipe": "routing",
    "RoutingMethodType": "routing",
    "classify": "targets.builtin.classify",
    "get_routing_method_type": "targets.builtin.classify",
    "recipe_of": "routing",
    "Routing": "reference.routing",
    "route": "reference.routing",
    "assert_routing": "compare",
    "assert_moe": "compare",
    "MoEProblem": "reference.problem",
    "moe": "reference.moe",
    "MoELayer": "reference.moe",
    "FlashInfer": "flashinfer",
    "KernelCall": "flashinfer",
    "Target": "oracle",
    "judge": "oracle",
    "load_target": "targets",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
