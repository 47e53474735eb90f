"""Calls FlashInfer's fused MoE entry points: from a problem to keyword arguments, to the result.

Everything is passed by name, as parameters were inserted in the middle of these functions several
times. Semantics: FlashInfer 0.7.2.post1, `flashinfer/fused_moe/core.py` and the notes on
`mPtrClampLimit` in the batched GEMM's interface, which its epilogues follow:

    y = scale_c * (clamp(linear, limit') + beta') * act(scale_gate * min(gate, limit'))
    limit' = limit / scale_gate,  beta' = beta / scale_gate
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer, KernelCall, signatures
from pytest_moe_routing.kernels.gpu import poisoned
from pytest_moe_routing.kernels.padding import pad_hidden
from pytest_moe_routing.kernels.weights import Prepared
from pytest_moe_routing.reference.activation import Activation
from pytest_moe_routing.reference.moe import static
from pytest_moe_routing.reference.problem import MoEProblem
from pytest_moe_routing.reference.quantization import WHOLE, Quantized
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.schemes import KernelSpec, kernel_of

#: Members of FlashInfer's `ActivationType`, by the names of `reference.activation`.
ACTIVATIONS = {
    "silu": "Swiglu",
    "swigluoai": "Swiglu",
    "swiglustep": "SwigluStep",
    "gelu_tanh": "Geglu",
    "relu2": "Relu2",
}
#: Scales lie token by token (`SfLayout.layout_linear`); from 0.7.0 on one is warned for not saying.
_LINEAR = {"hidden_states_scale_layout": 2}


@dataclass(frozen=True)
class Rows:
    """What a fused MoE computes before the sum over experts.

    Attributes:
        rows: bfloat16 `[num_tokens, top_k, hidden]`: each expert's output, 0 outside the shard.
        weights: Its router weights, `[num_tokens, top_k]`, in the dtype that they come in.
        local: bool `[num_tokens, top_k]`: whether the expert belongs to the shard.
    """

    rows: Tensor
    weights: Tensor
    local: Tensor


def fused_arguments(
    problem: MoEProblem,
    call: KernelCall,
    prepared: Prepared,
    flashinfer: FlashInfer,
    *,
    routed: bool = False,
    pair: bool = False,
    finalize: bool = True,
    replay: Tensor | None = None,
    shared: int = 0,
) -> dict[str, Any]:
    """Return the keyword arguments of an entry point, on the device of the weights. Pure torch.

    Args:
        problem: Hidden states, layer, logits and bias; its experts are those of `prepared`.
        call: The routing arguments.
        prepared: The weights of the problem's shard.
        flashinfer: The release whose entry point is called.
        routed: Give the problem's routing to the routed twin, in place of logits.
        pair: Give it as `(ids, weights)`, not packed.
        finalize: Whether the kernel sums over experts.
        replay: int16 `[num_tokens, top_k]`, for the ids that the kernel chooses.
        shared: How many of the last weights are those of fused shared experts.

    Raises:
        Unsupported: The release has no such entry point, or it takes no such argument.
    """
    kernel = kernel_of(problem.layer.scheme)
    function = kernel.function(routed)
    signature = flashinfer.signature(function)
    if signature is None:
        raise Unsupported(f"FlashInfer {flashinfer.release} has no {function}")
    if pair and not (kernel.pairs_since and flashinfer.has(kernel.pairs_since)):
        raise Unsupported(f"{function} of FlashInfer {flashinfer.release} accepts only packed ids")
    device = prepared.gate.device
    layer = problem.layer
    if layer.activation.name not in kernel.activations:
        raise Unsupported(f"{function} has no {layer.scheme} kernel for {layer.activation.name}")
    arguments = {
        **prepared.tensors,
        **kernel.arguments,
        **prepared.layout.arguments,
        **_scalars(problem, kernel, prepared),
        **_input(pad_hidden(problem.hidden, prepared.hidden_size), kernel, device),
        **_activation(layer.activation, problem, kernel, prepared, flashinfer),
        **asdict(prepared.shard),
        "num_experts": call.num_experts,
        "top_k": call.top_k,
        "n_group": call.n_group or None,
        "topk_group": call.topk_group or None,
        "intermediate_size": prepared.intermediate_size,
        "routed_scaling_factor": call.routed_scaling_factor,
        "routing_method_type": flashinfer.number(call.method),
        "do_finalize": finalize,
        "routing_replay_out": replay,
    }
    if shared:
        arguments["local_num_experts"] -= shared
        arguments["num_fused_shared_experts"] = shared
    if call.weight_on == "input" or "use_routing_scales_on_input" in signature.parameters:
        arguments["use_routing_scales_on_input"] = call.weight_on == "input"
    if routed:
        arguments |= {"topk_ids": packed_or_pair(problem.routing, device, pair)}
        arguments |= {"routing_bias": None}
    else:
        arguments |= _logits(problem, call, device)
    if kernel.input_scales and "hidden_states_scale_layout" in signature.parameters:
        arguments |= _LINEAR
    if (
        "activation_type" not in signature.parameters
        and ACTIVATIONS[layer.activation.name] == "Swiglu"
    ):
        # What an entry point without a choice computes.
        del arguments["activation_type"]
    return _fitted(arguments, signature, f"{function} of FlashInfer {flashinfer.release}")


def _fitted(arguments: dict[str, Any], signature: inspect.Signature, what: str) -> dict[str, Any]:
    """Return the arguments that must be given; None is left out where it is the default."""
    taken = signature.parameters
    unknown = [n for n, value in arguments.items() if value is not None and n not in taken]
    if unknown:
        raise Unsupported(f"{what} does not accept {', '.join(unknown)}")
    return {
        name: value
        for name, value in arguments.items()
        if name in taken and (value is not None or taken[name].default is inspect.Parameter.empty)
    }


def _logits(problem: MoEProblem, call: KernelCall, device: torch.device) -> dict[str, Any]:
    assert problem.logits is not None
    bias = problem.bias
    if call.bias == "zeros":
        bias = torch.zeros(call.num_experts)
    if call.bias == "none":
        bias = None
    return {
        "routing_logits": problem.logits.to(device, getattr(torch, call.logits_dtype)),
        "routing_bias": None if bias is None else bias.to(device, getattr(torch, call.bias_dtype)),
    }


def _input(hidden: Quantized, kernel: KernelSpec, device: torch.device) -> dict[str, Any]:
    """Hidden states, and their block scales."""
    found: dict[str, Any] = {"hidden_states": hidden.data.to(device), "hidden_states_scale": None}
    if kernel.input_scales:
        assert hidden.scales is not None
        scales = hidden.scales.to(device)
        scales = scales.T.contiguous() if kernel.input_scales == "block" else scales
        found["hidden_states_scale"] = scales.view(getattr(torch, kernel.scale_dtype))
    if kernel.token_argument:
        assert hidden.global_scale is not None
        found[kernel.token_argument] = hidden.global_scale.to(device).flatten()
    return found


def _scalars(problem: MoEProblem, kernel: KernelSpec, prepared: Prepared) -> dict[str, Any]:
    """Return the factors that dequantize accumulators, and biases in the accumulators' units."""
    bias1, bias2 = prepared.bias1, prepared.bias2
    if (bias1 is not None or bias2 is not None) and not kernel.biases:
        raise Unsupported(f"{kernel.function()} does not accept expert biases")
    gate, up, down = _units(problem, kernel, prepared)
    found: dict[str, Any] = {
        "gemm1_bias": None if bias1 is None else bias1 / gate.unsqueeze(1),
        "gemm2_bias": None if bias2 is None else bias2 / down.unsqueeze(1),
    }
    gated = problem.layer.activation.gated
    first = (up if gated else torch.ones_like(up)) / _static_scale(problem, prepared)
    for output, which, value in (
        ("output1", "scalar", first),
        ("output1", "gate_scalar", gate),
        ("output2", "scalar", down),
    ):
        spelt = f"{output}_{kernel.scalars or 'scale'}_{which}"
        found[spelt] = value if kernel.scalars else None
    return found


