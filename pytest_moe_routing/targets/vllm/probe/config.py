"""vLLM's configuration objects of one layer of a model, in one release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.oracle.swept_configs import UNTOLD
from pytest_moe_routing.targets.vllm.probe import release, server_defaults
from pytest_moe_routing.targets.vllm.probe.experts import ServedScheme
from pytest_moe_routing.targets.vllm.probe.ranks import Ranks
from pytest_moe_routing.targets.vllm.probe.release import (
    architecture_of,
    names,
    router_arguments,
    sources,
)

#: Arguments of a router that its layer adds.
_OF_THE_ROUTER = ("global_num_experts", "eplb_state")


class NoActivation(Unsupported):
    """The release does not know a model's activation."""


def activation_name(model: Mapping[str, Any]) -> str:
    """Return the name that the model's code has for its activation.

    Where its code states no name, that is the name of what its config has.
    """
    stated = sources().activation(architecture_of(model))
    if stated is not None:
        return stated
    name: str = model["experts"]["activation"]
    if not model["experts"]["gated"]:
        return f"{name}_no_mul"
    if name == "swigluoai" and not model["architecture"].startswith("GptOss"):
        # Only gpt-oss checkpoints interleave gate and up; vLLM names the others' layout apart.
        return "swigluoai_uninterleave"
    return name


def parallel_config(
    shards: int = 1,
    *,
    dispatched: bool = False,
    parts: int = 1,
    exchange: str = server_defaults.ALL_TO_ALL,
) -> Any:
    """No parallelism, the last rank of expert parallelism, or the second that splits experts.

    Args:
        parts: The ranks that have a part of each expert.
        dispatched: Each rank has tokens of its own, which an all-gather brings to the others.
        exchange: How tokens are exchanged otherwise.
    """
    server_defaults.check_parallel()
    alone = names().get("parallel-config.make_no_parallel")()
    if parts > 1:
        return replace(alone, tp_size=parts, tp_rank=Ranks(parts, split=True).rank)
    if shards == 1:
        return alone
    config = replace(alone, ep_size=shards, ep_rank=shards - 1, use_ep=True)
    if dispatched:
        own = {"dp_size": shards, "dp_rank": shards - 1}
        config = replace(config, **own, all2all_backend=exchange)
    return config


