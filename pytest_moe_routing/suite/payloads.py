"""What goldens hold: plain data, made from a model and the builtin target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytest_moe_routing import goldens
from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.flashinfer import FlashInfer, known_releases
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.targets.builtin.target import BuiltinTarget


def payload(model: ModelSpec, name: str) -> dict[str, Any]:
    """Return what the golden of this name holds: `router`, `routing` or a scheme."""
    if name == goldens.ROUTER:
        return router_payload(model)
    if name != goldens.ROUTING:
        return scheme_payload(model, name)
    # It imports torch, which takes longer than all other goldens together.
    from pytest_moe_routing.suite.routings import routing_payload

    try:
        stored = goldens.read(goldens.golden_path(model.folder, name))
    except MoERoutingError:
        stored = None
    return routing_payload(model, stored)


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
