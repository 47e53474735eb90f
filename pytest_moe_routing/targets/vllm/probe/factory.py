"""Makes the MoE layer of a model with vLLM's own factory, and runs it with vLLM's own runner.

The factory, the router, the container of the experts and the runner are vLLM's. Around them are
stand-ins: the config of a server, ranks of which this process is the last, and an all-reduce that
leaves a mark. A layer's quantization method has the probe's tensors, and the method of vLLM that
calls the experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.oracle.swept_configs import MADE_UP
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.vllm.probe import release
from pytest_moe_routing.targets.vllm.probe.config import router_part
from pytest_moe_routing.targets.vllm.probe.ranks import Off, Ranks, Surroundings
from pytest_moe_routing.targets.vllm.probe.release import names

#: Rows of the contract whose modules make and run a layer.
_MODULES = ("layer-factory", "layer", "runner", "runner-shared", "moe-config")
PREFIX = "model.layers.3.mlp.experts"
#: What an all-reduce multiplies by: no scaling factor comes near it, and it is exact in bfloat16.
_REDUCED = 2.0**20
#: How far two products in bfloat16 may be off.
_TOLERANCE = 2**-6
#: How often a factor may be applied to an output, for all that is told apart.
_TIMES = (0, 1, 2, -1)


# What surrounds the layer that is being made or run: vLLM's functions find it without an argument.
_ranks = Ranks()
_config = Surroundings()


def _group() -> Surroundings:
    return Surroundings(world_size=_ranks.count, rank_in_group=_ranks.rank)


def _all_reduce(x: Tensor) -> Tensor:
    return x * _REDUCED if _ranks.tensor_parallel > 1 else x


def _context() -> Surroundings:
    layers = _config.compilation_config.static_forward_context
    return Surroundings(no_compile_layers=layers, all_moe_layers=None, dp_metadata=None)


class _Placement:
    """Where experts are placed at first: no layer here has one twice."""

    @staticmethod
    def build_initial_global_physical_to_logical_map(
        num_routed_experts: int, _num_redundant_experts: int
    ) -> list[int]:
        return [*range(num_routed_experts)]


def stand_ins() -> dict[str, Any]:
    """Return what the modules that make and run a layer find around them, by name."""
    return {
        "get_current_vllm_config": lambda: _config,
        "get_current_vllm_config_or_none": lambda: _config,
        "get_dp_group": _group,
        "get_pcp_group": _group,
        "get_tensor_model_parallel_world_size": lambda: _ranks.tensor_parallel,
        "get_tensor_model_parallel_rank": lambda: 0 if _ranks.dispatched else _ranks.rank,
        "tensor_model_parallel_all_reduce": _all_reduce,
        "get_forward_context": _context,
        "is_forward_context_available": lambda: True,
        "aux_stream": lambda: None,
        "EplbState": _Placement,
        "resolve_quant_method": lambda config, *of: config.get_quant_method(*of),
        "rocm_aiter_ops": Off(),
        "_USE_LAYERNAME": False,
    }


@cache
def enter() -> None:
    """Put the stand-ins around the factory and what it makes."""
    global _config
    _config = _ranks.config(torch.bfloat16)
    for key in _MODULES:
        if names().has(key):
            known = vars(stubs.real_module(names().spelling(key).module))
            known.update({name: value for name, value in stand_ins().items() if name in known})


@contextmanager
def around(ranks: Ranks, config: Surroundings) -> Iterator[None]:
    """Have vLLM's code that makes and runs a layer find these for a while."""
    global _ranks, _config
    before = _ranks, _config
    _ranks, _config = ranks, config
    try:
        yield
    finally:
        _ranks, _config = before


def is_run(model: Mapping[str, Any]) -> bool:
    """Return whether the probe runs the factory and the runner for a model.

    It does not where the contract has no factory, nor for swept models, which no code requests.
    """
    return model["hf_repo"] != MADE_UP and names().expects("runner")