def _activation_arguments(model: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the activation's parameters, as far as the model's code gives them to the layer."""
    name, experts = activation_name(model), model["experts"]
    if name == "situ":
        return {
            "activation_situ_beta": experts["activation_alpha"],
            "activation_situ_linear_beta": experts["activation_beta"],
        }
    if name == "swigluoai_uninterleave":
        return {
            "swiglu_alpha": experts["activation_alpha"],
            "swiglu_beta": experts["activation_beta"],
            "swiglu_limit": experts["activation_limit"],
        }
    if experts["activation_limit"] and sources().passes_limit(architecture_of(model)):
        return {"swiglu_limit": experts["activation_limit"]}
    return {}


def _activation(name: str) -> Any:
    """Return an activation as the release has it: a member of an enum, or before that its name."""
    if not names().has("activation"):
        return name
    try:
        return names().get("activation.from_str")(name)
    except ValueError:
        raise NoActivation(f"this release has no activation {name}") from None


def told_dtype(model: Mapping[str, Any]) -> torch.dtype | None:
    """Return the dtype of the logits that the model's code tells the layer; None if none."""
    name = model["router"]["logits_dtype"]
    return None if name == UNTOLD else getattr(torch, name)


def moe_config(
    model: Mapping[str, Any],
    method: str,
    shards: int = 1,
    sizes: tuple[int, int] | None = None,
    *,
    dispatched: bool = False,
    parts: int = 1,
) -> Any:
    """Make the `FusedMoEConfig` of one layer of the model; `sizes` replace its real widths.

    Args:
        dispatched, parts: See `parallel_config`.

    Raises:
        NoActivation: The release does not know the activation.
    """
    activation = _activation(activation_name(model))
    router, widths = model["router"], model["experts"]
    hidden, intermediate = sizes or (
        widths["latent_size"] or widths["hidden_size"],
        widths["intermediate_size"],
    )
    arguments = {
        "num_experts": router["num_experts"],
        "experts_per_token": router["top_k"],
        "hidden_dim": hidden,
        "intermediate_size": intermediate,
        "intermediate_size_per_partition": intermediate // parts,
        "num_local_experts": router["num_experts"] // shards,
        "num_logical_experts": router["num_experts"],
        "activation": activation,
        "is_act_and_mul": widths["gated"],
        "has_bias": widths["bias"],
        "device": "cpu",
        "routing_method": method_named(method),
        "moe_parallel_config": parallel_config(shards, dispatched=dispatched, parts=parts),
        "in_dtype": getattr(torch, model["dtype"]),
        "router_logits_dtype": told_dtype(model),
        "max_num_tokens": 8192,
        "max_capture_size": 512,
        "moe_backend": server_defaults.moe_backend(),
        **_activation_arguments(model),
    }
    return names().get("moe-config")(**names().accepted("moe-config", arguments))


def quant_config(row: ServedScheme, experts: int) -> Any:
    """Make a `FusedMoEQuantConfig` of experts that are not TRT-LLM's, with scales that are all 1.

    Args:
        experts: The layer's own experts.
    """
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
        scale = scale.reshape(-1, 1, 1)
        arguments |= {"w1_scale": scale, "w2_scale": scale}
        # As the functions of `fused_moe/oracle` make it for these experts.
        arguments |= {"is_scale_swizzled": False, "is_nvfp4_scale_swizzled": False}
    if activations == "float8_e4m3fn" and block is None:
        arguments |= {"a1_scale": one, "a2_scale": one}
    if activations == "nvfp4":
        arguments |= {
            "g1_alphas": each,
            "g2_alphas": each,
            "a1_gscale": each,
            "a2_gscale": each,
        }
    return names().get("quant-config")(**names().accepted("quant-config", arguments))


def layer_arguments(
    model: Mapping[str, Any], sizes: tuple[int, int], bias: Tensor | None
) -> dict[str, Any]:
    """Return the arguments of the factory with which the model's code makes its layer.

    What the code leaves out is left out here, so that vLLM's defaults count.

    Args:
        sizes: Hidden and intermediate size.
        bias: The router's correction bias.
    """
    router, experts = model["router"], model["experts"]
    arguments = {
        **router_arguments(model, bias),
        "apply_router_weight_on_input": router["weight_on"] == "input",
        "router_logits_dtype": told_dtype(model),
        "activation": activation_name(model),
        "shared_experts": experts["shared_experts"] > 0,
        "has_bias": experts["bias"],
        **_activation_arguments(model),
    }
    if not experts["gated"]:
        arguments["ckpt_names"] = ("up_proj", "down_proj", None)
    return _as_stated(model, sizes, arguments)


def router_part(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `layer_arguments` that make the router; the model's experts are not read."""
    sizes = model["router"]["num_experts"], model["router"]["num_experts"]
    return _as_stated(model, sizes, router_arguments(model))


def _as_stated(
    model: Mapping[str, Any], sizes: tuple[int, int], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    scaled_by = release.scaled_by(model)
    known = {
        **{name: value for name, value in arguments.items() if name not in _OF_THE_ROUTER},
        "routed_scaling_factor": model["router"]["routed_scaling_factor"],
        "apply_routed_scale_to_output": scaled_by == "layer",
    }
    if scaled_by == "model":
        del known["routed_scaling_factor"]
    stated = sources().stated(architecture_of(model))
    given = {n: v for n, v in known.items() if stated is None or n in stated}
    return {
        **names().accepted("layer-arguments", given),
        "num_experts": model["router"]["num_experts"],
        "top_k": model["router"]["top_k"],
        "hidden_size": sizes[0],
        "intermediate_size": sizes[1],
        "params_dtype": getattr(torch, model["dtype"]),
    }


def method_named(name: str) -> Any:
    """Return a routing method.

    Raises:
        Unsupported: The release has no such method.
    """
    methods = names().get("methods")
    if name not in methods.__members__:
        raise Unsupported(f"this release has no routing method {name}")
    return methods[name]
