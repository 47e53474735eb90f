"""Runs vLLM's transformers backend on the MoE blocks of transformers' models.

The backend replaces the experts of a block by vLLM's MoE layer. Where its tracer knows how a block
routes, it has vLLM's layer route instead. It is run by `targets.server` with the arguments ROOT
FLASHINFER VERSION; transformers is the one of this environment.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.dtypes import Dtypes
from pytest_moe_routing.targets.hf_blocks import block_maker
from pytest_moe_routing.targets.server import serve
from pytest_moe_routing.targets.vllm.probe import blocks, release
from pytest_moe_routing.targets.vllm.probe.apart import Apart, Linear
from pytest_moe_routing.targets.vllm.probe.layer_recorder import recording
from pytest_moe_routing.targets.vllm.probe.running import clear, in_bfloat16, run
from pytest_moe_routing.targets.vllm.probe.world import set_world

#: Other than any number of experts.
_HIDDEN = 72
#: What transformers imports later, among stubs, must be what is installed.
_FIRST = ("transformers", "transformers.modeling_utils")
#: Modules of the backend that run for real besides.
_HELPERS = ("fuser", "fusers", "fx_utils", "utils")
#: Calls within each other. The tracer of vLLM 0.27.0 to 0.32.0 follows some attributes without end,
#: which takes seconds up to the usual limit; it then goes on with what it has traced.
_DEPTH = 400
_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


class _End:
    """The last of a model's classes, which has nothing left to replace."""

    def recursive_replace(self) -> None:
        """Replace nothing."""


class Backend:
    """The transformers backend of one release of vLLM.

    Raises:
        Unsupported: The release or the environment does not have what it needs.
    """

    def __init__(self, names: Names, root: str) -> None:
        if not names.expects("backend"):
            raise Unsupported(f"the transformers backend of vLLM {names.version} is not known")
        names.require("transformers_backend")
        mixin = names.spelling("backend")
        package = mixin.module.rpartition(".")[0]
        modules = [mixin.module, "vllm.config.utils", *(f"{package}.{name}" for name in _HELPERS)]
        set_world(Apart(names, root, modules, absent=("triton",)))
        stubs.stand_in(
            {
                "STR_DTYPE_TO_TORCH_DTYPE": _DTYPES,
                "maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name,
            }
        )
        if names.has("backend-aliases"):
            spelling = names.spelling("backend-aliases")
            node: Any = names.definitions.node(spelling.module, spelling.path)
            try:
                aliases = ast.literal_eval(getattr(node, "value", node))
            except ValueError as error:
                raise Unsupported(
                    f"not judged: {spelling} in vLLM {names.version} is not a literal: {error}"
                ) from error
            stubs.stand_in({spelling.path: aliases})
        self._mixin = getattr(stubs.real_module(mixin.module), mixin.path)
        gates = stubs.real_module(names.spelling("backend-fuser").module)
        if hasattr(gates, "GateLinear"):
            gates.GateLinear = Linear  # type: ignore[attr-defined]

    def request(
        self,
        architecture: str,
        config: str,
        keys: Mapping[str, Any],
        router: Mapping[str, Any],
    ) -> dict[str, Any] | None:
        """Return what a block requests from vLLM's layer; None if transformers' code routes.

        Args:
            config: The config class, as `folder.Class`.
            keys: Keys of a config, with their values; the class has some of them.
            router: The fields of the model's `RouterConfig`.

        Raises:
            Unsupported: transformers does not have the block, or the backend does not take it.
        """
        with in_bfloat16():
            maker, made = block_maker(config, keys, RouterConfig(**router), _HIDDEN)
            block = maker()
            made.architectures = [architecture]
            recorders: list[Any] = []
            name = f"transformers.{config.partition('.')[0]}.{type(block).__name__}"
            try:
                with recording(self._mixin, recorders, _HIDDEN):
                    self._served(block, made, router["num_experts"]).recursive_replace()
                if any(made.arguments.get("custom_routing_function") for made in recorders):
                    return None
                clear(block)
                with Dtypes() as dtypes:
                    output = run(block, _HIDDEN)
            except Exception as error:
                # Whatever vLLM's code raises.
                told = f"{type(error).__name__}: {error}"
                raise Unsupported(
                    f"its transformers backend does not run {name}: {told}"
                ) from error
        made_of = blocks.Block(name, "", block, recorders, _HIDDEN)
        answer = blocks.answer_of(made_of, output, dtypes, RouterConfig(**router), {})
        # What makes the whole model decides about the dtypes of its parameters, and is not run.
        answer["router_weight_dtypes"] = []
        # They follow from the parameters of transformers' experts.
        answer["sizes"] = {}
        if answer["bias_dtype"] is not None:
            answer["bias_dtype"] = router["correction_bias"] or "float32"
        return answer

    def _served(self, block: nn.Module, config: Any, num_experts: int) -> Any:
        """Return a model with the block as its only layer, as the backend has it."""
        model = nn.Module()
        # As long a path as in a whole model.
        model.layers = nn.ModuleDict({"3": nn.ModuleDict({"mlp": block})})
        served = type("Served", (self._mixin, _End), {"__init__": lambda self: None})()
        parallel = SimpleNamespace(
            enable_eplb=False,
            eplb_config=SimpleNamespace(num_redundant_experts=0),
            use_sequence_parallel_moe=False,
        )
        served.__dict__.update(
            config=config,
            text_config=config,
            model=model,
            model_config=SimpleNamespace(dtype=torch.bfloat16, get_num_experts=lambda: num_experts),
            parallel_config=parallel,
            quant_config=None,
        )
        return served


def main() -> None:
    root, flashinfer, version = sys.argv[1:]
    missing = ""
    try:
        for module in _FIRST:
            import_module(module)
    except ImportError as error:
        missing = f"transformers cannot be imported here: {error}"
    release.install(root, FlashInfer.of(flashinfer), version)
    sys.setrecursionlimit(_DEPTH)
    backend = cache(lambda: Backend(release.names(), root))

    def request(**question: Any) -> dict[str, Any] | None:
        if missing:
            raise Unsupported(missing)
        return backend().request(**question)

    serve({"backend_request": request}, "vllm")
