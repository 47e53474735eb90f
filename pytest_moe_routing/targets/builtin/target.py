"""The embedded default: our own classifier and gates. Needs nothing installed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import metadata

from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.exact import Gate
from pytest_moe_routing.oracle.target import Classification, Target
from pytest_moe_routing.routing import RoutingMethodType
from pytest_moe_routing.targets.builtin.classify import classify
from pytest_moe_routing.targets.builtin.gates import support_gates


@cache
def _version() -> str:
    """Look up the version once: it takes longer than a verdict."""
    return metadata.version("pytest-moe-routing")


class BuiltinTarget(Target):
    """Right for each FlashInfer release: the tree and the gates look the release up."""

    name = "builtin"

    def version(self) -> str:
        return _version()

    def honors(self, model: ModelSpec, name: str) -> bool | None:
        """Whether a value that some frameworks do not compute is judged.

        There is no code of models here that could ignore a key. What the code of transformers has
        for itself is another model than the config's, and is not judged.
        """
        return True if name in model.disputed else None

    def method_numbers(self) -> Mapping[str, int]:
        return {method: number for number, method in enumerate(self.flashinfer.methods)}

    def classify(self, model: ModelSpec) -> Classification:
        router = model.router
        if router.not_expressible is not None:
            return Classification(RoutingMethodType.Custom.name, (router.not_expressible,))
        if (router.router_n_groups or 1) > 1:
            path = ("no routing method selects as many experts in each group",)
            return Classification(RoutingMethodType.Custom.name, path)
        llama4 = router.topk_before_score and router.top_k == 1 and not router.renormalize
        if llama4 and router.scoring_func == "sigmoid":
            # Frameworks recognize this routing function itself, before any tree.
            return Classification(RoutingMethodType.Llama4.name, ("top-1 on the logits, sigmoid",))
        return classify(
            scoring_func=router.scoring_func,
            top_k=router.top_k,
            renormalize=router.renormalize,
            num_expert_group=router.n_group,
            has_e_score_bias=router.correction_bias is not None,
            routed_scaling_factor=router.routed_scaling_factor,
            minimax2_scales=self.flashinfer.honors("MiniMax2", "routed_scaling_factor"),
        )

    def gates(self, model: ModelSpec, scheme: str, method: str) -> tuple[Gate, ...]:
        return support_gates(model, scheme, method, self.flashinfer)
