"""The architectures that a release of vLLM has code for, read from its registry."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.contract import Names

MODELS = "vllm.model_executor.models"


def registered(names: Names, tree: ast.Module) -> Mapping[str, tuple[str, str]]:
    """Return module and class of each architecture.

    Args:
        tree: The registry's module.

    Raises:
        Unsupported: No architecture can be read from it.
    """
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                module, *names_there = (
                    item.value if isinstance(item, ast.Constant) else None for item in value.elts
                )
                if isinstance(module, str):
                    full = module if "." in module else f"{MODELS}.{module}"
                    found[str(key.value)] = full, str(names_there[0]) if names_there else ""
    if not found:
        raise Unsupported(
            f"not judged: {names.spelling('registry').module} of vLLM {names.version} lists no "
            f"architecture in a form that the probe reads"
        )
    return found
