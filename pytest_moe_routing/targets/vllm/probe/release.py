"""One release of vLLM, imported to be asked as if it ran on a Blackwell GPU.

FlashInfer is a recorder with the entry points of one release, so whether vLLM finds it good enough
is asked for real. A model is what `ModelSpec.as_dict` says; an opt-in switch that a scheme needs
counts as switched on.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from operator import attrgetter
from traceback import walk_stack
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer, preparation
from pytest_moe_routing.reference.layouts import swizzle_scales
from pytest_moe_routing.targets import compressed_tensors, marked, recorder, scales, stubs
from pytest_moe_routing.targets.contract import Contract, Names
from pytest_moe_routing.targets.vllm.probe.models import ModelSources, ScaledBy

# One release per process: vLLM's modules are global as well.
_names: Names | None = None
_sources: ModelSources | None = None
#: What comes of a call of FlashInfer; a caller may put another in its place for a while.
answer = recorder.reached


class _Capability(NamedTuple):
    """The compute capability of a GPU."""

    major: int
    minor: int

    def to_int(self) -> int:
        return self.major * 10 + self.minor


class _Blackwell:
    """The platform object on one of the Blackwell family; no to every other question.

    Attributes:
        capability: That of the GPU, of which `on_device` makes another for a while.
    """

    capability = _Capability(10, 0)
    device_name = "Blackwell"
    device_type = "cuda"
    dispatch_key = "CUDA"
    simple_compile_backend = "eager"

    def is_cuda(self) -> bool:
        return True

    # Triton's experts for FP8 ask the last one: a selector may prefer them.
    is_cuda_alike = supports_fp8 = is_cuda

    def is_device_capability_family(self, family: int, *_: Any) -> bool:
        return family // 10 == self.capability.major

    def is_device_capability(self, capability: Any, *_: Any) -> bool:
        return _pair(capability) == self.capability

    def has_device_capability(self, capability: Any, *_: Any) -> bool:
        return _pair(capability) <= self.capability

    def get_device_capability(self, *_: Any) -> _Capability:
        return self.capability

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def verify_quantization(self, _quant: str) -> None:
        """Accept every quantization, as vLLM's platform of CUDA does."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("is_", "has_", "supports_", "use_")):
            return lambda *_, **__: False
        raise AttributeError(name)


def _pair(capability: Any) -> tuple[int, int]:
    """Return a compute capability that is written as a pair, or as one number."""
    return capability if isinstance(capability, tuple) else divmod(capability, 10)


@contextmanager
def on_device(major: int, minor: int) -> Iterator[None]:
    """Have vLLM's code find a GPU of this compute capability for a while."""
    with patch.object(_Blackwell, "capability", _Capability(major, minor)):
        yield


