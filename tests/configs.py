"""A published config, and how tests write configs to files."""

from __future__ import annotations

import json

from pytest_moe_routing.models import read_config

#: As the published config of DeepSeek-R1 has it.
R1 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}


def without(*keys):
    return {key: value for key, value in R1.items() if key not in keys}


def groups(targets=("Linear",), inputs=..., **weights):
    """A compressed-tensors config; the activations have the weights' bits unless given."""
    inputs = {"num_bits": weights.get("num_bits")} if inputs is ... else inputs
    group = {"targets": list(targets), "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def mixed(**layers):
    algorithms = {name.replace("_", "."): {"quant_algo": algo} for name, algo in layers.items()}
    return {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": algorithms,
    }


def read(tmp_path, config, name="Some-Model", beside=None):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, (str, bytes)) else json.dumps(config)
    (folder / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    if beside is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": beside}))
    return read_config(folder)
