"""What the code of a model in one release of vLLM gives to its MoE layer, read from its source.

Only what no config says: who applies the scaling factor, groups and activations that are constants,
and a routing function of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.syntax import parse
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.stubs import source_of
from pytest_moe_routing.targets.vllm.registry import MODELS, registered

_OURS = ("vllm.models.", f"{MODELS}.")
_OTHER_DEVICES = {"amd", "cpu", "xpu"}
#: Rows of the contract for what the code of a model calls to make its layer.
_LAYERS = ("layer-factory", "shared-layer")
#: Arguments of a layer that say which experts a token may choose from.
_GROUPS = ("use_grouped_topk", "num_expert_group", "topk_group")
#: Who applies the scaling factor: the router, in its weights; the layer, on its output; or the code
#: of the model, on what the layer returns.
ScaledBy = Literal["router", "layer", "model"]
#: How far a model's code is followed through the modules that it imports.
_DEPTH = 3


@dataclass(frozen=True)
class _Layer:
    """Where a model's code makes its MoE layer."""

    module: str
    tree: ast.Module
    call: ast.Call

    def argument(self, name: str) -> ast.expr | None:
        """Return a keyword argument of the call."""
        return next((word.value for word in self.call.keywords if word.arg == name), None)


#: Each of these methods reads whole modules, and is called for every layer and router.
_READ_ONCE = ("maker", "scaled_by", "stated", "passes_limit", "activation", "routing_function")


