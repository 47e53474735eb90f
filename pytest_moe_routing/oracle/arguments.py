"""The recorded arguments of a kernel call, against what the model and its shard need.

A record is plain JSON: an argument is None, a number, a list, or for a tensor a mapping with
`dtype`, `shape`, `contiguous`, `is` (which of the layer's tensors has its values, whatever the
dtype: `router logits`, `bias`) and `all` (the one value of a vector, float32 or zero).

What routes becomes a `KernelCall`, to be judged by its meaning. Everything else must be exactly
what the layer has, or is a problem in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

from pytest_moe_routing.flashinfer.grammar import KernelCall
from pytest_moe_routing.flashinfer.rules import FlashInfer
from pytest_moe_routing.flashinfer.signatures import enum
from pytest_moe_routing.models import ModelSpec

Arguments = Mapping[str, Any]

#: FlashInfer's names of each activation; all kinds of Swiglu are one kernel, told apart by its
#: parameters.
_ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "silu": ("Swiglu",),
    "swigluoai": ("Swiglu",),
    "gelu": ("Geglu", "GegluTanh"),
    "relu2": ("Relu2",),
    "swiglustep": ("SwigluStep",),
    "situ": ("Situ",),
}
#: What the gated kernels compute when they are given no parameters: (neutral, and of swigluoai).
_PARAMETERS: Mapping[str, tuple[float, float]] = {
    "gemm1_alpha": (1.0, 1.702),
    "gemm1_beta": (0.0, 1.0),
    "gemm1_clamp_limit": (float("inf"), 7.0),
}
#: Integers that no launcher does without.
_INTEGERS = (
    "num_experts",
    "top_k",
    "intermediate_size",
    "local_expert_offset",
    "local_num_experts",
    "routing_method_type",
)
_PRECISION = ("float32", "bfloat16")
#: What may be rounded on the way from a model to a kernel, in words.
ROUNDED: Mapping[str, str] = {
    "logits": "the float32 router logits are rounded to bfloat16 before the call",
    "gate": "the router logits are made in bfloat16, and widened to float32",
    "bias": "the float32 bias is rounded to bfloat16 before the call",
}


@dataclass(frozen=True)
class Layer:
    """What the recording layer had that no model says.

    Attributes:
        rank, shards: Its place in expert parallelism.
        intermediate_size: Of its experts.
        scale_after: What it multiplies the kernel's output by.
    """

    rank: int = 0
    shards: int = 1
    intermediate_size: int = 0
    scale_after: float = 1.0


@dataclass(frozen=True)
class Reading:
    """What a record comes to.

    Attributes:
        call: Its routing arguments; None when the launcher cannot take it.
        problems: What is wrong, in words.
        rounded: What is less precise than in the layer: keys of `ROUNDED`.
    """

    call: KernelCall | None
    problems: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()


def read(
    model: ModelSpec,
    scheme: str,
    function: str,
    arguments: Arguments,
    layer: Layer,
    flashinfer: FlashInfer,
) -> Reading:
    """Read the recorded arguments of one call, defaults of the entry point included."""
    missing = _missing(function, arguments)
    if missing:
        return Reading(None, missing)
    method = flashinfer.method(arguments["routing_method_type"])
    if method is None:
        number = arguments["routing_method_type"]
        text = f"routing_method_type {number} is no routing method of {flashinfer}"
        return Reading(None, (text,))
    call = KernelCall(
        scheme=scheme,
        method=method,
        num_experts=arguments["num_experts"],
        top_k=arguments["top_k"],
        logits_dtype=_dtype(arguments["routing_logits"]) or "none",
        n_group=arguments.get("n_group") or 0,
        topk_group=arguments.get("topk_group") or 0,
        bias=_bias(arguments.get("routing_bias")),
        bias_dtype=_dtype(arguments.get("routing_bias")) or "float32",
        routed_scaling_factor=_factor(arguments.get("routed_scaling_factor")),
        weight_on="input" if arguments.get("use_routing_scales_on_input") else "output",
        scale_after=layer.scale_after,
    )
    problems = (
        *_wrong_function(scheme, function, flashinfer),
        *_wrong_numbers(model, arguments, layer),
        *_wrong_tensors(arguments),
        *_wrong_memory(arguments),
        *_wrong_activation(model, arguments, flashinfer),
    )
    return Reading(call, problems, tuple(_rounded(model, call)))


def read_routed(
    model: ModelSpec,
    scheme: str,
    function: str,
    arguments: Arguments,
    layer: Layer,
    flashinfer: FlashInfer,
) -> tuple[str, ...]:
    """What is wrong, in words, with a call that is given experts and weights.

    The recorder knows them as `ids`, `weights` and `packed`, both in one int32.
    """
    missing = _missing(function, arguments)
    if missing:
        return missing
    given = arguments.get("topk_ids")
    parts = [part.get("is") for part in (given if isinstance(given, list) else [given]) if part]
    wrong = parts not in (["packed"], ["ids", "weights"])
    return (
        *_wrong_function(scheme, function, flashinfer, routed=True),
        *_wrong_numbers(model, arguments, layer),
        *([f"topk_ids are not the layer's experts and weights: {given}"] if wrong else ()),
        *_wrong_memory(arguments),
        *_wrong_activation(model, arguments, flashinfer),
    )


def _missing(function: str, arguments: Arguments) -> tuple[str, ...]:
    missing = [name for name in _INTEGERS if type(arguments.get(name)) is not int]
    if not missing:
        return ()
    named = ", ".join(f"{name}={arguments.get(name)!r}" for name in missing)
    return (f"{function} gets {named}: it needs integers there",)


def _dtype(tensor: Any) -> str | None:
    return None if tensor is None else str(tensor["dtype"])


def _factor(value: float | None) -> float:
    return 1.0 if value is None else float(value)


def _bias(tensor: Any) -> str:
    if tensor is None:
        return "none"
    # A tensor of other values is a problem of its own.
    return "zeros" if tensor.get("all") == 0 else "router"


def _wrong_function(
    scheme: str, function: str, flashinfer: FlashInfer, *, routed: bool = False
) -> Iterator[str]:
    entry = flashinfer.entry_point(scheme)
    if entry is None:
        return
    serves = entry.function.replace("_moe", "_routed_moe") if routed else entry.function
    if serves != function:
        yield f"{function} is called, {scheme} is served by {serves}"


def _wrong_numbers(model: ModelSpec, arguments: Arguments, layer: Layer) -> Iterator[str]:
    local = model.router.num_experts // layer.shards
    wanted = {
        "num_experts": model.router.num_experts,
        "top_k": model.router.top_k,
        "intermediate_size": layer.intermediate_size,
        "local_expert_offset": layer.rank * local,
        "local_num_experts": local,
    }
    for name, value in wanted.items():
        if arguments[name] != value:
            yield f"{name} arrives as {arguments[name]}, the layer has {value}"
    if arguments.get("norm_topk_prob") is False and model.router.renormalize:
        yield "norm_topk_prob arrives as False, the router renormalizes"


def _wrong_tensors(arguments: Arguments) -> Iterator[str]:
    logits = arguments["routing_logits"]
    if logits is None or logits.get("is") != "router logits":
        yield f"routing_logits are not the router's logits: {logits}"
    bias = arguments.get("routing_bias")
    if bias is not None and bias.get("is") != "bias" and bias.get("all") != 0:
        yield f"routing_bias is not the router's bias: {bias}"


def _wrong_memory(arguments: Arguments) -> Iterator[str]:
    for name, value in arguments.items():
        if isinstance(value, Mapping) and value.get("contiguous") is False:
            yield f"{name} is not contiguous, and the kernel reads it as if it were"


def _wrong_activation(
    model: ModelSpec, arguments: Arguments, flashinfer: FlashInfer
) -> Iterator[str]:
    experts = model.experts
    numbers = enum("ActivationType", flashinfer.release)
    names = _ACTIVATIONS[experts.activation]
    known = {number: name for name, number in numbers.items()}
    # Entry points without the argument have Swiglu kernels only.
    number = arguments.get("activation_type", numbers.get("Swiglu"))
    if known.get(number) not in names:
        yield f"activation_type arrives as {known.get(number, number)}, not {' or '.join(names)}"
    if names != ("Swiglu",):
        return
    for name, (neutral, swigluoai) in _PARAMETERS.items():
        wanted = swigluoai if experts.activation == "swigluoai" else neutral
        found = _each(arguments.get(name), neutral)
        if found is None or not isclose(found, wanted, rel_tol=1e-6):
            yield f"{name} arrives as {arguments.get(name)}, {experts.activation} has {wanted:g}"


def _each(value: Any, absent: float) -> float | None:
    """The value of a vector that has but one; None when it has several."""
    if value is None:
        return absent
    found = value.get("all")
    return None if found is None else float(found)


def _rounded(model: ModelSpec, call: KernelCall) -> Iterator[str]:
    router = model.router
    if (router.logits_dtype, call.logits_dtype) == _PRECISION:
        yield "logits"
    if call.bias == "router" and (router.correction_bias, call.bias_dtype) == _PRECISION:
        yield "bias"
