"""Reads from a quantization method of vLLM whether a layer has the biases of its experts.

A method makes the parameters of a layer in `create_weights`, for each by its name. Its code is
read, and not run, as it makes tensors of classes that only a GPU needs. What follows the layer to
other functions is read as well. Code that might name a parameter in another way proves nothing.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.vllm.probe.release import names

#: The function of a method that makes a layer's parameters, and one that experts with biases have.
_MAKES_PARAMETERS, _BIAS = "create_weights", "w13_bias"
_NAMED = inspect.Parameter.POSITIONAL_OR_KEYWORD
#: What reads or removes an attribute of a layer.
_HARMLESS = ("isinstance", "hasattr", "getattr", "delattr")


class _UnreadableError(Exception):
    """Code that may do more with a layer than can be read from it."""


@cache
def gives_biases(method: type) -> bool:
    """Return whether a method gives a layer the biases of its experts.

    Cached, as a release does not change.

    Raises:
        Unsupported: It does not make the parameters of a layer where other methods do, or in a way
            that cannot be read.
    """
    where = f"{method.__name__} of vLLM {names().version}"
    unknown = "so it is not known whether a layer has biases"
    if not hasattr(method, _MAKES_PARAMETERS):
        raise Unsupported(f"not judged: {where} has no {_MAKES_PARAMETERS}, {unknown}")
    function = getattr(method, _MAKES_PARAMETERS)
    try:
        return _gives(method, function, _parameter(function, 1), ())
    except _UnreadableError as error:
        raise Unsupported(
            f"not judged: {_MAKES_PARAMETERS} of {where} {error}, {unknown}"
        ) from None


def _gives(method: type, function: Any, layer: str, callers: tuple[Any, ...]) -> bool:
    """Return whether a function gives the layer, which is one of its parameters, biases."""
    function = inspect.unwrap(function)
    if function in callers:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        raise _UnreadableError(f"calls {getattr(function, '__name__', 'code')}") from None
    if any(_names_bias(node) for node in ast.walk(tree)):
        return True
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    followed: list[tuple[Any, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == layer:
            followed += _followed(method, function, node, parents)
    seen = (*callers, function)
    return any(_gives(method, target, given, seen) for target, given in followed)


def _names_bias(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == _BIAS and isinstance(node.ctx, ast.Store)
    return isinstance(node, ast.Constant) and node.value == _BIAS


def _followed(
    method: type, function: Any, layer: ast.Name, parents: dict[ast.AST, ast.AST]
) -> Iterator[tuple[Any, str]]:
    """Yield each function that is given the layer, and the name of its parameter for it.

    Raises:
        _UnreadableError: The layer is used in a way that cannot be followed.
    """
    parent = parents[layer]
    above = parents[parent]
    if isinstance(parent, ast.Attribute):
        is_called = isinstance(above, ast.Call) and above.func is parent
        is_private = parent.attr.startswith("_")
        if is_private or (is_called and not _makes_named(above, parent.attr)):
            raise _UnreadableError(f"uses layer.{parent.attr}")
        return
    call = above if isinstance(parent, ast.keyword) else parent
    if not isinstance(call, ast.Call):
        raise _UnreadableError(f"has the layer in {ast.unparse(parent)[:60]!r}")
    called = ast.unparse(call.func)
    if called in _HARMLESS or (called == "setattr" and _is_text(call.args[1])):
        return
    target, is_bound = _called(method, function, call.func)
    if not isinstance(target, FunctionType):
        raise _UnreadableError(f"gives the layer to {called}")
    if isinstance(parent, ast.keyword) and parent.arg is not None:
        yield target, parent.arg
    elif parent is call:
        yield target, _parameter(target, call.args.index(layer) + is_bound)
    else:
        raise _UnreadableError(f"gives the layer to {called}")


def _parameter(function: Any, place: int) -> str:
    """Return the name of a parameter by its place."""
    parameters = [*inspect.signature(function).parameters.values()]
    is_named = place < len(parameters) and parameters[place].kind is _NAMED
    if not is_named:
        raise _UnreadableError(f"gives the layer to {function.__name__}")
    return parameters[place].name


def _makes_named(call: ast.AST, attribute: str) -> bool:
    """Whether a method of the layer that is called makes a parameter of a name that is read."""
    assert isinstance(call, ast.Call)
    return attribute == "register_parameter" and bool(call.args) and _is_text(call.args[0])


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _called(method: type, function: Any, called: ast.expr) -> tuple[Any, bool]:
    """Return the function that an expression means, and whether it is given `self` besides."""
    match called:
        case ast.Name(id=name):
            return function.__globals__.get(name), False
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            found = inspect.getattr_static(method, name, None)
            return getattr(found, "__func__", found), not isinstance(found, staticmethod)
        case ast.Attribute(value=ast.Call(func=ast.Name(id="super"), args=[]), attr=name):
            owner = function.__qualname__.rpartition(".")[0]
            owners = [cls.__qualname__ for cls in method.__mro__]
            rest = method.__mro__[owners.index(owner) + 1 :] if owner in owners else ()
            found = next((vars(c)[name] for c in rest if name in vars(c)), None)
            return found, True
    return None, False
