"""What the code of a model in one release of vLLM gives to its MoE layer, read from its source.

Only what no config says: who applies the scaling factor, and a routing function of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from pytest_moe_routing.targets.stubs import source_of

_MODELS = "vllm.model_executor.models"
_LAYERS = {"FusedMoE", "SharedFusedMoE", "FusedMoEFactory"}
_OURS = ("vllm.models.", f"{_MODELS}.")
_OTHER_DEVICES = {"amd", "cpu", "xpu"}
#: How far a model's code is followed through the modules that it imports.
_DEPTH = 3


@cache
def scales_output(root: str, architecture: str) -> bool:
    """Whether the factor is applied to the output of the layer, whose router then knows none.

    Either the layer is told so, or the model's own code does it and gives the layer no factor. An
    architecture that this release does not have is taken to leave it to the router.
    """
    found = _layer(root, architecture)
    return found is not None and _says_output(found.call, found.tree)


@cache
def routing_function(root: str, architecture: str) -> tuple[str, str] | None:
    """Module and name of the function that routes in the layer's stead, if the code gives one."""
    found = _layer(root, architecture)
    if found is None:
        return None
    given = {word.arg: word.value for word in found.call.keywords}.get("custom_routing_function")
    if given is None:
        return None
    name = ast.unparse(given)
    assigned = [
        node.value.id
        for node in ast.walk(found.tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Name)
        and ast.unparse(node.targets[0]) == name
    ]
    return found.module, assigned[0] if assigned else name


def has_architecture(root: str, architecture: str) -> bool:
    """Whether the release has code for an architecture."""
    return architecture in _registered(root)


@dataclass(frozen=True)
class _Layer:
    """Where a model's code makes its MoE layer."""

    module: str
    tree: ast.Module
    call: ast.Call


@cache
def _layer(root: str, architecture: str) -> _Layer | None:
    start = _registered(root).get(architecture)
    if start is None:
        return None
    for module, tree in _modules(root, start):
        for call in _calls(tree):
            if _name(call.func) in _LAYERS:
                return _Layer(module, tree, call)
    return None


@cache
def _registered(root: str) -> dict[str, str]:
    """Module by architecture, as vLLM's registry has them."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(source_of(root, f"{_MODELS}.registry"))):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                module = value.elts[0]
                if isinstance(module, ast.Constant) and isinstance(module.value, str):
                    name = module.value
                    found[str(key.value)] = name if "." in name else f"{_MODELS}.{name}"
    return found


def _modules(root: str, module: str) -> Iterator[tuple[str, ast.Module]]:
    """A module with its syntax tree, then those it leads to: its own package's first."""
    seen, level = {module}, [module]
    for _ in range(_DEPTH):
        further: list[str] = []
        for name in level:
            source = source_of(root, name)
            tree = ast.parse(source)
            yield name, tree
            package = name if source_of(root, f"{name}.__init__") else name.rpartition(".")[0]
            led = dict.fromkeys(m for m in _led_to(root, tree, package) if m not in seen)
            seen.update(led)
            further += led
        level = sorted(further, key=lambda m: not m.startswith(f"{module}."))


def _led_to(root: str, tree: ast.Module, package: str) -> Iterator[str]:
    """Modules of models that a module imports, or names by their architecture."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            above = package.split(".")
            above = above[: len(above) - (node.level - 1)] if node.level else []
            name = ".".join([*above, node.module])
            if name.startswith(_OURS) and not _OTHER_DEVICES & {*name.split(".")}:
                yield name
        elif isinstance(node, ast.Constant) and node.value in _registered(root):
            yield _registered(root)[str(node.value)]


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else ""


def _says_output(call: ast.Call, tree: ast.Module) -> bool:
    given = {word.arg: word.value for word in call.keywords}
    told = given.get("apply_routed_scale_to_output")
    if isinstance(told, ast.Name):
        # A parameter of the model's class: what its other code passes for it.
        passed = [w.value for c in _calls(tree) for w in c.keywords if w.arg == told.id]
        told = next((value for value in passed if not isinstance(value, ast.Name)), None)
    if told is not None:
        # Anything but a literal asks whether AITER is in use, which is for other GPUs.
        return bool(told.value) if isinstance(told, ast.Constant) else isinstance(told, ast.UnaryOp)
    factor = given.get("routed_scaling_factor")
    if isinstance(factor, ast.IfExp):
        factor = factor.body
    return factor is None or (isinstance(factor, ast.Constant) and factor.value == 1.0)
