"""Replaces FlashInfer: has the entry points of one release, and records instead of computing.

A call with arguments that the release does not take is refused as Python would; any other one ends
in `Reached`, which carries the arguments up through the framework's code, or in an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, IntEnum
from importlib import import_module
from inspect import Parameter
from traceback import walk_stack
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.flashinfer import FlashInfer, preparation
from pytest_moe_routing.flashinfer.names import Names
from pytest_moe_routing.flashinfer.signatures import enum, functions
from pytest_moe_routing.reference.layouts import swizzle_scales
from pytest_moe_routing.targets import marked, scales
from pytest_moe_routing.targets.bits import have_same_bits
from pytest_moe_routing.targets.limits import DoesNotBind, limit
from pytest_moe_routing.targets.listed import Listed

#: Where frameworks look for what is recorded.
MODULES = (
    "flashinfer",
    "flashinfer.fused_moe",
    "flashinfer.fused_moe.core",
    "flashinfer.fp4_quantization",
    "flashinfer.tllm_enums",
    "flashinfer.cute_dsl.utils",
)
#: FlashInfer's names for what puts block scales into tiles.
_SWIZZLES = ("block_scale_interleave", "nvfp4_block_scale_interleave")
_ENUMS = ("ActivationType", "Fp8QuantizationType", "WeightLayout")


#: What follows the name of a class in that of its method that calls the kernel.
_RUN = ".run"
#: Their arguments for a buffer.
_BUFFERS = ("output", "moe_output")
#: Entry points that return a list, of which the first is the output.
_LISTS = ("trtllm_fp4", "trtllm_mxint4", "cutlass")


class Reached(BaseException):
    """A kernel has been called; not an `Exception`, so that no framework code catches it.

    Attributes:
        at: The line that called it, if the call returned; else the traceback shows it.
        output: What came of the kernel's output afterwards, in JSON.
    """

    def __init__(self, function: str, arguments: Mapping[str, Any], at: str = "") -> None:
        super().__init__(function)
        self.function, self.arguments, self.at = function, dict(arguments), at
        self.output: Mapping[str, Any] = {}


def reached(function: str, arguments: Mapping[str, Any]) -> Any:
    """End a call in `Reached`."""
    raise Reached(function, arguments)


def buffer_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the buffer into which an entry point is told to write, if it is told one."""
    given = (arguments.get(name) for name in _BUFFERS)
    return next((buffer for buffer in given if buffer is not None), None)


def returned(function: str, arguments: Mapping[str, Any], output: Tensor) -> Any:
    """Return an output as an entry point does, in the buffer that it is given if there is one."""
    into = buffer_of(arguments)
    if into is not None:
        into.copy_(output)
        output = into
    return [output] if function.startswith(_LISTS) else output


def install(
    flashinfer: FlashInfer, answer: Callable[[str, Mapping[str, Any]], Any] = reached
) -> None:
    """Give the stub modules of FlashInfer, already importable, what the release has.

    What the release lacks is no module and no attribute, as frameworks ask with `hasattr`; where
    its names are not listed, this holds for entry points alone.

    Args:
        answer: What comes of a call, given the entry point's name and all its arguments.
    """
    members: dict[str, Any] = {
        name: IntEnum(name, dict(numbers))
        for name in _ENUMS
        if (numbers := enum(name, flashinfer.release))
    }
    methods = {name: number for number, name in enumerate(flashinfer.methods)}
    members["RoutingMethodType"] = IntEnum("RoutingMethodType", methods)
    names = Names.of(flashinfer.release)
    listed = None if names is None else Listed(names)
    ours: dict[str, Callable[..., Any]] = dict.fromkeys(_SWIZZLES, swizzle_scales)
    ours["mxfp8_quantize"] = _mxfp8_quantize
    ours["convert_sf_to_mma_layout"] = preparation.convert_sf_to_mma_layout
    for name, function in ours.items():
        members[name] = function if listed is None else listed.checked(name, function)
    present = functions(flashinfer.release)
    for name in present:
        if f"{name}{_RUN}" in present:
            members[name] = _recorded_class(name, flashinfer, answer)
        elif not name.endswith(_RUN):
            members[name] = _recorded(name, flashinfer, answer)
    if listed is not None:
        limit("flashinfer", listed)
    for name in MODULES:
        if listed is not None and not listed.has_module(name):
            continue
        module = import_module(name)
        module.__class__ = _without(type(module))
        has = members if names is None else [each for each in members if names.has(name, each)]
        vars(module).update({each: members[each] for each in has})


