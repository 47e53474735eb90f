"""Judges what decides about experts in the code of a model and is no argument of the MoE layer.

That is a routing function of the model's own, or a step of its router that no recipe can say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from pytest_moe_routing.compare import compare_routing
from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.logits import make_case
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.targets.mixers import UNTIED, mixer_problem
from pytest_moe_routing.targets.vllm.probe.construction import HIDDEN
from pytest_moe_routing.targets.vllm.probe.layer_recorder import Recorder
from pytest_moe_routing.targets.vllm.probe.running import TOKENS
from pytest_moe_routing.targets.vllm.probe.world import world

_Function = Callable[..., tuple[Tensor, Tensor]]
#: What a kernel of Gemma-4 computes, which is a function in torch.
_KERNEL, _IN_TORCH = "routing-gemma4-kernel", "routing-gemma4"


@dataclass(frozen=True)
class Asked:
    """A layer that a block has called, and how.

    Attributes:
        layer: Its stand-in.
        logits: The router logits that it was handed.
        block: What called it.
        router: That of the model.
        published: The row's further keys of the config.
    """

    layer: Recorder
    logits: Tensor
    block: nn.Module
    router: RouterConfig
    published: Mapping[str, Any]

    @property
    def function(self) -> _Function | None:
        """The routing function that the layer was made with."""
        return self.layer.arguments.get("custom_routing_function")

    def route(self, function: _Function, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and ids of a routing function that is called as the layer does."""
        asked, hidden = self.layer.arguments, torch.zeros(len(logits), HIDDEN)
        return function(hidden, logits, asked["top_k"], asked["renormalize"])


def function_problem(asked: Asked, function: _Function) -> str | None:
    """Return how a routing function differs from the model's router, found by running both."""
    # The layer applies no factor to what such a function returns, and weights the side it is told.
    router = asked.router
    recipe = replace(recipe_of(router), scale=1.0)
    for pattern in UNTIED:
        case = make_case(pattern, recipe, num_tokens=TOKENS, num_experts=router.num_experts)
        # In the dtype that the layer is handed, in which a function may go on to compute.
        logits = case.logits.to(asked.logits.dtype)
        weights, ids = asked.route(function, logits)
        try:
            found = compare_routing(ids, weights, logits, recipe, case.bias, lower_index=False)
        except RecipeError as error:
            return str(error)
        if not found.ok:
            return f"logits pattern {pattern!r}: {found.message()}"
    return None


def step_problem(step: str, asked: Asked) -> str | None:
    """Return how a layer routes without a step that the model's router has; None if it has it.

    Args:
        step: A value of `blocks.yaml`.
    """
    return next(_STEPS[step](asked), None)


def _sparse_mixer(asked: Asked) -> Iterator[str]:
    if asked.function is None:
        yield "the layer is made without the function that computes the sparse mixer"
        return
    for pattern in UNTIED:
        recipe, experts = recipe_of(asked.router), asked.router.num_experts
        logits = make_case(pattern, recipe, num_tokens=TOKENS, num_experts=experts).logits
        try:
            problem = mixer_problem(*asked.route(asked.function, logits), logits)
        except AssertionError as error:
            problem = f"the layer cannot call its routing function: {error}"
        if problem is not None:
            yield f"logits pattern {pattern!r}: {problem}"


def _expert_scales(asked: Asked) -> Iterator[str]:
    named = asked.block.named_parameters()
    scales = [each for name, each in named if name.endswith("per_expert_scale")]
    if asked.function is None or not scales:
        yield "the layer is made without the function that multiplies by each expert's scale"
        return
    # Powers of 2, as no weight is rounded by them.
    factors = 2.0 ** (torch.arange(asked.router.num_experts) % 5)
    for scale in scales:
        scale.data.copy_(factors)
    function = asked.function

    def unscaled(*given: Any) -> tuple[Tensor, Tensor]:
        weights, ids = function(*given)
        return weights / factors[ids.long()].to(weights.dtype), ids

    with _in_torch():
        problem = function_problem(asked, unscaled)
    if problem is not None:
        yield problem


def _in_torch() -> AbstractContextManager[Any]:
    """Have a function in torch called in the place of a kernel that does not run here."""
    names = world().names
    if not (names.has(_KERNEL) and names.has(_IN_TORCH)):
        return nullcontext()
    kernel = names.spelling(_KERNEL)
    module = import_module(kernel.module)
    return patch.object(module, kernel.path, getattr(module, names.spelling(_IN_TORCH).path))


def _zero_experts(asked: Asked) -> Iterator[str]:
    layer, published = asked.layer.arguments, asked.published
    kind, wanted = layer.get("zero_expert_type"), published["zero_expert_type"]
    if kind != wanted:
        yield f"the layer is made with zero_expert_type={kind!r}, the model has {wanted!r}"
    if asked.function is not None:
        yield "the layer is made with a routing function, which takes no zero experts"
    count = asked.router.num_experts + published["zero_expert_num"]
    bias = layer.get("e_score_correction_bias")
    for name, tensor in (("router logits", asked.logits), ("e_score_correction_bias", bias)):
        if tensor is not None and tensor.shape[-1] != count:
            yield f"{name} has {tensor.shape[-1]} experts, the model has {count} with zero experts"


_STEPS: Mapping[str, Callable[[Asked], Iterator[str]]] = {
    "sparse_mixer": _sparse_mixer,
    "expert_scales": _expert_scales,
    "zero_experts": _zero_experts,
}
