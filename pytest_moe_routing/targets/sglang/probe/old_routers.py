"""Runs the routers of a SGLang before 0.5.18, and compares them with the model's router.

A model's own MoE block is built among stubs, for what it asks of its TopK layer, or of the layer of
experts where there was no TopK (before 0.4.9). The functions of that release's `topk.py` then route
with it. The layer of experts is a stand-in: a factor that is left to it is not judged.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.oracle.routers import NOT_JUDGED, NOT_LOADED, Deviation
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.architectures import modules as modules_of
from pytest_moe_routing.targets.contract import Contract, Names
from pytest_moe_routing.targets.layers import is_loaded
from pytest_moe_routing.targets.sglang import kernels
from pytest_moe_routing.targets.sglang.probe import main as blocks
from pytest_moe_routing.targets.sglang.probe.methods import lost_factors
from pytest_moe_routing.targets.sglang.probe.options import Options
from pytest_moe_routing.targets.sglang.probe.router_case import (
    NARROW,
    Case,
    compare,
    function_of,
    rest,
    runs_of,
)
from pytest_moe_routing.targets.sglang.probe.router_configs import cases
from pytest_moe_routing.targets.sglang.probe.sources import Sources
from pytest_moe_routing.targets.sglang.probe.world import stand_ins

#: Layers of experts, by which a block is known; each is replaced by one that notes its arguments.
_LAYERS = ("FusedMoE", "EPMoE", "DeepEPMoE", "FlashInferEPMoE", "get_moe_impl_class")
_UTILITIES = ("utils.common", "utils")
_NATIVE = "--enable-torch-compile, one token"
#: The quantization by which code of models chooses the dtype of its router's bias.
_QUANTIZED = "modelopt_fp4"
_COPIED = (
    "the router reads a copy of the bias that is made before the checkpoint's weights are loaded"
)
_FACTOR = (
    "the routed scaling factor is left to the layer of experts, which is not run in releases "
    "before 0.5.18"
)


class _Zero(int):
    """A number that was not given, or a choice that was not made: no to every question."""

    def __call__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Callable[[], bool]:
        if name.startswith("is_"):
            return lambda: False
        raise AttributeError(name)


class _Layer(nn.Module):
    """In the place of a layer of experts: keeps its arguments; each expert gives its weight."""

    made: ClassVar[list[_Layer]] = []
    # An attribute, or a method until 0.5.2.
    should_fuse_routed_scaling_factor_in_topk = _Zero()

    def __init__(self, *_: Any, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments
        self.quant_method = stubs.Stub("quant_method")
        self.made.append(self)

    def forward(self, hidden_states: Tensor, routed: Any = None, *_: Any, **more: Any) -> Tensor:
        # What TopK gave, or the logits of a release whose layer of experts routes.
        weights = getattr(more.get("topk_output", routed), "topk_weights", None)
        weight = 1.0 if weights is None else float(weights.flatten()[0])
        return torch.full_like(hidden_states, weight)


class _Unset(dict[str, Any]):
    """A server's arguments in a release that keeps them in a mapping: none was given."""

    def __missing__(self, key: str) -> int:
        return _Zero()


class _OldSources(Sources):
    def _makes_experts(self, node: ast.stmt) -> bool:
        if not isinstance(node, ast.ClassDef):
            return False
        inner = list(ast.walk(node))
        names = {n.id for n in inner if isinstance(n, ast.Name)}
        asked = {word.arg for n in inner if isinstance(n, ast.Call) for word in n.keywords}
        return "top_k" in asked and not names.isdisjoint(_LAYERS)