def _fp8(x: Tensor, scale: Tensor | None = None, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    scales.note(scale)
    return x.to(torch.float8_e4m3fn), torch.ones(len(x), 1)


def _fp8_groups(
    x: Tensor, group_size: int, *_: Any, column_major_scales: bool = False, **__: Any
) -> tuple[Tensor, Tensor]:
    blocks = marked.block_scales(x, group_size)
    if column_major_scales:
        blocks = blocks.t().contiguous().t()
    return torch.ones_like(x, dtype=torch.float8_e4m3fn), blocks


def _fp4(
    x: Tensor, scale: Tensor, *_: Any, is_sf_swizzled_layout: bool = True, **__: Any
) -> tuple[Tensor, Tensor]:
    scales.note(scale)
    blocks = marked.block_scales(x, 16).to(torch.float8_e4m3fn).view(torch.uint8)
    if is_sf_swizzled_layout:
        blocks = swizzle_scales(blocks)
    return marked.ones_e2m1(*x.shape), blocks


def _mxfp8(
    x: Tensor, is_sf_swizzled_layout: bool = False, alignment: int = 0, **_: Any
) -> tuple[Tensor, Tensor]:
    # Columns are padded with zeros to a multiple of `alignment`.
    x = nn.functional.pad(x, (0, -x.shape[-1] % alignment if alignment else 0))
    ones, scales = torch.ones_like(x, dtype=torch.float8_e4m3fn), marked.block_scales(x, 32)
    scales = marked.to_ue8m0(scales)
    return ones, swizzle_scales(scales) if is_sf_swizzled_layout else scales


#: Quantization of activations, which needs a GPU: right as to shape and dtype, and as to the values
#: of marked ones. By key of the contract.
_QUANTIZERS = {
    "quantizers-groups": _fp8_groups,
    "quantizers-mxfp8": _mxfp8,
    "quantizers.scaled_fp8_quant": _fp8,
    "quantizers.scaled_fp4_quant": _fp4,
}


def _register(op_name: str, op_func: Any, *_: Any, **__: Any) -> None:
    """Call a custom operator as the plain function that it is made of."""
    setattr(torch.ops.vllm, op_name, op_func)


class _PluggableLayer(nn.Module):
    """The base class of vLLM's layers, without its registry of replacements."""

    @classmethod
    def register(cls, *_: Any) -> Callable[[type], type]:
        return lambda decorated: decorated


#: What stub modules have under a name.
_STAND_INS = {
    **preparation.FUNCTIONS,
    **compressed_tensors.STAND_INS,
    # A build for CUDA contains them, in `vllm.third_party`.
    "has_triton_kernels": lambda: True,
    "PluggableLayer": _PluggableLayer,
}


def _gathered(extra_tensors: list[Tensor] | None, *given: Tensor) -> tuple[Any, ...]:
    """Return the tensors of both ranks, those besides in a list of their own if there are any."""
    found = tuple(marked.in_reverse(x) for x in given)
    return found if extra_tensors is None else (*found, [*map(marked.in_reverse, extra_tensors)])


class _Group:
    """The group of two ranks of expert parallelism, of which this is the second.

    The first has the tokens of this one in reverse, and adds nothing to the output.
    """

    world_size = 2
    device_communicator = SimpleNamespace(all2all_manager=SimpleNamespace(world_size=2))

    def dispatch(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[Tensor] | None = None,
    ) -> tuple[Any, ...]:
        return _gathered(extra_tensors, hidden_states, topk_weights, topk_ids)

    def dispatch_router_logits(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[Tensor] | None = None,
    ) -> tuple[Any, ...]:
        return _gathered(extra_tensors, hidden_states, router_logits)

    def allocate_combine_input(
        self, shape: Any, dtype: torch.dtype, device: Any, is_sequence_parallel: bool = False
    ) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def combine(self, hidden_states: Tensor, is_sequence_parallel: bool = False) -> Tensor:
        return hidden_states[len(hidden_states) // 2 :]

    def combine_into_output(
        self, hidden_states: Tensor, output: Tensor, is_sequence_parallel: bool = False
    ) -> None:
        output.copy_(self.combine(hidden_states))


class _Workspaces:
    """Memory for a kernel."""

    def get_simultaneous(self, *wanted: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype) for shape, dtype in wanted]


def install(root: str, flashinfer: FlashInfer, version: str) -> None:
    """Make `vllm` importable from `root`, on a platform and with a FlashInfer of our own."""
    global _names, _sources
    contract = Contract.of("vllm")
    definitions = stubs.definitions("vllm", root)
    _names = Names(contract, version, definitions, stubs.real_module)
    _sources = ModelSources(_names, root)
    os.environ.update({row.key.rpartition(".")[2]: "1" for row in contract.members("switches")})
    # Nothing is compiled here, and torch's compiler takes seconds to import.
    torch.compile = lambda f=None, *_, **__: f or (lambda g: g)  # type: ignore[assignment]
    torch.compiler.assume_constant_result = lambda f: f
    stubs.install(contract, root, _STAND_INS)
    recorder.install(flashinfer, lambda *call: answer(*call))
    for key, value in (
        ("current-platform", _Blackwell()),
        ("custom-operators", _register),
        ("ep-group", lambda: _Group()),
        ("workspaces", lambda: _Workspaces()),
        ("two-batches", lambda: False),
        ("pre-processed", lambda: False),
        *_QUANTIZERS.items(),
    ):
        if _names.is_there(key):
            spelling = _names.spelling(key)
            setattr(import_module(spelling.module), spelling.path, value)
    if _names.is_there("humming-priority"):
        # The package around the module that has it is a stub.
        spelling = _names.spelling("humming-priority")
        package = import_module(spelling.module.rpartition(".")[0])
        setattr(package, spelling.path, _names.get("humming-priority"))


def names() -> Names:
    """Return the contract's names in this release."""
    assert _names is not None
    return _names


def sources() -> ModelSources:
    """Return the code of this release's models."""
    assert _sources is not None
    return _sources


def accepted(function: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the arguments that a function asks for.

    Raises:
        Unsupported: It asks for one that is not among them.
    """
    known = _parameters(function)
    unknown = [
        p.name
        for p in known
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and p.name not in arguments
    ]
    if unknown:
        raise Unsupported(
            f"not judged: {function.__qualname__} of vLLM {names().version} asks for "
            f"{', '.join(unknown)}, which the probe does not know"
        )
    return {p.name: arguments[p.name] for p in known if p.name in arguments}


@cache
def _parameters(function: Any) -> tuple[inspect.Parameter, ...]:
    """Return the parameters of a function, cached: each gate is asked ten thousands of times."""
    return tuple(inspect.signature(function).parameters.values())


def vllm_path(file: str) -> str:
    """Return the path of a file of vLLM from the package on."""
    return f"vllm/{file.rpartition('/vllm/')[2]}"


def is_of_vllm(file: str) -> bool:
    """Return whether a file is of vLLM's code."""
    # This package has a folder of the same name.
    return "/vllm/" in file and "/pytest_moe_routing/" not in file


def lines(frames: Iterable[tuple[FrameType, int]]) -> list[tuple[str, int]]:
    """Return file and line of those frames that are of vLLM's code."""
    places = ((frame.f_code.co_filename, line) for frame, line in frames)
    return [(file, line) for file, line in places if is_of_vllm(file)]


def line_of_kernel(places: Sequence[tuple[str, int]]) -> str:
    """Return the line that calls FlashInfer, as `vllm/FILE:LINE`.

    Args:
        places: File and line of calls of vLLM's code, from the outermost on.
    """
    # Wrappers around FlashInfer's functions make every call.
    own = [place for place in places if "/vllm/utils/" not in place[0]] or places
    return f"{vllm_path(own[-1][0])}:{own[-1][1]}" if own else ""


def line_of_call() -> str:
    """Return the line that is calling FlashInfer now, as `line_of_kernel` does."""
    return line_of_kernel(lines(reversed([*walk_stack(sys._getframe())])))


def numbers() -> dict[str, int]:
    """Return the number of each routing method."""
    names().require("numbers")
    return {member.name: int(member) for member in names().get("methods")}


def architecture_of(model: Mapping[str, Any]) -> str:
    """Return the architecture whose code makes the model's MoE layer."""
    return sources().maker((model["architecture"], *model.get("architectures", ())))


def router_factor(model: Mapping[str, Any]) -> float:
    """Return the scaling factor of the layer's router: 1 when the output is scaled elsewhere."""
    factor: float = model["router"]["routed_scaling_factor"]
    return factor if scaled_by(model) == "router" else 1.0


def scaled_by(model: Mapping[str, Any]) -> ScaledBy:
    """Return who applies the model's scaling factor; the router one that is 1."""
    if model["router"]["routed_scaling_factor"] == 1.0:
        return "router"
    return sources().scaled_by(architecture_of(model))


def make_router(model: Mapping[str, Any]) -> Any:
    """Return what vLLM's factory makes of the arguments that the model's own code passes."""
    arguments = router_arguments(model)
    return names().get("router-factory")(**names().accepted("router-factory", arguments))


def router_arguments(model: Mapping[str, Any], bias: Tensor | None = None) -> dict[str, Any]:
    """Return what the model's own code says of its router, in the words of vLLM.

    Args:
        bias: The router's correction bias; zeros if the model has one and none is given.
    """
    router = model["router"]
    if bias is None and router["correction_bias"] is not None:
        bias = torch.zeros(router["num_experts"], dtype=getattr(torch, router["correction_bias"]))
    return {
        "top_k": router["top_k"],
        "global_num_experts": router["num_experts"],
        "renormalize": router["renormalize"],
        "use_grouped_topk": router["n_group"] is not None,
        "num_expert_group": router["n_group"],
        "topk_group": router["topk_group"],
        "scoring_func": router["scoring_func"],
        "routed_scaling_factor": router_factor(model),
        "e_score_correction_bias": bias,
        "custom_routing_function": routing_function_of(model),
        "eplb_state": None,
        **sources().groups(architecture_of(model)),
    }


def routing_function_of(model: Mapping[str, Any]) -> Any:
    """Return the routing function that the model's code gives to the layer, as a stub.

    The router recognizes the function itself, as an attribute of its module, and never runs it.
    """
    found = sources().routing_function(architecture_of(model))
    return found and attrgetter(found[1])(import_module(found[0]))
