"""Finds wrong Mixture-of-Experts routing in seconds, most of it without a GPU.

The names of `__all__` are the public API; docs/api.md describes them. Each is loaded on first use:
importing this package, as every pytest start does through the plugin's entry point, costs nothing
and never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_moe_routing.compare import (
        PRECISIONS,
        Arithmetic,
        MoEComparison,
        Precision,
        RoutingComparison,
        admissible_routings,
        assert_moe,
        assert_routing,
        compare_moe,
        compare_routing,
    )
    from pytest_moe_routing.errors import MoERoutingError, Unsupported
    from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
    from pytest_moe_routing.logits import (
        PATTERNS,
        Pattern,
        RoutingCase,
        bell,
        case_names,
        loud,
        make_case,
    )
    from pytest_moe_routing.models import (
        ModelSpec,
        RouterConfig,
        dump_model,
        load_model,
        load_models,
        read_config,
    )
    from pytest_moe_routing.oracle import Target, judge
    from pytest_moe_routing.reference.moe import MoELayer, moe
    from pytest_moe_routing.reference.problem import MoEProblem
    from pytest_moe_routing.reference.quantization import Quantized, dequantize, quantize
    from pytest_moe_routing.reference.routing import Routing, route
    from pytest_moe_routing.reference.shard import Shard
    from pytest_moe_routing.reference.weights import Expert, GeneratedExperts, SafetensorsExperts
    from pytest_moe_routing.routing import Recipe, RoutingMethodType, recipe_of
    from pytest_moe_routing.targets import load_target
    from pytest_moe_routing.targets.builtin.classify import classify, get_routing_method_type

    __version__: str

__all__ = [
    "PATTERNS",
    "PRECISIONS",
    "Arithmetic",
    "Expert",
    "FlashInfer",
    "GeneratedExperts",
    "KernelCall",
    "MoEComparison",
    "MoELayer",
    "MoEProblem",
    "MoERoutingError",
    "ModelSpec",
    "Pattern",
    "Precision",
    "Quantized",
    "Recipe",
    "RouterConfig",
    "Routing",
    "RoutingCase",
    "RoutingComparison",
    "RoutingMethodType",
    "SafetensorsExperts",
    "Shard",
    "Target",
    "Unsupported",
    "__version__",
    "admissible_routings",
    "assert_moe",
    "assert_routing",
    "bell",
    "case_names",
    "classify",
    "compare_moe",
    "compare_routing",
    "dequantize",
    "dump_model",
    "get_routing_method_type",
    "judge",
    "load_model",
    "load_models",
    "load_target",
    "loud",
    "make_case",
    "moe",
    "quantize",
    "read_config",
    "recipe_of",
    "route",
]

#: Where each name is defined. A test compares this table with the imports above.
_WHERE = {
    "compare": (
        "PRECISIONS",
        "Arithmetic",
        "MoEComparison",
        "Precision",
        "RoutingComparison",
        "admissible_routings",
        "assert_moe",
        "assert_routing",
        "compare_moe",
        "compare_routing",
    ),
    "errors": ("MoERoutingError", "Unsupported"),
    "flashinfer": ("FlashInfer", "KernelCall"),
    "logits": ("PATTERNS", "Pattern", "RoutingCase", "bell", "case_names", "loud", "make_case"),
    "models": (
        "ModelSpec",
        "RouterConfig",
        "dump_model",
        "load_model",
        "load_models",
        "read_config",
    ),
    "oracle": ("Target", "judge"),
    "reference.moe": ("MoELayer", "moe"),
    "reference.problem": ("MoEProblem",),
    "reference.quantization": ("Quantized", "dequantize", "quantize"),
    "reference.routing": ("Routing", "route"),
    "reference.shard": ("Shard",),
    "reference.weights": ("Expert", "GeneratedExperts", "SafetensorsExperts"),
    "routing": ("Recipe", "RoutingMethodType", "recipe_of"),
    "targets": ("load_target",),
    "targets.builtin.classify": ("classify", "get_routing_method_type"),
}

if not TYPE_CHECKING:

    def __getattr__(name):
        """Import a public name from the module that defines it."""
        if name == "__version__":
            from importlib.metadata import version

            return version("pytest-moe-routing")
        from importlib import import_module

        for module, names in _WHERE.items():
            if name in names:
                return getattr(import_module(f"{__name__}.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