class OldRouters:
    """Answers about the routers of one release's models."""

    def __init__(self, root: str, version: str) -> None:
        definitions = stubs.definitions("sglang", root)
        self.names = Names(Contract.of("sglang"), version, definitions, stubs.real_module)
        self.sources = _OldSources(self.names, root)
        self._root = root
        self._compared: dict[str, list[dict[str, Any]]] = {}
        self._server = _Unset(disable_shared_experts_fusion=True)
        self._enter = cache(self._stand_in)

    def _stand_in(self) -> None:
        """Import SGLang from now on, with its models and `topk.py`, and stubs around them.

        Raises:
            Unsupported: The release does not have what routes.
        """
        topk = self.names.spelling("select-experts").module
        torch.set_default_dtype(torch.bfloat16)
        torch.set_grad_enabled(False)
        torch.compile = lambda f=None, *_, **__: f or (lambda g: g)  # type: ignore[assignment]
        torch.library.register_fake = lambda *_, **__: lambda f: f
        contract = self.names.contract
        run = (self.names.spelling("models").module, topk, "sglang.srt.environ")
        contract = replace(contract, run=run, third_party=(*contract.third_party, "vllm"))
        operators = kernels.old_in_torch()
        same: dict[str, Any] = {
            # No remapping of experts.
            "topk_ids_logical_to_physical": lambda ids, *_: ids,
            "transform_select_experts_inputs": lambda router_logits, correction_bias, **_: (
                router_logits,
                correction_bias,
            ),
        }
        options = Options(ep_num_redundant_experts=0, disable_shared_experts_fusion=True)
        asks = self.names.contract.rows["router-quantized"].spellings[0]
        is_quantized = function_of(self._root, asks.module, asks.path)
        if not isinstance(is_quantized, stubs.Stub):
            is_quantized.__globals__["global_server_args_dict"] = self._server
        around: dict[str, Any] = {
            **stand_ins(self.names),
            **dict.fromkeys(_LAYERS, _Layer),
            "get_moe_impl_class": lambda *_, **__: _Layer,
            "global_server_args_dict": self._server,
            asks.path: is_quantized,
            "get_global_server_args": lambda: options,
            "get_tensor_model_parallel_world_size": lambda: 1,
            "fast_topk": self._fast_topk(),
            **same,
            "expert_location_dispatch": stubs.known("expert_location_dispatch", **same),
            **operators,
            "_custom_ops": stubs.known("vllm._custom_ops", **operators),
        }
        stubs.install(contract, self._root, around)
        self._topk = stubs.real_module(topk)

    def _fast_topk(self) -> Any:
        """Return a helper of models' own functions, in plain torch, wherever the release has it."""
        name = self.names.contract.rows["router-fast-topk"].spellings[0].path
        found = [function_of(self._root, f"sglang.srt.{m}", name) for m in _UTILITIES]
        return next((f for f in found if not isinstance(f, stubs.Stub)), stubs.Stub(name))

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        """What a layer of experts asks for where its caller says nothing, read from its source."""
        spelling = self.names.spelling("router-layer")
        layer = self.sources.definitions(spelling.module)[spelling.path]
        assert isinstance(layer, ast.ClassDef)
        (init,) = (n for n in layer.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
        found = {}
        words = init.args.args[-len(init.args.defaults) :]
        for word, default in zip(words, init.args.defaults, strict=True):
            with suppress(ValueError):
                found[word.arg] = ast.literal_eval(default)
        return found

    def run(self, model: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Route for a model as its block asks, on CUDA and as plain torch.

        Raises:
            Unsupported: The release has no such architecture, or its block cannot be built here.
        """
        self._enter()
        return runs_of(self._compared, model, config, self._routed)

    def run_other(self) -> list[dict[str, Any]]:
        """Route by functions that no model of the zoo reaches on CUDA.

        Raises:
            Unsupported: The release does not have what routes.
        """
        self._enter()
        return [*(compare(case) for case in cases(self.names)), *self.lost_factors()]

    def lost_factors(self) -> Iterator[dict[str, Any]]:
        """Read which methods of layers of experts lose the factor, in releases that name it so."""
        if self.names.expects("router-methods"):
            package = self.names.spelling("router-methods").module
            modules = [
                m for m in modules_of(self._root, package) if "MoE" in self.sources.source(m)
            ]
            trees = {f"{m.replace('.', '/')}.py": self.sources.tree(m) for m in modules}
            yield from lost_factors(trees)

    def _routed(
        self, architecture: str, values: Mapping[str, Any], router: RouterConfig
    ) -> Iterator[dict[str, Any]]:
        dtypes = {"torch_dtype": torch.get_default_dtype()}
        config, forward, native, factor = self._built(architecture, {**values, **dtypes})
        recipe = replace(recipe_of(router), weight_on="output")
        scale = 1.0 if factor is None else rest(recipe.scale, factor)
        if getattr(config, "apply_routed_scaling_factor_on_output", False):
            scale = recipe.scale
        dtype = getattr(torch, router.logits_dtype)
        case = Case(forward, config, replace(recipe, scale=scale), router.num_experts, dtype)
        found = [compare(case)]
        if recipe.bias:
            for quantization in (None, _QUANTIZED):
                reads = self._reads_bias(architecture, {**values, **dtypes}, quantization)
                found.append({**found[0], **reads})
        if router.logits_dtype == "float32":
            way = "cuda, with bfloat16 logits"
            again = replace(case, dtype=torch.bfloat16, way=way, reach="bfloat16 logits")
            found.append(compare(again))
        if native is not None:
            found.append(compare(replace(case, forward=native, way=_NATIVE, reach="opt-in")))
        if factor is None and recipe.scale not in (1.0, scale):
            unknown = asdict(Deviation(NOT_JUDGED, "", _FACTOR, _FACTOR))
            found.append({**found[0], "way": "cuda, output", "deviations": [unknown]})
        yield from found

    def _reads_bias(
        self, architecture: str, values: Mapping[str, Any], quantization: str | None
    ) -> dict[str, Any]:
        """Say whether the router of a model's block reads the bias that is loaded."""
        config = stubs.known("quant_config", get_name=lambda: quantization)
        deviations = []
        try:
            with (
                patch.dict(self._server, quantization=quantization),
                patch.object(blocks, "quant_config", lambda *_: quantization and config),
            ):
                block, topk = self._made(architecture, values)
            bias = (
                _Layer.made[0].arguments["correction_bias"]
                if topk is None
                else _config(topk).correction_bias
            )
            if not is_loaded(bias, block, topk):
                deviations.append(Deviation(NOT_LOADED, "", _COPIED, _COPIED))
        except Unsupported as reason:
            deviations.append(Deviation(NOT_JUDGED, "", str(reason), str(reason)))
        way, reach = f"cuda, --quantization {quantization}", "opt-in"
        if quantization is None:
            way, reach = "cuda", "model"
        return {"way": way, "reach": reach, "deviations": [asdict(d) for d in deviations]}

    def _built(
        self, architecture: str, values: Mapping[str, Any]
    ) -> tuple[Any, Callable[..., Any], Callable[..., Any] | None, float | None]:
        """Build a model's block.

        Returns:
            What it asks of its router, what routes by that on CUDA and in torch, and the factor by
            which it multiplies the experts' output, None where that is not known.
        """
        block, topk = self._made(architecture, values)
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.zero_()
        factor = None
        if all(layer.arguments.get("routed_scaling_factor") is None for layer in _Layer.made):
            with patch.object(blocks, "_SIZES", NARROW), self._weighing_1(topk):
                factor = _factor(block, values["num_experts"])
        if topk is not None:
            bias = topk._parameters.pop("correction_bias", None)
            if bias is not None:
                topk.correction_bias = bias.data
            return _config(topk), topk.forward, topk.forward_native, factor
        config = SimpleNamespace(**{**self._defaults, **_Layer.made[0].arguments})
        forward, native = (self._select(config, torch_native=native) for native in (False, True))
        is_own = config.use_grouped_topk or config.custom_routing_function is not None
        return config, forward, None if is_own else native, factor

    def _made(self, architecture: str, values: Mapping[str, Any]) -> tuple[nn.Module, Any]:
        """Return a model's block and its TopK, None in a release that has none."""
        found = self.sources.blocks(architecture)
        own = self.sources.place(architecture)
        # Code may name a class of another model, whose block is not this one's.
        module, name, given = next((b for b in found if b[0] == own), found[0])
        topks: list[Any] = []
        _Layer.made = []
        try:
            with patch.object(blocks, "_SIZES", NARROW), self._noting(topks), torch.no_grad():
                block = blocks._build(self.names, module, name, given, values, None)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise Unsupported(f"{name} is not built here: {text}") from error
        if len(topks or _Layer.made) != 1:
            raise Unsupported(f"{name} makes {len(topks or _Layer.made)} routed layers, not one")
        return block, topks[0] if topks else None

    def _select(self, config: Any, **more: bool) -> Callable[[Tensor, Tensor], Any]:
        """Return a function that routes as a layer of experts does."""
        select = self._topk.select_experts
        names = inspect.signature(select).parameters

        def forward(hidden: Tensor, logits: Tensor) -> Any:
            asked = {**vars(config), **more, "hidden_states": hidden, "router_logits": logits}
            weights, ids = select(**{key: value for key, value in asked.items() if key in names})
            return SimpleNamespace(topk_weights=weights, topk_ids=ids)

        return forward

    @contextmanager
    def _noting(self, topks: list[Any]) -> Iterator[None]:
        """Note the TopK layers that are made, where there are any."""
        layer = getattr(self._topk, "TopK", None)
        if layer is None:
            yield
            return
        make = layer.__init__

        def init(topk: Any, *args: Any, **kwargs: Any) -> None:
            make(topk, *args, **kwargs)
            topks.append(topk)

        with patch.object(layer, "__init__", init):
            yield

    @contextmanager
    def _weighing_1(self, topk: Any) -> Iterator[None]:
        """Let the TopK, if there is one, weigh every expert 1."""

        def forward(_hidden: Tensor, router_logits: Tensor, *_: Any, **__: Any) -> Any:
            ones = torch.ones(len(router_logits), 1)
            return self._topk.StandardTopKOutput(ones, ones.int(), router_logits)

        with nullcontext() if topk is None else patch.object(topk, "forward", forward):
            yield


def _config(topk: Any) -> Any:
    """Return what has the settings of a TopK: its config, or itself in older releases."""
    return getattr(topk, "topk_config", topk)


def _factor(block: nn.Module, num_experts: int) -> float | None:
    """Return what a block makes of experts that all give 1; None where it does not run here."""
    try:
        output = blocks._forward(block, num_experts)
        values = output.float().unique().tolist()
    except Exception:
        return None
    return float(values[0]) if len(values) == 1 else None
