"""The kernel call that a caller would have to make, as plain data for people and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pytest_moe_routing.flashinfer import FlashInfer, KernelCall, signatures
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.models.spec import NEARLY
from pytest_moe_routing.oracle.finding import Finding, Kind, nearly
from pytest_moe_routing.schemes import kernel_of

#: FlashInfer's names of each activation that TRT-LLM's kernels have; all kinds of Swiglu are one
#: kernel, told apart by its parameters. Geglu is the approximation: all 57 kernels of it in
#: flashinfer-cubin 0.6.13 have the constants 0.044715 and sqrt(2 / pi), and so has `phi` in
#: trtllm/batched_gemm/KernelRunner.h of 0.7.2.post1.
ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "silu": ("Swiglu",),
    "swigluoai": ("Swiglu",),
    "gelu": (),
    "gelu_tanh": ("Geglu",),
    "relu2": ("Relu2",),
    "swiglustep": ("SwigluStep",),
    "situ": ("Situ",),
}
#: Those that CUTLASS' kernels have: `GLUAdaptor`s of GELU (erf) and of GELU_taylor (tanh) in
#: fused_moe/cutlass_backend/cutlass_fused_moe_kernels.cuh of 0.7.2.post1.
CUTLASS_ACTIVATIONS = {**ACTIVATIONS, "gelu": ("Geglu",), "gelu_tanh": ("GegluTanh",)}
#: Parameters of the gated kernels: the key of `ExpertsConfig`, and what the kernel computes with
#: if it is given none.
PARAMETERS: Mapping[str, tuple[str, float]] = {
    "gemm1_alpha": ("activation_alpha", 1.0),
    "gemm1_beta": ("activation_beta", 0.0),
    "gemm1_clamp_limit": ("activation_limit", float("inf")),
}


def wrong_activation(
    argument: str,
    number: Any,
    activation: str,
    kernels: Mapping[str, Sequence[str]],
    flashinfer: FlashInfer,
) -> Iterator[Finding]:
    """Yield that a kernel is told to compute another activation than the experts have.

    That is a note where the kernel has nothing nearer to it.

    Args:
        number: What `argument`, a member of `ActivationType`, arrives as.
        kernels: FlashInfer's names of each activation that the kernel has, as `ACTIVATIONS`.
    """
    numbers = signatures.enum("ActivationType", flashinfer.release)
    told = next((name for name, value in numbers.items() if value == number), str(number))
    names, other = kernels[activation], NEARLY.get(activation, activation)
    others = kernels.get(other, ())
    if told in names:
        return
    if told not in others:
        yield Finding(Kind.ARGUMENT, argument, " or ".join(names or others), told)
    elif numbers.keys() & {*names}:
        yield nearly(activation, other)
    else:
        slight = nearly(activation, other)
        fact = f"the kernel computes {other} for {activation}; {slight.fact}"
        yield replace(slight, kind=Kind.PRECISION, fact=fact)


def arguments_of(model: ModelSpec, call: KernelCall, flashinfer: FlashInfer) -> dict[str, Any]:
    """Return the entry point of a call, and the arguments that the model decides.

    The keys are `function`, `method`, `arguments` and, if the framework multiplies the kernel's
    output by a factor, `scale_after`. A tensor among the arguments is a mapping of
    its `dtype`, its `shape`, and its `value` if all of its elements are one number. What the
    checkpoint, the batch or the shard decides (weights, scales, hidden states, local experts) is
    left out.
    """
    function = kernel_of(call.scheme).function()
    taken = signatures.parameters(function, flashinfer.release) or ()
    names = {parameter.partition("=")[0] for parameter in taken}
    bias: dict[str, Any] = {"dtype": call.bias_dtype, "shape": [call.num_experts]}
    if call.bias == "zeros":
        bias["value"] = 0.0
    values = {
        "routing_method_type": flashinfer.number(call.method),
        "routing_logits": {"dtype": call.logits_dtype, "shape": ["num_tokens", call.num_experts]},
        "routing_bias": None if call.bias == "none" else bias,
        "num_experts": call.num_experts,
        "top_k": call.top_k,
        "n_group": call.n_group or None,
        "topk_group": call.topk_group or None,
        "routed_scaling_factor": call.routed_scaling_factor,
        "use_routing_scales_on_input": call.weight_on == "input",
        "intermediate_size": model.experts.intermediate_size,
        **_activation(model, call.scheme, flashinfer),
        **kernel_of(call.scheme).arguments,
    }
    arguments = {name: value for name, value in values.items() if name in names}
    later = {} if call.scale_after == 1.0 else {"scale_after": call.scale_after}
    return {"function": function, "method": call.method, "arguments": arguments, **later}


def _activation(model: ModelSpec, scheme: str, flashinfer: FlashInfer) -> dict[str, Any]:
    """Return the arguments about the activation and the biases of the experts.

    They are in the units of the accumulators: where a scalar dequantizes those, `divided_by` names
    the argument that holds it.
    """
    experts, spelling = model.experts, kernel_of(scheme).scalars
    numbers = signatures.enum("ActivationType", flashinfer.release)
    known = [numbers[name] for name in ACTIVATIONS[experts.activation] if name in numbers]
    found: dict[str, Any] = {"activation_type": known[0]} if known else {}

    def add(name: str, shape: list[object], scalar: str, value: float | None = None) -> None:
        found[name] = {"dtype": "float32", "shape": ["local_num_experts", *shape]}
        if value is not None:
            found[name]["value"] = value
        if spelling and scalar:
            found[name]["divided_by"] = scalar.format(spelling)

    gate, down = "output1_{}_gate_scalar", "output2_{}_scalar"
    for name, (key, neutral) in PARAMETERS.items():
        value = getattr(experts, key)
        if value is not None and value != neutral:
            add(name, [], "" if name == "gemm1_alpha" else gate, value)
    if experts.bias:
        add("gemm1_bias", [experts.intermediate_size * (2 if experts.gated else 1)], gate)
        add("gemm2_bias", [experts.latent_size or experts.hidden_size], down)
    return found