class ModelSources:
    """The code of one release's models, which is read and not run."""

    def __init__(self, names: Names, root: str) -> None:
        self._names, self._root = names, root
        self._layer, self._made = cache(self._find_layer), cache(self._find_made)
        self._tree = cache(lambda module: parse(source_of(root, module)))
        # Architectures share modules, and each of these reads one from end to end.
        self._calls, self._led = cache(self._find_calls), cache(self._find_led)
        for name in _READ_ONCE:
            setattr(self, name, cache(getattr(self, name)))

    def has_architecture(self, architecture: str) -> bool:
        """Return whether the release has code for an architecture."""
        return architecture in self._registered

    def maker(self, architectures: tuple[str, ...]) -> str:
        """Return the architecture whose code makes the MoE layer, else the first.

        The code of an outer architecture may leave its language model to the architecture that its
        text config names.

        Args:
            architectures: Every architecture that a model's config states, outer config first.
        """
        made = (name for name in architectures if self._made(name) is not None)
        return next(made, architectures[0])

    def scaled_by(self, architecture: str) -> ScaledBy:
        """Return who applies the scaling factor, as the model's code says.

        An architecture that this release does not have leaves it to the router.

        Raises:
            Unsupported: The code of the model does not show it.
        """
        layer = self._layer(architecture)
        if layer is None:
            return "router"
        told = layer.argument("apply_routed_scale_to_output")
        if isinstance(told, ast.Name):
            told = _passed(layer.tree, told.id)
            if told is None:
                raise self._unproven(layer, "whether the layer or its router applies the factor")
        if told is not None:
            if isinstance(told, ast.Constant):
                return "layer" if told.value else "router"
            if _asks_for_aiter(told) and isinstance(told, ast.UnaryOp):
                return "layer" if isinstance(told.op, ast.Not) else "router"
            raise self._unproven(layer, "whether the layer or its router applies the factor")
        factor = layer.argument("routed_scaling_factor")
        if isinstance(factor, ast.IfExp):
            if not _asks_for_aiter(factor.test):
                raise self._unproven(layer, "which scaling factor the layer is given")
            is_negated = isinstance(factor.test, ast.UnaryOp)
            factor = factor.body if is_negated else factor.orelse
        if factor is None or (isinstance(factor, ast.Constant) and factor.value == 1.0):
            return "model"
        return "router"

    def stated(self, architecture: str) -> frozenset[str] | None:
        """Return the names of the arguments that the model's code gives to its MoE layer.

        None if that is not known: the release does not have the architecture, or its code passes a
        mapping or positions.
        """
        layer = self._layer(architecture)
        if layer is None or layer.call.args:
            return None
        given = [word.arg for word in layer.call.keywords]
        return None if None in given else frozenset(filter(None, given))

    def passes_limit(self, architecture: str) -> bool:
        """Return whether the model's code gives its clamp limit to the MoE layer.

        An architecture that this release does not have is taken to do so.

        Raises:
            Unsupported: The code of the model does not show it.
        """
        layer = self._layer(architecture)
        if layer is None or layer.argument("swiglu_limit") is not None:
            return True
        if any(word.arg is None for word in layer.call.keywords):
            raise self._unproven(layer, "whether the layer is given the clamp limit")
        return False

    def activation(self, architecture: str) -> str | None:
        """Return the activation that the model's code states as a constant in all of its layers.

        None if it states none, or one that depends on the config.
        """
        made = self._made(architecture)
        if made is None:
            return None
        layers = (replace(made, call=call) for call in self._calls(made.module))
        stated = {_constant(layer.argument("activation")) for layer in layers}
        return stated.pop() if len(stated) == 1 else None

    def groups(self, architecture: str) -> dict[str, Any]:
        """Return the arguments of groups that the model's code states as constants, all or none.

        Some models without groups are made with one group of all experts.
        """
        layer = self._layer(architecture)
        given = {name: layer and layer.argument(name) for name in _GROUPS}
        stated = {n: value.value for n, value in given.items() if isinstance(value, ast.Constant)}
        return stated if len(stated) == len(given) else {}

    def routing_function(self, architecture: str) -> tuple[str, str] | None:
        """Return module and name of the function that routes in the layer's stead, if there is one.

        Raises:
            Unsupported: The code of the model does not show it.
        """
        layer = self._layer(architecture)
        given = None if layer is None else layer.argument("custom_routing_function")
        if layer is None or given is None:
            return None
        name = ast.unparse(given)
        assigned = [
            node.value.id
            for node in ast.walk(layer.tree)
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Name)
            and ast.unparse(node.targets[0]) == name
        ]
        return layer.module, assigned[0] if assigned else name

    def _unproven(self, layer: _Layer, question: str) -> Unsupported:
        where = f"{layer.module.replace('.', '/')}.py:{layer.call.lineno}"
        return Unsupported(
            f"not judged: {where} of vLLM {self._names.version} leaves open {question}"
        )

    def _find_layer(self, architecture: str) -> _Layer | None:
        """Return where an architecture's code makes its MoE layer; None if there is no such code.

        Raises:
            Unsupported: There is, and it makes no layer that the contract has.
        """
        if not self.has_architecture(architecture):
            return None
        layer = self._made(architecture)
        if layer is None:
            raise Unsupported(
                f"not judged: the code of {architecture} in vLLM {self._names.version} "
                f"({self._registered[architecture]}) makes no layer with "
                f"{' or '.join(sorted(self._factories))}, so it is not "
                "known what applies the scaling factor and what routes"
            )
        return layer

    def _find_made(self, architecture: str) -> _Layer | None:
        """Return where an architecture's code makes its MoE layer; None if it makes none."""
        start = self._registered.get(architecture)
        if start is None:
            return None
        for module, tree in self._modules(start):
            if calls := self._calls(module):
                return _Layer(module, tree, calls[0])
        return None

    def _find_calls(self, module: str) -> list[ast.Call]:
        """Return the calls that make a MoE layer."""
        text = source_of(self._root, module)
        if not any(name in text for name in self._factories):
            return []
        return [
            call
            for call in _calls(self._tree(module))
            if isinstance(call.func, ast.Name) and call.func.id in self._factories
        ]

    @cached_property
    def _factories(self) -> set[str]:
        return {self._names.spelling(key).path for key in _LAYERS if self._names.has(key)}

    @cached_property
    def _registered(self) -> dict[str, str]:
        """Module by architecture, as vLLM's registry has them.

        Raises:
            Unsupported: No architecture can be read from the registry.
        """
        tree = self._tree(self._names.spelling("registry").module)
        return {name: module for name, (module, _) in registered(self._names, tree).items()}

    def _modules(self, module: str) -> Iterator[tuple[str, ast.Module]]:
        """Yield a module with its syntax tree, then those it leads to: its own package's first."""
        seen, level = {module}, [module]
        for _ in range(_DEPTH):
            further: list[str] = []
            for name in level:
                tree = self._tree(name)
                yield name, tree
                led = dict.fromkeys(m for m in self._led(name) if m not in seen)
                seen.update(led)
                further += led
            level = sorted(further, key=lambda m: not m.startswith(f"{module}."))

    def _find_led(self, module: str) -> list[str]:
        """Return modules of models that a module imports, or names by their architecture."""
        is_package = source_of(self._root, f"{module}.__init__")
        return list(self._led_to(module, module if is_package else module.rpartition(".")[0]))

    def _led_to(self, module: str, package: str) -> Iterator[str]:
        for node in ast.walk(self._tree(module)):
            if isinstance(node, ast.ImportFrom) and node.module:
                above = package.split(".")
                above = above[: len(above) - (node.level - 1)] if node.level else []
                name = ".".join([*above, node.module])
                if name.startswith(_OURS) and not _OTHER_DEVICES & {*name.split(".")}:
                    yield name
            elif isinstance(node, ast.Constant) and node.value in self._registered:
                yield self._registered[str(node.value)]


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _passed(tree: ast.AST, parameter: str) -> ast.expr | None:
    """Return what other code passes for a parameter of a model's class, else its default."""
    passed = [w.value for c in _calls(tree) for w in c.keywords if w.arg == parameter]
    values = [value for value in passed if not isinstance(value, ast.Name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            named = [*node.posonlyargs, *node.args][::-1]
            defaults = [*zip(named, node.defaults[::-1], strict=False)]
            defaults += [
                (a, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True) if d
            ]
            values += [default for name, default in defaults if name.arg == parameter]
    return values[0] if values else None


def _constant(value: ast.expr | None) -> str | None:
    """Return a text that an argument is, or the value of a member of an enum; None for others."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    if isinstance(value, ast.Attribute) and value.attr.isupper():
        # Members of `MoEActivation` are named as their values.
        return value.attr.lower()
    return None


def _asks_for_aiter(test: ast.expr) -> bool:
    """Return whether an expression asks for AITER, which is for other GPUs and thus not in use."""
    return "aiter" in ast.unparse(test).lower()
