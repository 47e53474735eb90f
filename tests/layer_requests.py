"""What model code asks of its MoE layer: the answers of a framework in which all is right."""

from __future__ import annotations

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.model_code import compare_request
from pytest_moe_routing.targets.vllm.model_code import blocks, request_of

MODELS = load_models(packaged_directory())

NOTHING_SPECIAL = {
    "block": "a.Block",
    "config_class": "",
    "gate_dtypes": ["bfloat16"],
    "router_weight_dtypes": ["bfloat16"],
    "scoring_func": "softmax",
    "renormalize": True,
    "use_grouped_topk": False,
    "num_expert_group": None,
    "topk_group": None,
    "routed_scaling_factor": 1.0,
    "apply_routed_scale_to_output": False,
    "apply_router_weight_on_input": False,
    "bias_dtype": None,
    "bias_is_loaded": True,
    "router_logits_dtype": None,
    "logits_dtype": "bfloat16",
    "output_factor": 1.0,
    "shared_experts": False,
    "custom_routing": None,
    "routing_problem": None,
    "sizes": {"hidden_size": (64, 64), "intermediate_size": (48, 48)},
    "activation": "silu",
    "parameters": {},
    "has_bias": False,
}
#: What a layer is asked for when all is right.
RIGHT = {
    "glm-5": {
        "num_experts": 256,
        "top_k": 8,
        "scoring_func": "sigmoid",
        "use_grouped_topk": True,
        "num_expert_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "bias_dtype": "float32",
        "router_logits_dtype": "float32",
        "logits_dtype": "float32",
        "gate_dtypes": ["float32"],
        "shared_experts": True,
    },
    "qwen3-30b-a3b": {"num_experts": 128, "top_k": 8},
    "gpt-oss-20b": {"num_experts": 32, "top_k": 4, "activation": "swigluoai", "has_bias": True},
    "deepseek-v2": {
        "num_experts": 160,
        "top_k": 6,
        "renormalize": False,
        "use_grouped_topk": True,
        "num_expert_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 16.0,
        "apply_routed_scale_to_output": True,
        "shared_experts": True,
    },
    "llama-4-scout": {
        "num_experts": 16,
        "top_k": 1,
        "renormalize": False,
        "apply_router_weight_on_input": True,
        "custom_routing": "Block.custom_routing_function",
    },
}
RIGHT["minimax-m3"] = {
    "num_experts": 128,
    "top_k": 4,
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.0,
    "bias_dtype": "float32",
    "router_logits_dtype": "float32",
    "logits_dtype": "float32",
    "gate_dtypes": ["float32"],
    "shared_experts": True,
    "activation": "swigluoai_uninterleave",
    "parameters": {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
}
RIGHT["hy4-preview"] = {
    **RIGHT["minimax-m3"],
    "num_experts": 256,
    "top_k": 8,
    "routed_scaling_factor": 2.827,
    "router_weight_dtypes": ["float32"],
    "activation": "silu",
    "parameters": {"swiglu_limit": 10.0},
}
RIGHT["kimi-k3"] = {
    **RIGHT["minimax-m3"],
    "num_experts": 896,
    "top_k": 16,
    "routed_scaling_factor": MODELS["kimi-k3"].router.routed_scaling_factor,
    "activation": "situ",
    "parameters": {"activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0},
}
RIGHT["minimax-m2"] = {
    **RIGHT["minimax-m3"],
    "num_experts": 256,
    "top_k": 8,
    "routed_scaling_factor": 1.0,
    "router_weight_dtypes": ["float32"],
    "activation": "silu",
    "parameters": {},
    "has_bias": False,
}
RIGHT["deepseek-r1"] = {
    **RIGHT["glm-5"],
    "num_expert_group": 8,
    "topk_group": 4,
    "router_logits_dtype": None,
    "logits_dtype": "bfloat16",
    "gate_dtypes": ["bfloat16"],
}


def compared(name, **changes):
    model = MODELS[name]
    answer = {**NOTHING_SPECIAL, **RIGHT[name], **changes}
    return compare_request(model, request_of(answer, blocks()[model.architecture], model))
