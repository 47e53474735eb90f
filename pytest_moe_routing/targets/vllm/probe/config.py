"""vLLM's configuration objects of one layer of a model, in one release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.reference.activation import ACTIVATIONS
from pytest_moe_routing.targets.vllm.probe.experts import MOE, ServedScheme
from pytest_moe_routing.targets.vllm.probe.release import accepted, config, real


def activation_name(model: Mapping[str, Any]) -> str:
    """What the model's code calls its activation."""
    name: str = model["experts"]["activation"]
    if not model["experts"]["gated"]:
        return f"{name}_no_mul"
    if name == "swigluoai" and not model["architecture"].startswith("GptOss"):
        # Only gpt-oss checkpoints interleave gate and up; vLLM names the others' layout apart.
        return "swigluoai_uninterleave"
    return name


def parallel_config(shards: int = 1) -> Any:
    """No parallelism, or the last rank of expert parallelism."""
    alone = config().FusedMoEParallelConfig.make_no_parallel()
    if shards == 1:
        return alone
    return replace(alone, ep_size=shards, ep_rank=shards - 1, use_ep=True)


def _activation_arguments(model: Mapping[str, Any]) -> dict[str, float]:
    """The activation's parameters, as far as the model's code gives them to the layer."""
    name = activation_name(model)
    if name == "situ":
        return {"activation_situ_beta": 1.25, "activation_situ_linear_beta": 2.75}
    if name == "swigluoai_uninterleave":
        row = ACTIVATIONS["swigluoai"]
        assert row.limit is not None
        return {"swiglu_alpha": row.alpha, "swiglu_beta": row.beta, "swiglu_limit": row.limit}
    return {}


def _activation(name: str) -> Any:
    """An activation as the release has it: a member of an enum, or before that its name."""
    try:
        module = real(f"{MOE}.activation")
    except Unsupported:
        return name
    try:
        return module.MoEActivation.from_str(name)
    except ValueError:
        raise Unsupported(f"this release has no activation {name}") from None


def moe_config(
    model: Mapping[str, Any],
    method: str,
    shards: int = 1,
    sizes: tuple[int, int] | None = None,
) -> Any:
    """The `FusedMoEConfig` of one layer of the model; `sizes` stand in for its real widths.

    Raises:
        Unsupported: The release does not know the activation.
    """
    activation = _activation(activation_name(model))
    router, widths = model["router"], model["experts"]
    hidden, intermediate = sizes or (
        widths["latent_size"] or widths["hidden_size"],
        widths["intermediate_size"],
    )
    cls = config().FusedMoEConfig
    arguments = {
        "num_experts": router["num_experts"],
        "experts_per_token": router["top_k"],
        "hidden_dim": hidden,
        "intermediate_size": intermediate,
        "intermediate_size_per_partition": intermediate,
        "num_local_experts": router["num_experts"] // shards,
        "num_logical_experts": router["num_experts"],
        "activation": activation,
        "is_act_and_mul": widths["gated"],
        "device": "cpu",
        "routing_method": config().RoutingMethodType[method],
        "moe_parallel_config": parallel_config(shards),
        "in_dtype": torch.bfloat16,
        "router_logits_dtype": getattr(torch, router["logits_dtype"]),
        "max_num_tokens": 8192,
        "max_capture_size": 512,
        **_activation_arguments(model),
    }
    return cls(**accepted(cls, arguments))


def quant_config(row: ServedScheme, experts: int, layer: Any) -> Any:
    """The `FusedMoEQuantConfig` of a layer, with scales that are all 1."""
    activations, weights, block = row.quantization
    one = torch.ones(())
    each = torch.ones(experts)
    arguments: dict[str, Any] = {
        "quant_dtype": getattr(torch, activations, activations) if activations else None,
        "weight_dtype": weights or None,
        "block_shape": list(block) if block else None,
    }
    if activations or weights:
        scale = each.bfloat16() if weights == "int4" else each
        arguments |= {"w1_scale": scale, "w2_scale": scale, "a1_scale": one, "a2_scale": one}
    if activations == "nvfp4":
        arguments |= {
            "a1_scale": None,
            "a2_scale": None,
            "g1_alphas": each,
            "g2_alphas": each,
            "a1_gscale": each,
            "a2_gscale": each,
        }
    if layer.activation.value.startswith("swigluoai"):
        act = ACTIVATIONS["swigluoai"]
        arguments |= {
            "gemm1_alpha": act.alpha,
            "gemm1_beta": act.beta,
            "gemm1_clamp_limit": act.limit,
        }
    make = config().FusedMoEQuantConfig.make
    return make(**accepted(make, arguments))


def chosen(oracle: str, backends: str) -> Any:
    """The member that stands for the TRT-LLM experts in the enum of one of vLLM's selectors."""
    return getattr(real(f"{MOE}.oracle.{oracle}"), backends).FLASHINFER_TRTLLM
