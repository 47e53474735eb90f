"""Builds a model's MoE block as vLLM's model code does, with a layer that records what it is asked.

For a process of its own, in which the models' modules are patched: see `model_code`. A vLLM whose
place is `installed` runs whole, any other apart from its dependencies.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn

from pytest_moe_routing.compare import compare_routing
from pytest_moe_routing.errors import RecipeError, Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.logits import make_case
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.targets.dtypes import Dtypes
from pytest_moe_routing.targets.layers import is_loaded
from pytest_moe_routing.targets.vllm.model_code import blocks
from pytest_moe_routing.targets.vllm.probe import release
from pytest_moe_routing.targets.vllm.probe.apart import Apart
from pytest_moe_routing.targets.vllm.probe.world import Installed, World

#: Rows of the contract for what the code of a model calls to make its layer.
_LAYERS = ("code-layer", "code-shared-layer")
_MODELS = "vllm.model_executor.models"
#: A layer of experts in every model: the first few are dense, or routed by a table.
_PREFIX = "model.layers.3.mlp"
#: More than the largest batch of any special gate kernel.
_TOKENS = 64
_HIDDEN = 64
_SIZES = {
    "hidden_size": _HIDDEN,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "vocab_size": 64,
}
_LATENT = 32
#: Arguments of a layer that are parameters of the experts' activation.
_PARAMETERS = (
    "swiglu_limit",
    "swiglu_alpha",
    "swiglu_beta",
    "activation_situ_beta",
    "activation_situ_linear_beta",
)
#: Logits without ties, as torch.topk does not say which of equals it chooses.
_PATTERNS = ("plain", "all-negative", "near-ties")


class Recorder(nn.Module):
    """The MoE layer's stand-in: remembers its arguments, and returns ones.

    Args:
        stated: The names of those that are no defaults of the layer.
    """

    def __init__(
        self, arguments: Mapping[str, Any], hidden_size: int, stated: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.arguments = arguments
        self.stated = frozenset(stated)
        self.hidden_size = hidden_size
        self.moe_config = SimpleNamespace(
            hidden_dim=arguments.get("hidden_size"),
            is_sequence_parallel=False,
            should_defer_moe_finalize=lambda num_tokens: False,
        )
        self.is_internal_router = arguments.get("gate") is not None
        self.logits: Tensor | None = None

    def forward(self, hidden_states: Tensor, router_logits: Tensor, **_: Any) -> Tensor:
        # A layer that was given the gate calls it itself.
        if self.is_internal_router:
            router_logits, _bias = self.arguments["gate"](hidden_states)
        self.logits = router_logits
        # In float32, so that a factor on it is not rounded.
        return torch.ones(len(hidden_states), self.hidden_size, dtype=torch.float32)


@dataclass(frozen=True)
class Block:
    """A block that was built; `config_class` is that of `_config`."""

    name: str
    config_class: str
    module: nn.Module


# One release per process.
_world: World | None = None


def world() -> World:
    """Return what surrounds the code of models in this process."""
    assert _world is not None
    return _world


def set_world(found: World) -> None:
    """Have the code of models surrounded by this from now on."""
    global _world
    _world = found


def install(root: str, flashinfer: str, version: str, place: str) -> None:
    """Import vLLM from `root` from now on, installed or apart from its dependencies."""
    if place == "installed":
        set_world(Installed(root, version))
    else:
        release.install(root, FlashInfer.of(flashinfer), version)
        kinds = ("module", "shared")
        modules = {_full(row[k]) for row in blocks().values() for k in kinds if k in row}
        prepares = {_prepares(row)[0] for row in blocks().values() if row.get("prepare")}
        rewrites = {
            row["rewrite"].rpartition(".")[0] for row in blocks().values() if row.get("rewrite")
        }
        set_world(Apart(release.names(), root, modules | prepares | rewrites))


def _full(module: str) -> str:
    return module if "." in module else f"{_MODELS}.{module}"


def _prepares(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return module and name of the function that a model applies to its config first."""
    place, _, function = row["prepare"].rpartition(".")
    return f"{_full(row['module']).rpartition('.')[0]}.{place}", function


