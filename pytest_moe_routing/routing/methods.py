"""FlashInfer's routing methods: the enum, and one recipe row for each.

A row says what the method means in the newest release; how releases differ is data of
`flashinfer/releases.yaml`. Semantics read from FlashInfer 0.7.2.post1,
`csrc/fused_moe/trtllm_backend/trtllm_fused_moe_routing_runner.cu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from pytest_moe_routing.routing.recipe import Recipe


class RoutingMethodType(IntEnum):
    """Routing methods under the numbers of the newest FlashInfer release.

    Numbers move between releases (`Unspecified` has been 5, 6, 8, 9 and 10): store names, and look
    a number up in one release with `FlashInfer.number`. Members from 100 on belong to
    frameworks and are never passed to a FlashInfer kernel.
    """

    Default = 0
    Renormalize = 1
    DeepSeekV3 = 2
    Llama4 = 3
    RenormalizeNaive = 4
    TopK = 5
    SigmoidRenorm = 6
    MiniMax2 = 7
    Sigmoid = 8
    TopKSigmoid = 9
    Unspecified = 10
    DeepseekV4 = 100
    Custom = 101
    Simulated = 102


#: The field of a recipe that each argument of a call sets, where its method honors it.
FIELDS: Mapping[str, str] = {
    "bias": "bias",
    "n_group": "n_group",
    "topk_group": "topk_group",
    "routed_scaling_factor": "scale",
}


@dataclass(frozen=True)
class Method:
    """A routing method: its recipe, and which of the call's arguments change it.

    Attributes:
        recipe: What it computes, but for these arguments.
        honors: Keys of `FIELDS`.
    """

    recipe: Recipe
    honors: frozenset[str] = frozenset()

    def bind(
        self,
        *,
        top_k: int,
        bias: bool = False,
        n_group: int = 1,
        topk_group: int = 1,
        routed_scaling_factor: float = 1.0,
        weight_on: str = "output",
    ) -> Recipe:
        """Return the recipe that a call with these arguments runs.

        An argument that the method ignores has no effect. `weight_on` is the GEMMs' doing, not the
        routing method's: it is taken as given.
        """
        arguments: dict[str, Any] = {
            "bias": bias,
            "n_group": n_group,
            "topk_group": topk_group,
            "routed_scaling_factor": routed_scaling_factor,
        }
        changes = {FIELDS[name]: arguments[name] for name in self.honors}
        return replace(self.recipe, top_k=top_k, weight_on=weight_on, **changes)


def _method(*honors: str, **recipe: Any) -> Method:
    return Method(Recipe(weight_dtype="bfloat16", **recipe), frozenset(honors))


_GROUPS = ("n_group", "topk_group")
_SCALE = "routed_scaling_factor"
_T = RoutingMethodType

METHODS: Mapping[RoutingMethodType, Method] = {
    _T.Default: _method(score="softmax"),
    _T.Renormalize: _method(score="identity", normalize="softmax"),
    _T.DeepSeekV3: _method(
        "bias", *_GROUPS, _SCALE, score="sigmoid", normalize="sum", epsilon=1e-20
    ),
    _T.Llama4: _method(score="identity", weigh_by="sigmoid"),
    _T.RenormalizeNaive: _method(score="softmax", normalize="sum"),
    _T.TopK: _method(score="identity"),
    _T.SigmoidRenorm: _method(score="sigmoid", normalize="sum", epsilon=1e-20),
    _T.MiniMax2: _method("bias", _SCALE, score="sigmoid", normalize="sum", epsilon=1e-20),
    _T.Sigmoid: _method(score="sigmoid"),
    _T.TopKSigmoid: _method(score="identity", weigh_by="sigmoid"),
    _T.DeepseekV4: _method("bias", _SCALE, score="sqrtsoftplus", normalize="sum"),
}
