"""The recorded arguments of a kernel call, against what the model and its shard need.

A record is plain JSON: an argument is None, a number, a list, or for a tensor a mapping with
`dtype`, `shape`, `contiguous`, `is` (which of the layer's tensors has its values, whatever the
dtype: `router logits`, `bias`, `gemm1 scales`, `gemm1 bias`), `all` (the one value of a vector,
float32 or zero) and `each` (the values of a float32 vector for the first experts, if they repeat).

What routes becomes a `KernelCall`, to be judged by its meaning. Everything else must be exactly
what the layer has, or is a finding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from math import isclose
from typing import Any

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.flashinfer.grammar import KernelCall
from pytest_moe_routing.flashinfer.signatures import enum
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.models.spec import NEARLY
from pytest_moe_routing.oracle.calls import ACTIVATIONS, wrong_activation
from pytest_moe_routing.oracle.exact import kernel_gates
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.scales import Scales, wrong_input, wrong_parameters, wrong_scales
from pytest_moe_routing.oracle.target import Captured
from pytest_moe_routing.schemes import kernel_of

Arguments = Mapping[str, Any]

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
#: How far a product of bfloat16 may be off.
_PRODUCT = 2**-7
_COUNTS: Mapping[float, str] = {0: "nowhere", 1: "once", 2: "twice"}
_PARTS = ("routed", "shared")

#: Gates about what a kernel has no code for, see `kernel_gates`.
_OF_ACTIVATION = "activation", "activation limit"


@dataclass(frozen=True)
class RecordedLayer:
    """Layer properties that are not part of the model.

    Attributes:
        rank, shards: Its place in expert parallelism.
        intermediate_size: Of its experts.
        scale_after: The factor by which the layer multiplies the kernel's output; None if the
            layer's output is something else.
        shared: The same of the shared experts' output; None if it is not known.
        reduced: How often the output of routed and of shared experts was summed over ranks, if
            that is known.
        are_summed: How often it has to be.
        told_otherwise: Fields of the layer's config that gates are asked about with other values:
            name, their value, and the layer's.
        scales: The scales of whole tensors that its experts have, see `flashinfer/scales.yaml`, for
            the first experts; they repeat. None if no tensor of the layer can be recognized.
        fused: Shared experts that it has among the routed ones on purpose.
        misread: Of what does not arrive as the layer has it, the argument, what is
            right, and what is there instead.
    """

    rank: int = 0
    shards: int = 1
    intermediate_size: int = 0
    scale_after: float | None = 1.0
    shared: float | None = None
    reduced: tuple[int, ...] = ()
    are_summed: int = 0
    told_otherwise: tuple[tuple[str, str, str], ...] = ()
    scales: Scales | None = None
    fused: int = 0
    misread: tuple[str, ...] = ()


def read(
    model: ModelSpec,
    scheme: str,
    record: Mapping[str, Any],
    layer: RecordedLayer,
    flashinfer: FlashInfer,
) -> Captured:
    """Read a recorded call: its `function` and its `arguments`, defaults included."""
    function, arguments = record["function"], record["arguments"]
    missing = tuple(_missing(function, arguments))
    if missing:
        return Captured(None, missing)
    number = arguments["routing_method_type"]
    method = flashinfer.method(number)
    if method is None:
        return Captured(None, (Finding(Kind.ENUM, str(number), None, None, function),))
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
        scale_after=1.0 if layer.scale_after is None else layer.scale_after,
    )
    findings = (
        *_wrong_function(scheme, function, flashinfer),
        *_wrong_numbers(model, arguments, layer),
        *_wrong_tensors(arguments),
        *_wrong_memory(arguments),
        *_wrong_experts(model, scheme, record, layer, flashinfer),
        *_downcasts(model, call),
        *_wrong_output(layer),
        *(Finding(Kind.CONFIG, *told) for told in layer.told_otherwise),
        *((Finding(Kind.ARGUMENT, *layer.misread),) if layer.misread else ()),
    )
    return Captured(call, tuple(replace(finding, where=function) for finding in findings))


def read_routed(
    model: ModelSpec,
    scheme: str,
    record: Mapping[str, Any],
    layer: RecordedLayer,
    flashinfer: FlashInfer,
) -> tuple[Finding, ...]:
    """Return what is wrong with a recorded call that is given experts and weights.

    The recorder knows them as `ids`, `weights` and `packed`, both in one int32.
    """
    function, arguments = record["function"], record["arguments"]
    missing = tuple(_missing(function, arguments))
    if missing:
        return missing
    topk_ids = arguments.get("topk_ids")
    parts = topk_ids if isinstance(topk_ids, list) else [topk_ids]
    names = [part.get("is") for part in parts if part]
    wrong = [] if names in (["packed"], ["ids", "weights"]) else [_received("topk_ids", topk_ids)]
    findings = (
        *_wrong_function(scheme, function, flashinfer, routed=True),
        *_wrong_numbers(model, arguments, layer),
        *(Finding(Kind.ARGUMENT, "topk_ids", "the layer's ids and weights", got) for got in wrong),
        *_too_many(scheme, arguments, flashinfer),
        *_wrong_memory(arguments),
        *_wrong_experts(model, scheme, record, layer, flashinfer),
    )
    return tuple(replace(f, where=function) for f in findings if f.kind is not Kind.PRECISION)


def _too_many(scheme: str, arguments: Arguments, flashinfer: FlashInfer) -> Iterator[Finding]:
    """Yield that a launcher rejects the number of experts that a call is given."""
    sizes = arguments["num_experts"], arguments["top_k"]
    for v in flashinfer.size_violations(scheme, *sizes):
        yield Finding(Kind.LIMIT, v.field, v.required, v.found, fact=v.rule.fact)


def rounded_weights(
    scheme: str, record: Mapping[str, Any], flashinfer: FlashInfer
) -> Iterator[Finding]:
    """Yield that router weights are rounded to 16 bits, where the kernel takes them in float32.

    Args:
        record: A call that is given experts and weights; see `read_routed`.
    """
    entry, topk_ids = flashinfer.entry_point(scheme), record["arguments"].get("topk_ids")
    if entry is None or not entry.float32_weights or not flashinfer.has(entry.float32_weights):
        return
    parts = topk_ids if isinstance(topk_ids, list) else [topk_ids]
    names = {part.get("is"): part["dtype"] for part in parts if part and "dtype" in part}
    if "packed" in names or names.get("weights") == "bfloat16":
        yield Finding(Kind.DOWNCAST, "weights", "float32", "bfloat16", record["function"])


def _received(name: str, value: Any) -> str:
    """Show a value as the kernel receives it, shortened."""
    if isinstance(value, list):
        return " and ".join(_received(name, item) for item in value)
    if isinstance(value, Mapping) and "shape" in value:
        shape = "x".join(map(str, value["shape"]))
        return f"{value.get('is', 'another tensor')} ({value['dtype']}, {shape})"
    return str(value)


def misscaled(model: ModelSpec, router_factor: float, layer: RecordedLayer) -> Iterator[Finding]:
    """Yield what a layer does wrongly with the output of experts that are given weights.

    Args:
        router_factor: The scaling factor that the weights have already.
    """
    yield from _wrong_output(layer)
    factor = model.router.routed_scaling_factor
    if layer.scale_after is None:
        return
    total = layer.scale_after * router_factor
    if not isclose(total, factor, rel_tol=_PRODUCT):
        yield Finding(Kind.APPLIED, "routed_scaling_factor", "once", _times(total, factor))


def _wrong_output(layer: RecordedLayer) -> Iterator[Finding]:
    """Yield what a layer does wrongly with the output of its kernel and of its shared experts."""
    if layer.scale_after is None:
        got = "values that no factor explains"
        yield Finding(Kind.ARGUMENT, "the layer's output", "the output of its experts", got)
        return
    if layer.shared is not None and not isclose(layer.shared, 1.0, rel_tol=_PRODUCT):
        got = _COUNTS.get(round(layer.shared, 2), f"with a factor of {layer.shared:.6g}")
        yield Finding(Kind.ADDED, "the output of the shared experts", "once", got)
    for part, count in zip(_PARTS, layer.reduced, strict=False):
        if count != layer.are_summed and (part, layer.shared) != ("shared", 0.0):
            wanted, got = (_COUNTS.get(n, f"{n} times") for n in (layer.are_summed, count))
            yield Finding(Kind.ADDED, f"other ranks' output of the {part} experts", wanted, got)


def _times(product: float, factor: float) -> str:
    """Say how often a factor is in a product."""
    for count, text in _COUNTS.items():
        if isclose(product, factor**count, rel_tol=_PRODUCT):
            return text
    return f"with a factor of {product:.6g}"


def _missing(function: str, arguments: Arguments) -> Iterator[Finding]:
    for name in _INTEGERS:
        value = arguments.get(name)
        if type(value) is not int:
            yield Finding(Kind.ARGUMENT, name, "an integer", repr(value), function)


def _dtype(tensor: Any) -> str | None:
    return None if tensor is None else str(tensor["dtype"])


def _factor(value: float | None) -> float:
    return 1.0 if value is None else float(value)


def _bias(tensor: Any) -> str:
    if tensor is None:
        return "none"
    # A tensor of other values is a finding of its own.
    return "zeros" if tensor.get("all") == 0 else "router"


def _wrong_function(
    scheme: str, function: str, flashinfer: FlashInfer, *, routed: bool = False
) -> Iterator[Finding]:
    if flashinfer.entry_point(scheme) is None:
        return
    serves = kernel_of(scheme).function(routed)
    if serves != function:
        yield Finding(Kind.ARGUMENT, "function", serves, function)


def _wrong_numbers(
    model: ModelSpec, arguments: Arguments, layer: RecordedLayer
) -> Iterator[Finding]:
    local = model.router.num_experts // layer.shards + layer.fused
    wanted = {
        "num_experts": model.router.num_experts + layer.fused,
        "top_k": model.router.top_k + layer.fused,
        "intermediate_size": layer.intermediate_size,
        "local_expert_offset": layer.rank * local,
        "local_num_experts": local,
    }
    for name, value in wanted.items():
        if arguments[name] != value:
            yield Finding(Kind.ARGUMENT, name, value, arguments[name])
    if arguments.get("norm_topk_prob") is False and model.router.renormalize:
        yield Finding(Kind.ARGUMENT, "norm_topk_prob", True, False)


def _wrong_tensors(arguments: Arguments) -> Iterator[Finding]:
    logits = arguments["routing_logits"]
    if logits is None or logits.get("is") != "router logits":
        got = _received("routing_logits", logits)
        yield Finding(Kind.ARGUMENT, "routing_logits", "the router's logits", got)
    bias = arguments.get("routing_bias")
    if bias is not None and bias.get("is") != "bias" and bias.get("all") != 0:
        got = _received("routing_bias", bias)
        yield Finding(Kind.ARGUMENT, "routing_bias", "the router's bias", got)


def _wrong_memory(arguments: Arguments) -> Iterator[Finding]:
    for name, value in arguments.items():
        if isinstance(value, dict) and value.get("contiguous") is False:
            yield Finding(Kind.ARGUMENT, name, "contiguous", "not contiguous")


def _wrong_experts(
    model: ModelSpec,
    scheme: str,
    record: Mapping[str, Any],
    layer: RecordedLayer,
    flashinfer: FlashInfer,
) -> Iterator[Finding]:
    """Yield what is wrong with the activation, its parameters, scales and biases.

    If nothing is, the kernel may lack the activation that it is told, or a clamp of it.
    """
    arguments = record["arguments"]
    experts, kernel, scales = model.experts, kernel_of(scheme), layer.scales
    # Entry points without the argument have Swiglu kernels only.
    default = enum("ActivationType", flashinfer.release).get("Swiglu")
    number, activation = arguments.get("activation_type", default), experts.activation
    found = [*wrong_activation("activation_type", number, activation, ACTIVATIONS, flashinfer)]
    if ACTIVATIONS[activation] in (("Swiglu",), ("Situ",)):
        found += wrong_parameters(experts, kernel, arguments, scales or {})
    if scales is not None:
        found += wrong_scales(experts, kernel, arguments, scales)
        found += wrong_input(scheme, record, scales)
    yield from found
    if all(finding.kind is Kind.PRECISION for finding in found):
        computed = NEARLY.get(activation, activation) if found else activation
        told = replace(model, experts=replace(experts, activation=computed))
        for gate in kernel_gates(told, scheme, flashinfer):
            if not gate.ok and gate.name in _OF_ACTIVATION:
                yield Finding(Kind.LIMIT, gate.name, fact=gate.reason)


def _downcasts(model: ModelSpec, call: KernelCall) -> Iterator[Finding]:
    router = model.router
    if (router.logits_dtype, call.logits_dtype) == _PRECISION:
        yield Finding(Kind.DOWNCAST, "logits", *_PRECISION)
    if call.bias == "router" and (router.correction_bias, call.bias_dtype) == _PRECISION:
        yield Finding(Kind.DOWNCAST, "bias", *_PRECISION)


def differing(first: KernelCall, other: KernelCall) -> Iterator[Finding]:
    """Yield the arguments in which a call is not the first one."""
    for name in (f.name for f in fields(KernelCall)):
        wanted, got = getattr(first, name), getattr(other, name)
        if wanted != got:
            yield Finding(Kind.ARGUMENT, name, wanted, got)
