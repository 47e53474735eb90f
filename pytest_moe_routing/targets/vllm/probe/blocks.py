"""Builds a model's MoE block as vLLM's model code does, with a layer that records what it is asked.

For a process of its own, in which the models' modules are patched: see `model_code`. A vLLM whose
place is `installed` runs whole, any other apart from its dependencies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.targets.dtypes import Dtypes
from pytest_moe_routing.targets.layers import is_loaded, loaded_dtype
from pytest_moe_routing.targets.vllm.model_code import blocks
from pytest_moe_routing.targets.vllm.probe import release
from pytest_moe_routing.targets.vllm.probe.apart import Apart
from pytest_moe_routing.targets.vllm.probe.construction import (
    arguments_of,
    config_of,
    full_name,
    sizes_of,
)
from pytest_moe_routing.targets.vllm.probe.layer_recorder import Recorder, recording
from pytest_moe_routing.targets.vllm.probe.routing_steps import (
    Asked,
    function_problem,
    step_problem,
)
from pytest_moe_routing.targets.vllm.probe.running import Same, clear, in_bfloat16, run
from pytest_moe_routing.targets.vllm.probe.token_kinds import TokenKinds
from pytest_moe_routing.targets.vllm.probe.world import Installed, set_world, world

_T = TypeVar("_T")
#: Arguments of a layer that are parameters of the experts' activation.
_PARAMETERS = (
    "swiglu_limit",
    "swiglu_alpha",
    "swiglu_beta",
    "activation_situ_beta",
    "activation_situ_linear_beta",
)


@dataclass(frozen=True)
class Block:
    """A block that was built.

    Attributes:
        name: Module and class.
        config_class: That of `config_of`.
        module: The block itself.
        layers: The MoE layers that it made.
        hidden_size: The width of hidden states.
    """

    name: str
    config_class: str
    module: nn.Module
    layers: Sequence[Recorder] = ()
    hidden_size: int = 0


def install(root: str, flashinfer: str, version: str, place: str) -> None:
    """Import vLLM from `root` from now on, installed or apart from its dependencies."""
    if place == "installed":
        set_world(Installed(root, version))
    else:
        release.install(root, FlashInfer.of(flashinfer), version)
        kinds = ("module", "shared")
        modules = {full_name(row[k]) for row in blocks().values() for k in kinds if k in row}
        prepares = {_prepares(row)[0] for row in blocks().values() if row.get("prepare")}
        rewrites = {
            row["rewrite"].rpartition(".")[0] for row in blocks().values() if row.get("rewrite")
        }
        set_world(Apart(release.names(), root, modules | prepares | rewrites))


def _prepares(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return module and name of the function that a model applies to its config first."""
    place, _, function = row["prepare"].rpartition(".")
    return f"{full_name(row['module']).rpartition('.')[0]}.{place}", function


