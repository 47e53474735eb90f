"""The config from which a model's MoE block is built, and the arguments of its constructor."""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.syntax import parse
from pytest_moe_routing.targets.stubs import module_exists, source_of
from pytest_moe_routing.targets.vllm.probe.ranks import Off
from pytest_moe_routing.targets.vllm.probe.world import world

MODELS = "vllm.model_executor.models"
#: A layer of experts in every model: the first few are dense, or routed by a table.
_LAYER = 3
HIDDEN = 64
_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "vocab_size": 64,
}
_LATENT = 16
#: The experts' intermediate size, which no other part of a layer has.
_INNER = 48


#: What the arguments of a constructor are made of, besides the config.
_AROUND = {"rocm_aiter_ops": Off()}


def full_name(module: str) -> str:
    """Return the name of a module of `blocks.yaml` from `vllm` on."""
    return module if "." in module else f"{MODELS}.{module}"


def config_of(row: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the config object as vLLM reads it from a config.json, and where its own class is."""
    kind = row.get("config")
    sizes = {**_SIZES, "model_type": kind} if kind else _SIZES
    latent = {key: _LATENT for name, key in row["keys"].items() if name == "latent_size"}
    latent = {key: size for key, size in latent.items() if values.get(key)}
    outer, _, inner = (row.get("intermediate") or "").rpartition(".")
    own: dict[str, Any] = {inner: _INNER} if inner else {}
    if outer:
        own = {outer: {**values.get(outer, {}), **own}}
    usual = {**sizes, **own, **(row.get("published") or {})}
    if row.get("rewrite"):
        usual |= _rewritten(row["rewrite"], values)
        values = {}
    stated = {key: value for key, value in row["stated"].items() if key not in sizes}
    further = {**own, **latent} if outer else latent
    return world().config(
        kind,
        row["nested"],
        {**usual, **values, **further},
        {**usual, **stated, **further},
        row.get("computed") or {},
    )


def sizes_of(row: Mapping[str, Any], values: Mapping[str, Any], kind: int = 0) -> dict[str, int]:
    """Return the sizes of the experts by key of `ExpertsConfig`, as the config has them.

    Args:
        row, values: Those of `config_of`.
        kind: The kind of tokens, where a config has a size for each.
    """
    key = row.get("intermediate")
    latent = any(name == "latent_size" and values.get(key) for name, key in row["keys"].items())
    inner = (row.get("published") or {}).get(key, _INNER)
    return {
        "hidden_size": _LATENT if latent else HIDDEN,
        "intermediate_size": inner[kind] if isinstance(inner, list) else inner,
    }


def _rewritten(function: str, experts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config.json that vLLM makes of a params.json with these `experts`.

    Raises:
        Unsupported: The release does not have the function.
    """
    place, _, name = function.rpartition(".")
    module = world().module(place)
    if not hasattr(module, name):
        raise Unsupported(f"this release has no {function}")
    made: Mapping[str, Any] = getattr(module, name)({"moe": dict(experts)})
    return {key: value for key, value in made.items() if key != "moe"}


def arguments_of(block: type, row: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Return the arguments of a block's constructor.

    What the decoder layer computes from the config is computed by its code; all else is known by
    the names of the parameters.

    Raises:
        Unsupported: Decoder layers make the block with different arguments.
    """
    vllm_config, layer = world().vllm_config, row.get("layer", _LAYER)
    vllm_config.model_config = SimpleNamespace(
        hf_config=config, hf_text_config=config, dtype=torch.bfloat16
    )
    known = {
        "config": config,
        "vllm_config": vllm_config,
        "parallel_config": vllm_config.parallel_config,
        "quant_config": None,
        "prefix": f"model.layers.{layer}.mlp",
        "cache_config": None,
        "layer_idx": layer,
        "layer_id": layer,
        "hidden_size": config.hidden_size,
        "intermediate_size": _INNER,
        **(row.get("arguments") or {}),
        **_computed(row, config),
    }
    names = inspect.signature(block.__init__).parameters  # type: ignore[misc]
    return {name: known[name] for name in names if name in known}


def _computed(row: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Return the keyword arguments that a decoder layer's code computes from the config."""
    modules = map(full_name, filter(None, (row.get("decoder"), row["module"])))
    module = next(name for name in modules if module_exists(world().root, name))
    calls = [dict(_evaluated(call, config)) for call in _calls(module, row["block"])]
    if any(call != calls[0] for call in calls):
        raise Unsupported(f"{module} makes {row['block']} in several ways: {calls}")
    return calls[0] if calls else {}


# Parsing takes most of the time of a question, and many ask about the same block.
@cache
def _calls(module: str, name: str) -> tuple[ast.Call, ...]:
    """Return the calls of a class in a module."""
    return tuple(
        node
        for node in ast.walk(parse(source_of(world().root, module)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    )


def _evaluated(call: ast.Call, config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keyword arguments of a call that are made of the config, or of nothing else."""
    known = {"config": config, **_AROUND}
    for word in call.keywords:
        names = {node.id for node in ast.walk(word.value) if isinstance(node, ast.Name)}
        if word.arg is not None and names <= {*known, *vars(builtins)}:
            code = compile(ast.Expression(word.value), "<the decoder layer>", "eval")
            yield word.arg, eval(code, {**known})
