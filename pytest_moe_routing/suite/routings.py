"""What the golden of a model's routing holds: experts and weights for named logits."""

from __future__ import annotations

from typing import Any

import torch

from pytest_moe_routing.compare import compare_routing
from pytest_moe_routing.logits import PATTERNS, make_case
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.reference.routing import route, weigh
from pytest_moe_routing.reference.threads import one_thread
from pytest_moe_routing.routing import recipe_of

_TOKENS = 2
#: Rows of the pattern `not-finite` differ in kind: all kinds are frozen.
_TOKENS_OF = {"not-finite": 5}


@one_thread()
def routing_payload(model: ModelSpec, golden: dict[str, Any] | None = None) -> dict[str, Any]:
    """Experts and weights for a few tokens of each logits pattern, in float64.

    Where `golden` has other experts that the reference proves equally right (a tie), its experts
    are taken, with the weights that they should have.
    """
    recipe = recipe_of(model.router)
    patterns: dict[str, Any] = {}
    for name in PATTERNS:
        tokens = _TOKENS_OF.get(name, _TOKENS)
        case = make_case(name, recipe, num_tokens=tokens, num_experts=model.router.num_experts)
        routing = route(case.logits, recipe, case.bias, dtype=torch.float64)
        ids, weights = routing.topk_ids, routing.topk_weights
        chosen = _golden_ids(golden, name, ids)
        if (
            chosen is not None
            and not torch.equal(chosen, ids)
            and compare_routing(
                chosen, None, case.logits, recipe, case.bias, precision="float64"
            ).ok
        ):
            ids, weights = chosen, weigh(case.logits.to(torch.float64), recipe, chosen)
        patterns[name] = [
            {"experts": e, "weights": w}
            for e, w in zip(ids.tolist(), weights.tolist(), strict=True)
        ]
    return {"patterns": patterns}


def _golden_ids(
    golden: dict[str, Any] | None, name: str, like: torch.Tensor
) -> torch.Tensor | None:
    """Return a golden's experts for a pattern; None unless they have the same shape."""
    try:
        ids = torch.tensor([token["experts"] for token in golden["patterns"][name]])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return None
    return ids if ids.shape == like.shape and ids.dtype == torch.int64 else None