def layer_request(
    row: Mapping[str, Any], values: Mapping[str, Any], router: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a block requests from its MoE layer.

    Args:
        row: Of `blocks.yaml`.
        values: Published config keys of the model, with their values.
        router: The fields of the model's `RouterConfig`, to judge a custom routing function by.

    Raises:
        Unsupported: The release does not have the block, or it cannot be built or run here.
    """
    with Dtypes() as dtypes:
        block, layers, output = build(row, values, runs=True)
    return answer_of(block, layers, output, dtypes, RouterConfig(**router))


def answer_of(
    block: Block, layers: Sequence[Recorder], output: Tensor, dtypes: Dtypes, router: RouterConfig
) -> dict[str, Any]:
    """Return what a block requested from its MoE layer, which ran with `dtypes`.

    Raises:
        Unsupported: It called no or several layers, or does more than scale what its layer returns.
    """
    used = [(layer, layer.logits) for layer in layers if layer.logits is not None]
    if len(used) != 1:
        raise Unsupported(f"{block.name} called {len(used)} MoE layers")
    [(layer, logits)] = used
    return {
        "block": block.name,
        "config_class": block.config_class,
        "gate_dtypes": sorted(dtypes.of(logits)),
        "router_weight_dtypes": sorted(dtypes.of_weight(logits, block.module)),
        "logits_dtype": _name(logits.dtype),
        "bias_is_loaded": _reads_loaded_bias(block.module, layer),
        **_answer(layer, output, router),
    }


def build(
    row: Mapping[str, Any], values: Mapping[str, Any], *, runs: bool
) -> tuple[Block, list[Recorder], Tensor]:
    """Build a block, and run it if it `runs`; see `layer_request`.

    Returns:
        The block, the layers that it made, and its output, which is empty if it is not run.
    """
    world().names.require("model_code")
    vllm_config = world().vllm_config
    module = world().module(_full(row["module"]))
    name = f"{module.__name__}.{row['block']}"
    block_class = getattr(module, row["block"], None)
    if block_class is None:
        raise Unsupported(f"this release has no {name}")
    config, config_class = _config(row, values)
    if row.get("prepare"):
        place, function = _prepares(row)
        config = getattr(world().module(place), function)(config)
    recorders: list[Recorder] = []
    try:
        with (
            world().current(vllm_config),
            recording(block_class, recorders, config.hidden_size),
            in_bfloat16(),
        ):
            arguments = _arguments(block_class, row.get("arguments") or {}, config, vllm_config)
            block = block_class(**arguments)
            output = run(block, config.hidden_size) if runs else torch.empty(0)
    except Exception as error:
        raise Unsupported(
            f"{name} does not build{' and run' * runs} on a CPU: {type(error).__name__}: {error}"
        ) from error
    return Block(name, config_class, block), recorders, output


def _reads_loaded_bias(block: nn.Module, layer: Recorder) -> bool:
    """Return whether the bias that a layer was made with, if any, is a parameter of its block.

    vLLM's layer keeps the bias as an attribute, so a parameter becomes one of the layer.
    """
    bias = layer.arguments.get("e_score_correction_bias")
    return bias is None or isinstance(bias, nn.Parameter) or is_loaded(bias, block)


def _answer(layer: Recorder, output: Tensor, router: RouterConfig) -> dict[str, Any]:
    asked = layer.arguments
    if asked.get("router") is not None:
        raise Unsupported("the model code brings a router object of its own")
    factors = output.float().unique().tolist()
    if len(factors) != 1:
        raise Unsupported("the model code does more than scale what the layer returns")
    bias, custom = asked.get("e_score_correction_bias"), asked.get("custom_routing_function")
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
        **{name: asked.get(name) for name in names},
        "bias_dtype": None if bias is None else _name(bias.dtype),
        "router_logits_dtype": None if told is None else _name(told),
        "output_factor": factors[0],
        "shared_experts": asked.get("shared_experts") is not None,
        "custom_routing": None if custom is None else getattr(custom, "__qualname__", str(custom)),
        "custom_problem": None if custom is None else _custom_problem(custom, asked, router),
        "activation": asked["activation"],
        "parameters": {name: asked[name] for name in _PARAMETERS if name in layer.stated},
        "has_bias": bool(asked.get("has_bias")),
    }


def _custom_problem(
    function: Callable[..., Any], asked: Mapping[str, Any], router: RouterConfig
) -> str | None:
    """How a routing function differs from the model's router, found by running both."""
    # The layer applies no factor to what such a function returns, and weights the side it is told.
    recipe = replace(recipe_of(router), scale=1.0)
    for pattern in _PATTERNS:
        case = make_case(pattern, recipe, num_tokens=_TOKENS, num_experts=router.num_experts)
        hidden = torch.zeros(_TOKENS, _HIDDEN)
        weights, ids = function(hidden, case.logits, asked["top_k"], asked["renormalize"])
        try:
            found = compare_routing(ids, weights, case.logits, recipe, case.bias)
        except RecipeError as error:
            return str(error)
        if not found.ok:
            return f"logits pattern {pattern!r}: {found.message()}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _config(row: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the config object as vLLM reads it from a config.json, and where its own class is."""
    kind = row.get("config")
    sizes = {**_SIZES, "model_type": kind} if kind else _SIZES
    latent = {key: _LATENT for name, key in row["keys"].items() if name == "latent_size"}
    latent = {key: size for key, size in latent.items() if values.get(key)}
    usual = {**sizes, **(row.get("published") or {})}
    if row.get("rewrite"):
        usual |= _rewritten(row["rewrite"], values)
        values = {}
    stated = {key: value for key, value in row["stated"].items() if key not in sizes}
    return world().config(
        kind, row["nested"], {**usual, **values, **latent}, {**usual, **stated, **latent}
    )


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


def _layers() -> Iterator[str]:
    """Yield the names by which the code of models makes its layers."""
    names = world().names
    return (names.spelling(key).path for key in _LAYERS if names.has(key))


@contextmanager
def recording(block: type, layers: list[Recorder], hidden_size: int) -> Iterator[None]:
    """Put recorders where the code of a block, and of what it derives from, makes MoE layers."""

    def recorder_of(real: Any) -> Callable[..., Recorder]:
        signature = inspect.signature(real)

        def make_recorder(*args: Any, **kwargs: Any) -> Recorder:
            bound = signature.bind(*args, **kwargs)
            stated = tuple(bound.arguments)
            bound.apply_defaults()
            layers.append(Recorder(bound.arguments, hidden_size, stated))
            return layers[-1]

        return make_recorder

    with ExitStack() as stack:
        for module in {sys.modules[cls.__module__] for cls in block.__mro__}:
            for name in _layers():
                if hasattr(module, name):
                    recorder = recorder_of(getattr(module, name))
                    stack.enter_context(patch.object(module, name, recorder))
        stack.enter_context(world().linear_layers(block))
        # Streams and events of a GPU that is not here; the work is done in order.
        stack.enter_context(patch.multiple(torch.cuda, Event=MagicMock, Stream=MagicMock))
        yield


@contextmanager
def in_bfloat16() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _arguments(
    block: type, given: Mapping[str, Any], config: Any, vllm_config: Any
) -> dict[str, Any]:
    """Arguments of a block's constructor, by what their names say."""
    vllm_config.model_config = SimpleNamespace(
        hf_config=config, hf_text_config=config, dtype=torch.bfloat16
    )
    known = {
        "config": config,
        "vllm_config": vllm_config,
        "parallel_config": vllm_config.parallel_config,
        "quant_config": None,
        "prefix": _PREFIX,
        "layer_idx": 3,
        "layer_id": 3,
        "hidden_size": config.hidden_size,
        "intermediate_size": _SIZES["intermediate_size"],
        **{
            name: getattr(config, value[1:]) if isinstance(value, str) else value
            for name, value in given.items()
        },
    }
    names = inspect.signature(block.__init__).parameters  # type: ignore[misc]
    return {name: known[name] for name in names if name in known}


def run(block: nn.Module, hidden_size: int) -> Tensor:
    """Return the block's output, which is its MoE layer's up to a factor: all else is zero."""
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.zero_()
        first = next(iter(inspect.signature(block.forward).parameters))
        output = block(**{first: torch.zeros(_TOKENS, hidden_size, dtype=torch.bfloat16)})
    if not isinstance(output, Tensor):
        raise TypeError(f"forward returns {type(output).__name__}")
    return output
