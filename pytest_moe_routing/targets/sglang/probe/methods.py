"""Reads whether the quantization methods of old releases use the routed scaling factor.

Before 0.5.6, which is the first release whose methods the probe runs, a layer of experts left the
factor to its method: as an argument of `apply`, or in `moe_runner_config`. A path through `apply`
that neither reads the factor nor hands it on loses it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pytest_moe_routing.oracle.routers import Deviation

_FACTOR, _CONFIG = "routed_scaling_factor", "moe_runner_config"
_METHODS = ("apply", "forward_cuda")
#: Words in the conditions, imports and classes of code for other devices than NVIDIA's.
_ELSEWHERE = re.compile(
    # Not those within other words, such as the input of an expert.
    r"((?<![a-z])|(?<=MoE))(cpu|amx|hip|aiter|npu|xpu|musa|hpu|ascend|dynamic_?quant)",
    re.IGNORECASE,
)
_SUBJECT = "models that leave the factor to their layer of experts"


def lost_factors(trees: Mapping[str, ast.Module]) -> Iterator[dict[str, Any]]:
    """Yield an answer of `oracle.routers.RouterRun` for each method that loses the factor.

    Args:
        trees: Modules of methods, by their paths.
    """
    for path, tree in trees.items():
        for node in tree.body:
            if not isinstance(node, ast.ClassDef) or _is_elsewhere(node.name):
                continue
            inner = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            keeps_config = any(f.name == "create_moe_runner" for f in inner)
            for function in inner:
                words = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
                if function.name in _METHODS and (keeps_config or _FACTOR in words):
                    yield from _runs(f"{node.name}.{function.name}", path, function)


def _runs(name: str, path: str, function: ast.FunctionDef) -> Iterator[dict[str, Any]]:
    """Yield a run with a deviation for each way to return without the factor."""
    lost = {node.lineno: node for node, is_used in _returns(function.body, False) if not is_used}
    for line, node in sorted(lost.items()):
        returned = "nothing" if node.value is None else ast.unparse(node.value).partition("(")[0]
        cause = f"the routed scaling factor is not used before {returned} is returned"
        deviation = Deviation("weights", "", f"{path}:{line} returns without it", cause)
        yield {
            "router": name,
            "function": name,
            "source": f"{path}:{line}",
            "way": "cuda",
            "subject": _SUBJECT,
            "reach": "opt-in",
            "called": [],
            "deviations": [asdict(deviation)],
        }


def _returns(body: list[ast.stmt], is_used: bool) -> Iterator[tuple[ast.Return, bool]]:
    """Yield every return that CUDA may reach, and whether the factor is used on the way."""
    for i, node in enumerate(body):
        rest = body[i + 1 :]
        if isinstance(node, ast.Return):
            yield node, is_used or _uses(node)
            return
        if isinstance(node, ast.Raise):
            return
        if isinstance(node, (ast.Import, ast.ImportFrom)) and _is_elsewhere(ast.unparse(node)):
            return
        if isinstance(node, ast.If):
            # A factor of None is no factor.
            is_used = is_used or any(_name(each) == _FACTOR for each in ast.walk(node.test))
            if not _is_elsewhere(ast.unparse(node.test)):
                yield from _returns([*node.body, *rest], is_used)
            yield from _returns([*node.orelse, *rest], is_used)
            return
        if isinstance(node, ast.With):
            yield from _returns([*node.body, *rest], is_used)
            return
        is_used = is_used or _uses(node)


def _uses(node: ast.stmt) -> bool:
    """Whether a statement reads the factor, or hands on the layer or the config that has it."""
    inner = [*ast.walk(node)]
    part_of = {id(n.value) for n in inner if isinstance(n, ast.Attribute)}
    for each in inner:
        if _name(each) == _FACTOR:
            return True
        if _name(each) == _CONFIG and id(each) not in part_of:
            return True
        if isinstance(each, ast.Call):
            handed = {_name(a) for a in (*each.args, *(k.value for k in each.keywords))}
            if isinstance(each.func, ast.Attribute):
                handed.add(_name(each.func.value))
            if _name(each.func) == "run" or "layer" in handed:
                return True
    return False


def _name(node: ast.AST) -> str:
    """Return the last part of a name that is read; "" for another expression."""
    if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
        return node.id if isinstance(node, ast.Name) else node.attr
    return ""


def _is_elsewhere(text: str) -> bool:
    return _ELSEWHERE.search(text) is not None