class _Method:
    """A layer's quantization method: its tensors are the probe's, and vLLM's method calls experts.

    Attributes:
        give: Gives its tensors to the layer.
        caller: The method of vLLM, as a function.
        asked: What that is a method of.
        returned: What it returned.
    """

    give: Callable[[Any], None]
    caller: Any
    asked: Any
    returned: Tensor

    def get_quant_method(self, *_: Any) -> Any:
        return self

    def create_weights(self, layer: Any, *_: Any, **__: Any) -> None:
        self.give(layer)

    def get_fused_moe_quant_config(self, _layer: Any) -> None:
        """Return none: the experts were made with it."""

    def apply(self, **arguments: Any) -> Any:
        arguments["self"] = self.asked
        output = self.caller(**release.accepted(self.caller, arguments))
        # What follows may scale it in place.
        self.returned = output.clone()
        return output

    apply_monolithic = apply


@cache
def _method_class() -> Any:
    return type("Method", (_Method, names().get("method-base")), {})


class _SharedExperts(nn.Module):
    """Shared experts whose output is not that of routed ones, and nothing for a single token."""

    def forward(self, hidden: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        output[1:][-1:] = 1
        return output


class Made:
    """A layer that vLLM's factory made, with tensors of the probe.

    Args:
        arguments: Those of the factory, but for what depends on ranks.
        give: Gives the layer its tensors.

    Attributes:
        runner: What runs the layer.
        experts: What the layer's quantization method is given.
        config: The layer's config.
        ranks: Where the layer runs.

    Raises:
        Unsupported: The factory makes no such layer here.
    """

    def __init__(
        self, arguments: Mapping[str, Any], ranks: Ranks, give: Callable[[Any], None]
    ) -> None:
        enter()
        self.ranks, self._config = ranks, ranks.config(arguments["params_dtype"])
        self._method = _method_class().__new__(_method_class())
        self._method.give, self._method.moe_quant_config = give, None
        self._method.moe_kernel = None
        given = {**arguments, **ranks.arguments(), "quant_config": self._method, "prefix": PREFIX}
        self._factor = given.get("routed_scaling_factor", 1.0)
        self._has_shared = bool(given.get("shared_experts"))
        given["shared_experts"] = _SharedExperts() if self._has_shared else None
        factory = names().get("layer-factory")
        with around(ranks, self._config):
            try:
                self.runner = factory(**given)
            except Exception as error:
                # Whatever vLLM's code raises: another reason than the model cannot be excluded.
                raise Unsupported(
                    f"not judged: {factory.__qualname__} of vLLM {names().version} makes no such "
                    f"layer here: {type(error).__name__}: {error}"
                ) from error
        self.experts, self.config = self.runner.routed_experts, self.runner.moe_config

    def run(
        self, caller: Any, asked: Any, logits: Tensor, hidden: Tensor, router: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Run the layer with vLLM's runner.

        Args:
            caller: The method of vLLM that calls the experts, as a function.
            asked: What that is a method of.
            router: Takes the place of the layer's router.

        Returns:
            What the method returned, and what the layer made of it.
        """
        self._method.caller, self._method.asked = caller, asked
        self._method.moe_kernel = asked.moe_kernel
        if router is not None:
            self.runner.router = router
        with around(self.ranks, self._config):
            output: Tensor = self.runner.forward(hidden, logits)
        return self._method.returned, output

    def bind(self, kernel: Any, capture: Callable[[Tensor], None]) -> None:
        """Have vLLM bind a consumer of expert ids to the layer, as a server does when it starts."""
        self._method.moe_kernel = kernel
        model = SimpleNamespace(modules=lambda: [self.runner])
        capturer = SimpleNamespace(capture=lambda _layer_id, ids: capture(ids))
        with around(self.ranks, self._config):
            names().get("bind-capturer")(model, capturer)

    def read(self, output: Tensor, routed: Tensor) -> dict[str, Any]:
        """Say what an output is made of, in JSON.

        Args:
            routed: The output of the routed experts, zero for the last of several tokens: that
                one's is the output of shared experts.

        Returns:
            `scale_after`: what that is multiplied by; None if it is not only multiplied.
            `shared`: the same of the shared experts' output; None if the layer has none, or a
            single token.
            `reduced`: how often ranks were summed, of each; and how often they `are_summed`.
        """
        end = max(1, len(output) - 1)
        scale, times = _ratio(output[:end], routed[:end])
        shared, others = None, times
        if self._has_shared and len(output) > 1:
            shared, others = _ratio(output[-1], None)
        return {
            "scale_after": None if scale is None else self._exact(scale),
            "shared": shared,
            "reduced": [times, others],
            "are_summed": int(self.ranks.tensor_parallel > 1),
        }

    def _exact(self, scale: float) -> float:
        """Return the power of the layer's factor that is rounded to `scale`, if one is."""
        powers = (self._factor**count for count in _TIMES)
        return next((p for p in powers if math.isclose(p, scale, rel_tol=_TOLERANCE)), scale)


def make_layer(
    arguments: Mapping[str, Any],
    ranks: Ranks,
    server: Surroundings,
    quantization: Any,
    prefix: str = PREFIX,
    *,
    parts: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Return the runner of a layer that vLLM's factory makes.

    Args:
        arguments: Those of the factory, but for what follows from the other ones.
        server: The config of the server.
        quantization: The quantization config of the checkpoint.
        prefix: The name of the layer's experts.
        parts: What lies around its experts, as arguments; no shared experts if left out.
    """
    given = {
        **arguments,
        **ranks.arguments(),
        "quant_config": quantization,
        "prefix": prefix,
        "shared_experts": None,
        **parts,
    }
    with around(ranks, server):
        return names().get("layer-factory")(**given)


class _RouterMade(Exception):
    """The factory has come as far as its router."""


def router_of(model: Mapping[str, Any]) -> Any:
    """Return the router of a model's layer, as vLLM's factory makes it.

    Raises:
        Unsupported: It makes none here.
    """
    if not is_run(model):
        return release.make_router(model)
    enter()
    spelling, factory = names().spelling("router-factory"), names().get("layer-factory")
    module = stubs.real_module(names().spelling("layer-factory").module)
    make = names().get("router-factory")
    made: list[Any] = []

    def stop(**arguments: Any) -> None:
        made.append(make(**arguments))
        raise _RouterMade

    arguments = {**router_part(model), **Ranks().arguments()}
    config = Ranks().config(arguments["params_dtype"])
    with patch.object(module, spelling.path, stop), around(Ranks(), config):
        try:
            factory(**arguments)
        except _RouterMade:
            return made[0]
    raise Unsupported(
        f"not judged: {factory.__qualname__} of vLLM {names().version} makes no router with "
        f"{spelling.path}"
    )


def classify(model: Mapping[str, Any]) -> list[str]:
    """Return the method that the model's router says it is, and how it came to that."""
    names().require("verdicts")
    router = router_of(model)
    architecture = model["architecture"]
    path = [f"{type(router).__name__}.routing_method_type"]
    if not release.sources().has_architecture(architecture):
        path.insert(0, f"no {architecture} in this release, so by the config alone")
    method = router.routing_method_type
    if not isinstance(method, names().get("methods")):
        raise TypeError(f"{path[-1]} is {method!r}, expected a RoutingMethodType")
    return [method.name, *path]


@cache
def kernel_output(tokens: int, columns: int) -> Tensor:
    """Return what a kernel returns, so that `Made.read` finds it again: bfloat16."""
    marks = torch.exp2(torch.arange(tokens) % 4).bfloat16()
    marks[1:][-1:] = 0
    return marks.unsqueeze(1).repeat(1, columns)


def _ratio(got: Tensor, mark: Tensor | None) -> tuple[float | None, int]:
    """Return what a mark (1 if none) is multiplied by, and how often it was summed over ranks."""
    if mark is not None and _has_equal_columns(got) and _has_equal_columns(mark):
        # One column says as much, in a tenth of the time.
        got, mark = got[:, 0], mark[:, 0]
    ratios = got.float()
    if mark is not None:
        # What is not marked has to be 0: 0 / 0 is no number, and all else is infinite.
        ratios = ratios / mark
        is_number = ~ratios.isnan()
        if not bool((is_number == (mark != 0)).all()) or not bool(is_number.any()):
            return None, 0
        ratios = ratios.nan_to_num(float(ratios.nan_to_num(-math.inf).max()))
    least, most = (x.item() for x in ratios.aminmax())
    if not math.isclose(least, most, rel_tol=_TOLERANCE):
        return None, 0
    times = max(0, round(math.log(abs(most), _REDUCED))) if most else 0
    return most / _REDUCED**times, times


def _has_equal_columns(tensor: Tensor) -> bool:
    return bool((tensor == tensor[:, :1]).all())
