"""Runs the routers of one release of SGLang on a CPU, and compares them with the model's router.

It is run by `targets.server` with the arguments ROOT FLASHINFER VERSION. A model's own MoE block
makes the TopK, as on CUDA with the Triton runner; SGLang's Python code runs as it is. Its router in
Triton runs on torch (`triton_gate`), and in the place of a compiled kernel runs what it is for
(`targets.sglang.kernels`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.models.spec import NEARLY
from pytest_moe_routing.oracle.own_router import reading_of
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.targets import config_classes, layers, stubs
from pytest_moe_routing.targets.config_classes import ConfigClasses
from pytest_moe_routing.targets.dtypes import Dtypes
from pytest_moe_routing.targets.server import serve
from pytest_moe_routing.targets.sglang.model_configs import deciding_of, served_as
from pytest_moe_routing.targets.sglang.probe import main as blocks
from pytest_moe_routing.targets.sglang.probe import ways
from pytest_moe_routing.targets.sglang.probe.asked import asked
from pytest_moe_routing.targets.sglang.probe.old_routers import OldRouters
from pytest_moe_routing.targets.sglang.probe.quantized_routers import Served, on_hopper
from pytest_moe_routing.targets.sglang.probe.ranks import RANKS, fusing
from pytest_moe_routing.targets.sglang.probe.requests import CAPTURED, requesting
from pytest_moe_routing.targets.sglang.probe.router_case import (
    HIDDEN,
    NARROW,
    Case,
    compare,
    exact,
    give_bias,
    rest,
    runs_of,
    values_of,
)
from pytest_moe_routing.targets.sglang.probe.router_configs import cases
from pytest_moe_routing.targets.sglang.probe.router_world import choose_triton, with_kernels
from pytest_moe_routing.targets.sglang.probe.watching import Seen, watching
from pytest_moe_routing.targets.sglang.probe.weights import fill
from pytest_moe_routing.targets.stubs import source_of

#: Rows of the contract for the kernels that run in torch.
_KERNELS = ("router-kernels-gate", "router-kernels-softmax", "router-kernels-sigmoid")


class Routers(blocks.Blocks):
    """Answers about the routers of one release's models."""

    def __init__(self, root: str, flashinfer: FlashInfer, version: str) -> None:
        super().__init__(root, flashinfer, version)
        self.root = root
        self._compared: dict[str, list[dict[str, Any]]] = {}
        self._enter_torch = cache(self._stand_in)

    def _stand_in(self) -> None:
        """Enter the world, with kernels that a CPU runs.

        Raises:
            Unsupported: The release does not have a name that the routers' runs need.
        """
        self.names.require("routers")
        for key in _KERNELS:
            # Older releases have others.
            self.names.spelling(key)
        combine = self.names.spelling("router-combine").module
        if "moe_runner_config.routed_scaling_factor" not in source_of(self.root, combine):
            raise Unsupported(
                "the factor by which this release's Triton runner multiplies its output "
                "is not known"
            )
        self.enter()
        stubs.stand_in(config_classes.stand_ins())
        package = self.names.spelling("configs").module
        self._config_classes = ConfigClasses(self.names, package, "config-registry")
        choose_triton(self.names)
        importlib.reload(with_kernels(self.names, self.root))

    def run(
        self,
        model: Mapping[str, Any],
        config: Mapping[str, Any],
        servers: Mapping[str, Served] = MappingProxyType({}),
    ) -> list[dict[str, Any]]:
        """Route for a model by the TopK that its block makes, in every way that there is.

        Args:
            servers: How a server serves the model, by quantization scheme.

        Raises:
            Unsupported: The release has no such architecture, or its block cannot be built here.
        """
        self._enter_torch()
        return runs_of(self._compared, model, config, partial(self._routed, servers=servers))

    def read(self, model: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the TopK of a model's block computes otherwise than the model's config.

        Raises:
            Unsupported: The release has no such architecture, its block cannot be built here, or
                its code has other experts than the config.
        """
        self._enter_torch()
        if model["dtype"] != "bfloat16":
            raise Unsupported("models are run only in bfloat16")
        seen = Seen()
        topk, factor = self._built(
            model["architecture"], values_of(model["architecture"], config), seen
        )
        (told,) = seen.runners
        experts = model["experts"]
        limit = told.gemm1_clamp_limit or told.swiglu_limit
        asked = experts["activation_limit"], experts["gated"]
        names = experts["activation"], NEARLY.get(experts["activation"])
        if told.activation not in names or (limit, told.is_gated) != asked:
            raise Unsupported(f"{seen.place} has other experts than the config")

        def route(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            give_bias(topk.topk_config, bias)
            hidden = torch.zeros(len(logits), HIDDEN, dtype=torch.bfloat16)
            output = getattr(topk, seen.forward)(hidden, logits)
            return output.topk_weights * exact(factor, scale), output.topk_ids

        router = RouterConfig(**model["router"])
        scale = router.routed_scaling_factor
        return dict(reading_of(route, router))

    def layer_request(
        self,
        architecture: str,
        config: Mapping[str, Any],
        nested: Sequence[str],
        published: Mapping[str, Any],
        router: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Return what a model's block asks of its TopK, and what goes around it.

        If its code may do so otherwise while a CUDA graph is captured, that is a second answer.

        Args:
            config: Attributes of the model's config object, where the release has no class of its
                own for it.
            nested: What the config is, see `nesting`.
            published: The keys of the text model's config.
            router: The fields of the model's `RouterConfig`.

        Raises:
            Unsupported: The release has no such architecture, or its block cannot be built here.
        """
        self._enter_torch()
        question = {"architecture": architecture, "router": router, "config": config}
        values = values_of(architecture, published)
        made = self._config_classes.make(values, *nested) or (None, "")
        first = self._request(question, made, is_captured=False)
        if not self.sources.captures(architecture):
            return [first]
        return [first, self._request(question, made, is_captured=True)]

    def _request(
        self, question: Mapping[str, Any], config: tuple[Any, str], *, is_captured: bool
    ) -> dict[str, Any]:
        """Return what a block asks of its TopK, of the config object of a named class."""
        seen, (made, config_class) = Seen(), config
        values = values_of(question["architecture"], question["config"])
        with Dtypes() as dtypes, requesting(**{CAPTURED: is_captured}):
            _, factor = self._built(question["architecture"], values, seen, made)
        return asked(self.names, question, seen, dtypes, factor) | {
            "captured": is_captured,
            "config_class": config_class,
        }

    def run_other(self) -> list[dict[str, Any]]:
        """Route by functions that no model of the zoo reaches on CUDA.

        Raises:
            Unsupported: The release does not have a name that the routers' runs need.
        """
        self._enter_torch()
        return [compare(case) for case in cases(self.names)]

    def _routed(
        self,
        architecture: str,
        values: Mapping[str, Any],
        router: RouterConfig,
        servers: Mapping[str, Served],
    ) -> Iterator[dict[str, Any]]:
        can_fuse = values.get("n_shared_experts") == 1 and self._fuses_shared_experts(architecture)
        for shared in range(1 + can_fuse):
            with ways.shared_experts(self.names, shared):
                yield from self._ways(architecture, values, router, shared)
        if can_fuse:
            yield from self._fused_by_default(architecture, values, router)
        if router.routed_scaling_factor != 1.0 and self.names.has("router-factor"):
            with ways.factor_in_topk(self.names):
                seen = Seen()
                topk, factor = self._built(architecture, values, seen)
            case = _case(topk, factor, router, seen)
            case = replace(case, way=ways.FACTOR_IN_TOPK, reach="opt-in", patterns=ways.PLAIN)
            first = compare(case)
            yield first
            yield from self._overlapped(case, architecture, seen.block, router)
            build = partial(self._built, architecture, values)
            case_of = partial(_case, router=router)
            yield from on_hopper(self, build, case_of, servers, first)

    def _ways(
        self, architecture: str, values: Mapping[str, Any], router: RouterConfig, shared: int
    ) -> Iterator[dict[str, Any]]:
        """Run the TopK of a block with so many shared experts among the routed ones."""
        seen = Seen()
        topk, factor = self._built(architecture, values, seen)
        fused = ", shared experts fused" * shared
        case = replace(_case(topk, factor, router, seen), way=f"cuda{fused}")
        if shared:
            # Where ranks sum their outputs, the model's code divides it among them.
            part = topk.topk_config.fused_shared_experts_scaling_factor or 1
            # Several ranks fuse it only with --enforce-shared-experts-fusion.
            case = replace(case, shared_weight=part / factor, reach="opt-in")
        yield compare(case)
        if router.logits_dtype == "float32" and not shared:
            way = "cuda, with bfloat16 logits"
            yield compare(replace(case, dtype=torch.bfloat16, way=way, reach="bfloat16 logits"))
        case = replace(case, reach="opt-in")
        if seen.forward != "forward_native":
            way = f"--enable-torch-compile, one token{fused}"
            yield compare(replace(case, forward=topk.forward_native, way=way))
        case = replace(case, patterns=ways.PLAIN)
        forward = ways.placed(case.forward, router.num_experts)
        yield compare(replace(case, forward=forward, way=f"{ways.PLACED}{fused}"))
        if not shared:
            yield from self._overlapped(case, architecture, seen.block, router)
        if not shared and values.get("num_hash_layers"):
            yield from self._by_table(architecture, values, router, factor)

    def _fused_by_default(
        self, architecture: str, values: Mapping[str, Any], router: RouterConfig
    ) -> Iterator[dict[str, Any]]:
        """Run the TopK of a block whose code puts its shared expert among the routed ones itself.

        It may do so where each rank has all experts and the server leaves it to the code, which it
        does for runners of SGLang's own.
        """
        if not self.names.has("shared-experts"):
            # Before 0.5.23, a release keeps the decision elsewhere.
            return
        model_code = stubs.real_module(self.sources.place(architecture))
        model = getattr(model_code, served_as(architecture))
        config = {**values, **deciding_of(architecture)}
        with fusing(self.names, model, config, None), ways.shared_experts(self.names, 1):
            if not RANKS.shared.num_fused_shared_experts:
                return
            seen = Seen()
            topk, factor = self._built(architecture, values, seen)
        case = _case(topk, factor, router, seen)
        way = "cuda, shared experts fused by default"
        yield compare(replace(case, way=way, shared_weight=1 / factor))

    def _overlapped(
        self, case: Case, architecture: str, block: Any, router: RouterConfig
    ) -> Iterator[dict[str, Any]]:
        """Run a block's router for two batches that overlap, where the model's layers can do so."""
        if self.sources.overlaps(architecture):
            recipe = replace(recipe_of(router), weight_on="output")
            forward = ways.overlapped(case.forward, block, recipe.scale)
            way = f"{ways.OVERLAPPED}, {case.way}"
            yield compare(replace(case, forward=forward, recipe=recipe, way=way))

    def _by_table(
        self, architecture: str, values: Mapping[str, Any], router: RouterConfig, factor: float
    ) -> Iterator[dict[str, Any]]:
        """Run the router of a layer that routes by a table."""
        module, name, given = self.sources.blocks(architecture)[0]
        try:
            with patch.object(blocks, "_SIZES", NARROW), patch.object(blocks, "_LAYER", 0):
                block = blocks._build(self.names, module, name, given, values, None)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise Unsupported(f"{name} of the first layer cannot be built here: {text}") from error
        recipe = replace(recipe_of(router), weight_on="output")
        dtype, count = getattr(torch, router.logits_dtype), router.num_experts
        rows = [(ways.IN_TORCH, "opt-in")]
        if self.names.has("router-kernels-hash"):
            rows.insert(0, ({}, "model"))
        for environment, reach in rows:
            forward, config = ways.hashed(block.topk, recipe, count, environment)
            left = replace(recipe, scale=rest(recipe.scale, factor))
            way = ", ".join([ways.HASHED, *map("=".join, environment.items())])
            case = Case(forward, config, left, count, dtype, way, reach)
            yield compare(case)
            case = replace(case, reach="opt-in", patterns=ways.PLAIN)
            way = f"{ways.PLACED}, {way}"
            yield compare(replace(case, forward=ways.placed(forward, count), way=way))

    def _fuses_shared_experts(self, architecture: str) -> bool:
        """Whether the block's module can put its shared expert among the routed ones."""
        module = self.sources.blocks(architecture)[0][0]
        return any(
            f"{self.names.spelling(key).path}()" in self.sources.source(module)
            for key in ("router-shared-experts-count", "router-shared-experts-off")
            if self.names.has(key) and self.names.expects(key)
        )

    def _built(
        self,
        architecture: str,
        config: Mapping[str, Any],
        seen: Seen | None = None,
        made: Any = None,
        quantization: Mapping[str, Any] | None = None,
    ) -> tuple[Any, float]:
        """Return the TopK of a model's block, and the factor on the weights behind it.

        Args:
            made: The config object; that of the attributes in `config` if it is None.
        """
        module, name, given = self.sources.blocks(architecture)[0]
        seen = seen or Seen()
        try:
            with (
                patch.object(blocks, "_SIZES", NARROW),
                watching(self.names, seen),
                torch.no_grad(),
                ways.experts_give_weights(self.names, seen),
            ):
                block = seen.block = blocks._build(
                    self.names, module, name, given, config, quantization, config=made
                )
                fill(block, seen, config, HIDDEN)
                output = layers.first_of(blocks._forward(block, config["num_experts"]))
        except Unsupported as reason:
            raise Unsupported(f"{name}: {reason}") from reason
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise Unsupported(f"{name} cannot be built and run here: {text}") from error
        if len(seen.topks) != 1:
            raise Unsupported(f"{name} makes {len(seen.topks)} TopK layers, not one")
        values = output.float().unique().tolist()
        if len(values) != 1:
            raise Unsupported(f"{name} does more than scale what its experts give")
        return seen.topks[0], values[0]


def _case(topk: Any, factor: float, router: RouterConfig, seen: Seen) -> Case:
    """Return the case of a TopK whose weights are multiplied by `factor` behind it.

    Its logits have the dtype of the model's, unless the block widens those.

    Raises:
        Unsupported: It is given no logits.
    """
    recipe = replace(recipe_of(router), weight_on="output")
    recipe = replace(recipe, scale=rest(recipe.scale, factor))
    dtype = getattr(torch, router.logits_dtype)
    for logits in seen.logits[:1]:
        if isinstance(logits, nn.Parameter):
            raise Unsupported("the block hands its TopK the router's weight, rather than logits")
        dtype = torch.promote_types(dtype, logits.dtype)
    forward = getattr(topk, seen.forward)
    return Case(forward, topk.topk_config, recipe, router.num_experts, dtype)


def handlers(root: str, flashinfer: str, version: str) -> dict[str, Callable[..., Any]]:
    """Return what answers questions about the routers of an SGLang."""
    routers = Routers(root, FlashInfer.of(flashinfer), version)
    is_old = not routers.names.expects("router-kernels-gate")
    runs = OldRouters(root, version) if is_old else routers

    def run(servers: Mapping[str, Served] | None = None, **question: Any) -> Any:
        # No code of a server is run in old releases.
        told = {} if is_old or servers is None else {"servers": servers}
        return runs.run(**question, **told)

    return {
        "run": run,
        "run_other": runs.run_other,
        "read": routers.read,
        "layer_request": routers.layer_request,
    }


def main() -> None:
    serve(handlers(*sys.argv[1:]), "sglang")
