"""Reads SGLang's sources without running them: which class is a model's MoE block."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.syntax import parse
from pytest_moe_routing.targets.architectures import modules as list_modules
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.model_configs import served_as
from pytest_moe_routing.targets.sglang.probe.remade import WITHIN
from pytest_moe_routing.targets.sglang.probe.replaced import Told
from pytest_moe_routing.targets.stubs import source_of

_RUNNER = "flashinfer_trtllm"
#: The end of an alternative in an assertion on the quantization that no checkpoint here meets: see
#: `in_weights` in `configs.yaml`.
_UNMET = ".nvfp4_moe_meta is not None"
#: A module, and a name in it.
Place = tuple[str, str]


@dataclass(frozen=True)
class OfConfig:
    """An argument that the code which makes a block takes from the model's config.

    Attributes:
        text: The expression, which has no other name than the config's in it.
    """

    text: str

    def of(self, config: Any) -> Any:
        """Return its value."""
        return eval(self.text, {"config": config})


class Sources:
    """The sources of one release, in a directory or a wheel."""

    def __init__(self, names: Names, root: str) -> None:
        self.names, self.root = names, root
        self.source = lru_cache(maxsize=None)(lambda module: source_of(root, module))
        self.tree = lru_cache(maxsize=None)(lambda module: parse(self.source(module)))
        self.definitions = lru_cache(maxsize=None)(self._definitions)
        self._imports = lru_cache(maxsize=None)(self._imports_of)
        self.blocks = lru_cache(maxsize=None)(self._blocks)
        self.accepted_quantizations = lru_cache(maxsize=None)(self._accepted_quantizations)
        self._reached: dict[str, list[Place]] = {}

    @cached_property
    def package(self) -> str:
        """The package of models."""
        return self.names.spelling("models").module

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Every module of models.

        Raises:
            Unsupported: There is none.
        """
        found = tuple(list_modules(self.root, self.package))
        if not found:
            raise Unsupported(
                f"not judged: {self.package} of SGLang {self.names.version} has no modules"
            )
        return found

    def _definitions(self, module: str) -> Mapping[str, ast.stmt]:
        """Classes, functions and constants of a module, by name."""
        found: dict[str, ast.stmt] = {}
        for node in self.tree(module).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found[node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {t.id: node for t in targets if isinstance(t, ast.Name)}
        return found

    def _imports_of(self, module: str) -> Mapping[str, Place]:
        """Names that a module takes from other model modules: (module, name there or "")."""
        names: dict[str, Place] = {}
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.ImportFrom) and node.module in (self.package, *self.models):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    there = (full, "") if full in self.models else (node.module, alias.name)
                    names[alias.asname or alias.name] = there
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in self.models and alias.asname:
                        names[alias.asname] = (alias.name, "")
        return names

    def _used(self, module: str, node: ast.stmt, is_base: bool) -> Iterator[tuple[Place, ast.expr]]:
        """Definitions of model modules that a definition names, and where."""
        imports = self._imports(module)
        # What a parameter is when the caller says nothing: a derived class says it.
        defaults = set(_defaults(node)) if is_base else set()
        for expression in ast.walk(node):
            if id(expression) in defaults:
                continue
            there = None
            if isinstance(expression, ast.Name):
                there = imports.get(expression.id, (module, expression.id))
            elif isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
                within = imports.get(expression.value.id, ("", "?"))
                there = (within[0], expression.attr) if not within[1] else None
            if there is not None and there[1] in self.definitions(there[0]):
                assert isinstance(expression, ast.expr)
                yield there, expression

    def place(self, architecture: str) -> str:
        """Return the module of an architecture's class.

        Raises:
            Unsupported: This release has no such architecture.
        """
        start = f"class {served_as(architecture)}("
        found = next((module for module in self.models if start in self.source(module)), None)
        if found is None:
            raise Unsupported(f"this release has no {architecture}")
        return found

    def _blocks(self, architecture: str) -> list[tuple[str, str, dict[str, Any]]]:
        """Each class that makes an architecture's MoE layer: module, name, and arguments.

        The nearest comes first; the arguments are those that the code which makes it says outright,
        or takes from the config (`OfConfig`).

        Raises:
            Unsupported: This release has no such architecture, or it makes no MoE layer.
        """
        queue, found = [(self.place(architecture), served_as(architecture))], []
        arguments: dict[Place, dict[str, Any]] = {queue[0]: {}}
        bases: set[Place] = set()
        within: dict[str, Place] = {}
        while queue:
            module, name = queue.pop(0)
            node = self.definitions(module)[name]
            if self._makes_experts(node):
                found.append((module, name, arguments[module, name]))
            elif self.names.is_there("topk") and self._names_any(node, "topk"):
                within[WITHIN] = module, name
            calls = {id(n.func): n for n in ast.walk(node) if isinstance(n, ast.Call)}
            derived_from = set(map(id, node.bases)) if isinstance(node, ast.ClassDef) else set()
            for there, expression in self._used(module, node, (module, name) in bases):
                if there not in arguments:
                    queue.append(there)
                    arguments[there] = {}
                    if id(expression) in derived_from:
                        bases.add(there)
                arguments[there] |= _said(calls.get(id(expression)))
        if not found:
            raise Unsupported(f"the code of {architecture} makes no FusedMoE layer with TopK")
        self._reached[architecture] = [*arguments]
        return [(module, name, {**given, **within}) for module, name, given in found]

    def captures(self, architecture: str) -> bool:
        """Return whether an architecture's block may run otherwise while a CUDA graph is captured.

        Raises:
            Unsupported: This release has no such architecture, or it makes no MoE layer.
        """
        if not self.names.has("stand-ins.captured.get_is_capture_mode"):
            return False
        asks = self.names.spelling("stand-ins.captured.get_is_capture_mode").path
        return asks in self.source(self.blocks(architecture)[0][0])

    def overlaps(self, architecture: str) -> bool:
        """Return whether an architecture's decoder layer can run two batches that overlap.

        Raises:
            Unsupported: This release has no such architecture, or it makes no MoE layer.
        """
        if not self.names.has("router-overlap"):
            return False
        strategy = self.source(self.names.spelling("router-overlap").module)
        self.blocks(architecture)
        names = {name for _, name in self._reached[architecture] if "DecoderLayer" in name}
        return any(name in strategy for name in names)

    def _accepted_quantizations(self, runner: str = _RUNNER) -> list[str | None] | None:
        """Return the `quantization` values that the server allows with a runner.

        None for a release from the time before there was an assertion (before 0.5.6).

        Raises:
            Unsupported: The assertion is not where the contract expects it.
        """
        modules = self._server_modules()
        for module in modules:
            if runner not in self.source(module):
                continue
            for node in ast.walk(self.tree(module)):
                if isinstance(node, ast.If) and _asks_for_runner(node.test, runner):
                    for allowed in map(_allowed_quantizations, node.body):
                        if allowed is not None:
                            return allowed
        if self.names.expects("server-assertion"):
            raise Unsupported(
                f"not judged: {', '.join(modules[:1])} and its groups in SGLang "
                f"{self.names.version} assert nothing about the quantizations of {runner}"
            )
        return None

    def replaced_runner(self, told: Told) -> str:
        """Return which runner a server uses instead of the one that it was told, and where.

        "" if it uses that one, and for releases whose overrides of arguments can be run.

        Raises:
            Unsupported: See `Told.replacement`.
        """
        if self.names.expects("overrides-collect"):
            return ""
        for module in self._server_modules():
            found = told.replacement(self.tree(module).body)
            if found is not None:
                file = module.removeprefix("sglang.srt.").replace(".", "/")
                return f"{found[0]} ({file}.py:{found[1]})"
        return ""

    def server_defaults(self) -> dict[str, Any]:
        """Return the constants that the fields of a server's arguments have if they are not given.

        The lists of a server's choices are among them, by their own names.
        """
        found: dict[str, Any] = {}
        for module in self._server_modules():
            body = self.tree(module).body
            classes = [node.body for node in body if isinstance(node, ast.ClassDef)]
            for node in [*body, *(node for inner in classes for node in inner)]:
                if isinstance(node, ast.AnnAssign):
                    target: ast.expr = node.target
                elif isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
                    target = node.targets[0]
                else:
                    continue
                if isinstance(target, ast.Name) and node.value is not None:
                    with suppress(ValueError):
                        found[target.id] = ast.literal_eval(node.value)
        return found

    def _server_modules(self) -> list[str]:
        modules = [self.names.spelling("server-arguments").module]
        if self.names.has("server-argument-groups"):
            modules += list_modules(self.root, self.names.spelling("server-argument-groups").module)
        return modules

    def _makes_experts(self, node: ast.stmt) -> bool:
        """Return whether a class has both a choice of experts and SGLang's experts made."""
        return self._names_any(node, "topk", "chosen-experts") and (
            self._makes_layer(node) or self._names_any(node, "experts-function")
        )

    def _makes_layer(self, node: ast.stmt) -> bool:
        return self._names_any(node, "layer", "layer-class")

    def calls_experts(self, module: str, name: str) -> bool:
        """Return whether a block has no layer of experts: it calls them as a function."""
        return not self._makes_layer(self.definitions(module)[name])

    def chooses(self, module: str, name: str) -> bool:
        """Return whether a block makes no TopK: code of the model chooses the experts."""
        return not self._names_any(self.definitions(module)[name], "topk")

    def _names_any(self, node: ast.stmt, *keys: str) -> bool:
        """Return whether a class names what any of these rows of the contract have."""
        if not isinstance(node, ast.ClassDef):
            return False
        paths = {self.names.spelling(key).path for key in keys if self.names.has(key)}
        return any(isinstance(n, ast.Name) and n.id in paths for n in ast.walk(node))