def _units(
    problem: MoEProblem, kernel: KernelSpec, prepared: Prepared
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the real value of 1 in the accumulators of gate, up rows and second GEMM."""
    if not kernel.scalars:
        one = torch.ones_like(prepared.gate)
        return one, one, one
    hidden = problem.hidden
    factor = hidden.scales if hidden.format.block == WHOLE else hidden.global_scale
    if factor is None or hidden.format.by_row:
        # Every scale reaches the kernel with its numbers.
        return prepared.gate, prepared.up, prepared.down * _static_scale(problem, prepared)
    x = factor.to(prepared.gate.device).flatten()[0]
    down = prepared.down * _static_scale(problem, prepared)
    return prepared.gate * x, prepared.up * x, down


def _static_scale(problem: MoEProblem, prepared: Prepared) -> Tensor:
    """Return the static scales of the intermediate; 1 where the kernel makes one for each token."""
    is_static = static(problem.layer.storage.intermediate, 1.0)
    return prepared.intermediate if is_static else torch.ones_like(prepared.intermediate)


def _activation(
    act: Activation,
    problem: MoEProblem,
    kernel: KernelSpec,
    prepared: Prepared,
    flashinfer: FlashInfer,
) -> dict[str, Any]:
    """Which activation, and its constants, in the units of the accumulators where they need be."""
    number = signatures.enum("ActivationType", flashinfer.release).get(
        ACTIVATIONS.get(act.name, "")
    )
    if number is None:
        raise Unsupported(f"FlashInfer {flashinfer.release} has no activation {act.name}")
    entry = flashinfer.entry_point(problem.layer.scheme)
    if act.limit is not None and entry is not None:
        since = entry.activation_limit.get(act.name)
        if since is None or not flashinfer.has(since):
            what = f"{kernel.function()} of FlashInfer {flashinfer.release}"
            raise Unsupported(f"{what} does not accept a clamp of {act.name}")
    if act.limit is not None and kernel.token_argument:
        raise Unsupported(
            f"the units of a clamp next to {kernel.token_argument} are not documented"
        )
    gate, _, _ = _units(problem, kernel, prepared)
    one = torch.ones_like(gate)
    return {
        "activation_type": number,
        "gemm1_alpha": None if act.alpha == 1 else act.alpha * one,
        "gemm1_beta": None if act.beta == 0 else act.beta / gate,
        "gemm1_clamp_limit": None if act.limit is None else act.limit / gate,
    }


def packed_or_pair(routing: Routing, device: torch.device, pair: bool) -> Any:
    """Return ids and bfloat16 weights as the routed twins take them: in one int32 or in two."""
    ids = routing.topk_ids.to(device, torch.int32)
    weights = routing.topk_weights.to(device, torch.bfloat16)
    if pair:
        return ids, weights
    # Without a mask the sign of a negative weight would run into the id.
    return (ids << 16) | (weights.view(torch.int16).to(torch.int32) & 0xFFFF)


def launch_fused(
    fused_moe: Any,
    function: str,
    arguments: dict[str, Any],
    autotune: AbstractContextManager[Any] | None = None,
) -> list[Tensor]:
    """Call an entry point, wait for it, and return its tensors on the CPU."""
    poison = nullcontext() if getattr(fused_moe, "simulated", False) else poisoned()
    with autotune or nullcontext(), poison:
        result = getattr(fused_moe, function)(**arguments)
    tensors = list(result) if isinstance(result, (list, tuple)) else [result]
    if tensors[0].is_cuda:
        torch.cuda.synchronize(tensors[0].device)
    return [tensor.cpu() for tensor in tensors]


def rows_of(result: list[Tensor], num_tokens: int, top_k: int) -> Rows:
    """Arrange what a kernel returned with `do_finalize=False` by token and slot."""
    permuted, weights, place = result
    place = place.view(num_tokens, top_k).to(torch.int64)
    local = place >= 0
    rows = permuted[place.clamp_min(0)].masked_fill(~local.unsqueeze(-1), 0)
    return Rows(rows, weights.view(num_tokens, top_k), local)


def without_routing(problem: MoEProblem, routing: Routing) -> MoEProblem:
    """Return the problem of a routed twin, which is given the routing and not the logits."""
    return replace(problem, routing=routing, recipe=None, logits=None, bias=None)