def layer_request(
    row: Mapping[str, Any], values: Mapping[str, Any], router: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return what a block requests from its MoE layer, or from that of each kind of tokens.

    Args:
        row: Of `blocks.yaml`.
        values: Published config keys of the model, with their values.
        router: The fields of the model's `RouterConfig`, to judge a custom routing function by.

    Raises:
        Unsupported: The release does not have the block, or it cannot be built or run here.
    """
    with Dtypes() as dtypes:
        asks = _asks_of_kinds if row.get("kinds") else _asks

        def ask(block: Block) -> list[dict[str, Any]]:
            clear(block.module, row.get("ones") or ())
            return [*asks(block, row, dtypes, RouterConfig(**router))]

        answers = build(row, values, ask)
    for kind, answer in enumerate(answers):
        known = sizes_of(row, values, kind)
        answer["sizes"] = {name: (size, answer["sizes"][name]) for name, size in known.items()}
    return answers


def _asks(
    block: Block, row: Mapping[str, Any], dtypes: Dtypes, router: RouterConfig
) -> Iterator[dict[str, Any]]:
    output = run(block.module, block.hidden_size)
    yield answer_of(block, output, dtypes, router, row)


def _asks_of_kinds(
    block: Block, row: Mapping[str, Any], dtypes: Dtypes, router: RouterConfig
) -> Iterator[dict[str, Any]]:
    kinds = TokenKinds(block.module, block.layers, row["kinds"], block.hidden_size, dtypes)
    for kind in kinds.runs():
        asked = Asked(kind.layer, kind.logits, block.module, router, {})
        answer = _answer(block, asked, kind.output, dtypes)
        yield {**answer, "block": f"{block.name}.{kind.name}", "routing_problem": kind.problem}


def answer_of(
    block: Block,
    output: Tensor,
    dtypes: Dtypes,
    router: RouterConfig,
    row: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a block requested from its MoE layer, which ran with `dtypes`.

    Raises:
        Unsupported: It called no or several layers, or does more than scale what its layer returns.
    """
    used = [(layer, layer.logits) for layer in block.layers if layer.logits is not None]
    if len(used) != 1:
        raise Unsupported(f"{block.name} called {len(used)} MoE layers")
    [(layer, logits)] = used
    asked = Asked(layer, logits, block.module, router, row.get("published") or {})
    answer = _answer(block, asked, output, dtypes)
    step = row.get("step")
    if step is not None:
        answer["routing_problem"] = step_problem(step, asked)
    elif asked.function is not None and router.not_expressible is None:
        answer["routing_problem"] = function_problem(asked, asked.function)
    return answer


def build(row: Mapping[str, Any], values: Mapping[str, Any], use: Callable[[Block], _T]) -> _T:
    """Build a block and use it; see `layer_request`.

    Raises:
        Unsupported: The release does not have the block, or it cannot be built or used here.
    """
    world().names.require("model_code")
    module = world().module(full_name(row["module"]))
    name = f"{module.__name__}.{row['block']}"
    block_class = getattr(module, row["block"], None)
    if block_class is None:
        raise Unsupported(f"this release has no {name}")
    config, config_class = config_of(row, values)
    if row.get("prepare"):
        place, function = _prepares(row)
        config = getattr(world().module(place), function)(config)
    layers: list[Recorder] = []
    try:
        with (
            world().current(world().vllm_config),
            recording(block_class, layers, config.hidden_size),
            in_bfloat16(),
            patch.dict(vars(module), dict.fromkeys(row.get("passes") or (), Same)),
        ):
            made = block_class(**arguments_of(block_class, row, config))
            return use(Block(name, config_class, made, layers, config.hidden_size))
    except Unsupported:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise Unsupported(f"{name} does not build and run on a CPU: {told}") from error


def _reads_loaded_bias(block: nn.Module, layer: Recorder) -> bool:
    """Return whether the bias that a layer was made with, if any, is a parameter of its block.

    vLLM's layer keeps the bias as an attribute, so a parameter becomes one of the layer.
    """
    bias = layer.arguments.get("e_score_correction_bias")
    return bias is None or isinstance(bias, nn.Parameter) or is_loaded(bias, block)


def _answer(block: Block, call: Asked, output: Tensor, dtypes: Dtypes) -> dict[str, Any]:
    layer, logits, asked = call.layer, call.logits, call.layer.arguments
    if asked.get("router") is not None:
        raise Unsupported("the model code brings a router object of its own")
    factors = output.float().unique().tolist()
    if len(factors) != 1:
        raise Unsupported("the model code does more than scale what the layer returns")
    bias, custom = asked.get("e_score_correction_bias"), call.function
    told = asked.get("router_logits_dtype")
    names = (
        "num_experts",
        "top_k",
        "scoring_func",
        "renormalize",
        "use_grouped_topk",
        "num_expert_group",
        "topk_group",
        "routed_scaling_factor",
        "apply_routed_scale_to_output",
        "apply_router_weight_on_input",
    )
    return {
        "block": block.name,
        "config_class": block.config_class,
        "gate_dtypes": sorted(dtypes.of(logits)),
        "router_weight_dtypes": sorted(dtypes.of_weight(logits, block.module)),
        "logits_dtype": _name(logits.dtype),
        "bias_is_loaded": _reads_loaded_bias(block.module, layer),
        **{name: asked.get(name) for name in names},
        "bias_dtype": None if bias is None else _name(loaded_dtype(bias, block.module)),
        "router_logits_dtype": None if told is None else _name(told),
        "output_factor": factors[0],
        "shared_experts": asked.get("shared_experts") is not None,
        "custom_routing": None if custom is None else getattr(custom, "__qualname__", str(custom)),
        "routing_problem": None,
        "activation": asked["activation"],
        "parameters": {name: asked[name] for name in _PARAMETERS if name in layer.stated},
        "has_bias": bool(asked.get("has_bias")),
        "sizes": {name: asked.get(name) for name in ("hidden_size", "intermediate_size")},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
