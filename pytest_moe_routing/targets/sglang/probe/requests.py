"""What a run of a block is requested to do besides routing, for as long as it is requested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Names

_Answer = TypeVar("_Answer")
#: How many tokens a block is given, which is requested by this name.
TOKENS = "tokens_of_block"
#: That the pass of a block is captured as a CUDA graph, which is requested by this name.
CAPTURED = "captured"
#: The dtype of experts in a checkpoint's files, which is requested by this name.
EXPERTS = "dtype_of_experts"
#: The intermediate size of experts, which is requested by this name.
INNER = "inner"
#: The compute capability of the GPU, which is requested by this name.
DEVICE = "device"
#: A function that prepares a layer, which is requested by this name.
PREPARES = "prepares"
#: SGLang's own `OWN`, which are requested by this name: the order of elements matters then.
MARKED = "marked"
#: The rows of the contract with their modules, by name.
OWN = {
    **dict.fromkeys(
        (
            "prepare_static_weights_for_trtllm_fp4_moe",
            "reorder_w1w3_to_w3w1",
            "replace_parameter",
            "swap_w13_to_w31",
            "swizzle_blockscale",
        ),
        "stand-ins.preparation",
    ),
    "alias_or_bind_derived_param": "stand-ins.derived",
    "per_tensor_dequantize": "stand-ins.scales",
}
#: What is told of each kernel that is called, which is requested by this name.
CALLERS = "callers"
#: That a server compiles models, which is requested by this name.
COMPILED = "enable_torch_compile"
#: What the server is asked for besides the runner, by the name of its option or stand-in.
_requested: dict[str, Any] = {}


@contextmanager
def requesting(**options: Any) -> Iterator[None]:
    """Have the server asked for more than the runner; see `around`."""
    _requested.update(options)
    try:
        yield
    finally:
        _requested.clear()


def with_tokens(run: Callable[..., _Answer], tokens: int, **question: Any) -> _Answer:
    """Run a question about a block that is given so many tokens.

    A pass with one token is captured as a CUDA graph, as servers decode by default.
    """
    with requesting(**{TOKENS: tokens, CAPTURED: tokens == 1}):
        return run(**question)


def requested(name: str) -> Any:
    """Return what the server is asked for under a name; None if it is asked for nothing."""
    return _requested.get(name)


def by_request(name: str, usual: Any, exact: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return a function that is exact where the order of weights is asked for."""

    def call(*args: Any, **options: Any) -> Any:
        own = requested(MARKED)
        function = (usual or stubs.Stub(name)) if own is None else own.get(name, exact)
        return function(*args, **options)

    return call


class Own:
    """SGLang's own functions that the probe replaces elsewhere, by name; they are imported late."""

    def __init__(self, names: Names) -> None:
        self._names = names

    def get(self, name: str, other: Any) -> Any:
        """Return one of them, or else another function."""
        if name not in OWN:
            return other
        module = module_apart(self._names.spelling(OWN[name]).module)
        return getattr(module, name, other)


# Each question would run it again.
@cache
def module_apart(name: str) -> ModuleType:
    """Return a module of SGLang that is run for real for who asks for it here."""
    return stubs.run_apart(name)
