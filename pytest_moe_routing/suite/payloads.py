"""What goldens hold: plain data, made from a model and the builtin target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pytest_moe_routing.compare import compare_routing
from pytest_moe_routing.flashinfer import FlashInfer, known_releases
from pytest_moe_routing.logits import PATTERNS, make_case
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.reference.routing import route, weigh
from pytest_moe_routing.reference.threads import one_thread
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.targets.builtin.target import BuiltinTarget

_TOKENS = 2
#: Rows of the pattern `not-finite` differ in kind: all kinds are frozen.
_TOKENS_OF = {"not-finite": 5}


def by_release(payload: Callable[[FlashInfer], Any]) -> dict[str, Any]:
    """Return a payload for every known FlashInfer release, written where it changes."""
    timeline: dict[str, Any] = {}
    last: Any = None
    for release in known_releases():
        value = payload(FlashInfer.of(release))
        if value != last:
            timeline[release] = last = value
    return timeline


def router_payload(model: ModelSpec) -> dict[str, Any]:
    """Return the router, its recipe, and its classification from each release on."""
    return {
        "spec": model.as_dict(),
        "recipe": recipe_of(model.router).as_dict(),
        "in words": str(recipe_of(model.router)),
        "decision from FlashInfer": by_release(
            lambda flashinfer: str(BuiltinTarget(flashinfer).classify(model))
        ),
    }


def scheme_payload(model: ModelSpec, scheme: str) -> dict[str, Any]:
    """Return the verdict on a scheme from each release on, with rejecting gates and the kernel."""

    def verdict(flashinfer: FlashInfer) -> dict[str, Any]:
        found = judge(BuiltinTarget(flashinfer), model, scheme)
        payload: dict[str, Any] = {
            "verdict": found.verdict.value,
            "method": found.classification.method,
        }
        refused = {gate.name: gate.reason for gate in found.gates if not gate.ok}
        if refused:
            # The release's own number is the key already.
            payload["refused by"] = {
                name: reason.replace(f"{flashinfer}", "FlashInfer")
                for name, reason in refused.items()
            }
        if found.exact:
            payload["exact would be"] = [str(call) for call in found.exact]
        if found.call is not None:
            payload["call"] = str(found.call)
        if found.got is not None:
            payload["kernel"] = str(found.got)
        if found.notes:
            payload["notes"] = [note.fact for note in found.notes]
        return payload

    return {"scheme": scheme, "from FlashInfer": by_release(verdict)}


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