def _defaults(node: ast.AST) -> Iterator[int]:
    """Ids of all that stands as a parameter's default, or after `parameter or`."""
    for inner in ast.walk(node):
        values: list[ast.expr | None] = []
        if isinstance(inner, ast.arguments):
            values = [*inner.defaults, *inner.kw_defaults]
        elif isinstance(inner, ast.BoolOp) and isinstance(inner.op, ast.Or):
            values = [*inner.values[1:]]
        for value in values:
            if value is not None:
                yield from map(id, ast.walk(value))


def _said(call: ast.Call | None) -> dict[str, Any]:
    """Keyword arguments of a call that are constants, or are taken from the config alone."""
    words = [] if call is None else [word for word in call.keywords if word.arg]
    constants = {w.arg: w.value.value for w in words if isinstance(w.value, ast.Constant)}
    taken = {w.arg: OfConfig(ast.unparse(w.value)) for w in words if _is_of_config(w.value)}
    return {str(name): value for name, value in {**constants, **taken}.items()}


def _is_of_config(value: ast.expr) -> bool:
    """Return whether an expression reads a config named `config`, and names nothing else."""
    names = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
    return "config" in names and names <= {"config", "getattr"} and not isinstance(value, ast.Name)


def _asks_for_runner(test: ast.expr, runner: str) -> bool:
    """Whether a condition is that the runner is this one, alone or among others."""
    if not isinstance(test, ast.Compare) or not ast.unparse(test.left).endswith(
        "moe_runner_backend"
    ):
        return False
    if not isinstance(test.ops[0], (ast.Eq, ast.In)):
        return False
    values = {n.value for n in ast.walk(test) if isinstance(n, ast.Constant)}
    return runner in values


def _allowed_quantizations(statement: ast.stmt) -> list[str | None] | None:
    """Return what an assertion on the quantization allows, in a list or one by one."""
    if not isinstance(statement, ast.Assert):
        return None
    test = statement.test
    allowed: list[str | None] = []
    for part in test.values if isinstance(test, ast.BoolOp) else [test]:
        if ast.unparse(part).endswith(_UNMET):
            continue
        if not isinstance(part, ast.Compare) or not ast.unparse(part.left).endswith("quantization"):
            return None
        if not isinstance(part.ops[0], (ast.Eq, ast.Is, ast.In)):
            return None
        (right,) = part.comparators[:1]
        choices = right.elts if isinstance(right, ast.List) else [right]
        allowed += [n.value for n in choices if isinstance(n, ast.Constant)]  # type: ignore[misc]
    return allowed