def _mxfp8_quantize(x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Activations and their scales in the shape of FlashInfer's; marked ones keep their values."""
    width, is_tiled = preparation.mxfp8_scales(x, *args, **options)
    scales = marked.to_ue8m0(marked.block_scales(x.reshape(-1, x.shape[-1]), width))
    scales = swizzle_scales(scales) if is_tiled else scales.flatten()
    return torch.ones_like(x, dtype=torch.float8_e4m3fn), scales


def _without(base: type[ModuleType]) -> type[ModuleType]:
    class Recorder(base):  # type: ignore[valid-type, misc]
        def __getattr__(self, name: str) -> Any:
            if name.startswith("trtllm_") and "moe" in name:
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            return super().__getattr__(name)

    return Recorder


def _recorded(
    name: str, flashinfer: FlashInfer, answer: Callable[[str, Mapping[str, Any]], Any]
) -> Callable[..., Any]:
    signature = flashinfer.signature(name)
    assert signature is not None
    parameters = signature.parameters.values()
    is_plain = all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)
    defaults = {parameter.name: parameter.default for parameter in parameters}
    required = {name for name, default in defaults.items() if default is Parameter.empty}

    def record(*args: Any, **kwargs: Any) -> Any:
        if is_plain and not args and required <= kwargs.keys() <= defaults.keys():
            # As `bind` would do it, in a tenth of its time.
            return answer(name, {**defaults, **kwargs})
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise DoesNotBind(f"{name} of {flashinfer}: {error}") from None
        bound.apply_defaults()
        return answer(name, bound.arguments)

    record.__name__ = record.__qualname__ = name
    record.__signature__ = signature  # type: ignore[attr-defined]
    return record


class Made:
    """An object of FlashInfer's that calls a kernel later.

    Attributes:
        makers: Names of the functions that were running when it was made.
    """

    def __init__(self) -> None:
        self.makers = frozenset(frame.f_code.co_name for frame, _ in walk_stack(None))


def _recorded_class(
    name: str, flashinfer: FlashInfer, answer: Callable[[str, Mapping[str, Any]], Any]
) -> type:
    """Return a class whose method calls the kernel with the arguments of its constructor, too."""

    def only(_: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        return arguments

    made = _recorded(name, flashinfer, only)
    called = _recorded(f"{name}{_RUN}", flashinfer, only)

    class Recorded(Made):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            self._made = made(*args, **kwargs)
            vars(self).update(self._made)

        def run(self, *args: Any, **kwargs: Any) -> Any:
            return answer(f"{name}{_RUN}", {**self._made, **called(*args, **kwargs)})

    Recorded.__name__ = Recorded.__qualname__ = name
    return Recorded


def input_scale() -> dict[str, Any]:
    """Describe the scale that the input of a call was quantized with, as part of an answer."""
    given = scales.quantized_by
    return {"input_scale": plain(given[-1], {})} if given else {}


def factors_of(
    arguments: Mapping[str, Any], halves: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Describe what a call has of the scales of whole tensors, as part of an answer.

    Args:
        halves: The scales of gate and up rows of each expert, if they have two.
    """
    found = {name: plain(value, {}) for name, value in arguments.items() if "scalar" in name}
    first = {part: list(each[: len(scales.FIRST)]) for part, each in halves.items()}
    return {"factors": found, "halves": first, **input_scale()}


def plain(value: Any, named: Mapping[str, Tensor | None]) -> Any:
    """Describe an argument in JSON; see `oracle.arguments`.

    Args:
        named: The tensors that a kernel may be given, by the names that answers use.
    """
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return _tensor(value, named)
    if isinstance(value, (list, tuple)):
        return [plain(item, named) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return {"type": type(value).__name__}


def _tensor(value: Tensor, named: Mapping[str, Tensor | None]) -> dict[str, Any]:
    said: dict[str, Any] = {
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "contiguous": value.is_contiguous(),
    }
    for name, tensor in named.items():
        if tensor is not None and value.shape == tensor.shape and _is_same(value, tensor):
            said["is"] = name
    if value.ndim <= 1 and value.dtype == torch.float32 and value.numel():
        value = value.flatten()
        first = value[: len(scales.FIRST)]
        if bool((value == first[0]).all()):
            said["all"] = first[0].item()
        elif torch.equal(value[len(first) :], value[: -len(first)]):
            said["each"] = first.tolist()
    elif "is" not in said and value.ndim == 1 and not value.any():
        said["all"] = 0.0
    return said


def _is_same(value: Tensor, tensor: Tensor) -> bool:
    """Return whether a tensor has the values of another; of 8 bits, whether it has its bytes."""
    are_bytes = value.dtype.itemsize == 1, tensor.dtype.itemsize == 1
    if any(are_bytes):
        return all(are_bytes) and have_same_bits(value, tensor)
    return torch.equal(value, tensor.to(value.dtype))


def roles_of(
    arguments: Mapping[str, Any], sources: Mapping[str, Tensor]
) -> dict[str, list[str | None]]:
    """Return what the tensors of each argument are, known by their memory.

    Args:
        sources: The scales and biases of a layer, by what they are; see `flashinfer/given.yaml`.
    """
    places = {tensor.untyped_storage().data_ptr(): role for role, tensor in sources.items()}

    def role(value: Any) -> str | None:
        if not isinstance(value, Tensor):
            return None
        return places.get(value.untyped_storage().data_ptr())

    lists = {name: value for name, value in arguments.items() if isinstance(value, (list, tuple))}
    each = {name: [value] for name, value in arguments.items() if isinstance(value, Tensor)}
    found = {name: [role(item) for item in value] for name, value in (lists | each).items()}
    return {name: roles for name, roles in found.items() if name in lists or any(roles)}
