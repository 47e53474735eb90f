"""The requests besides routing that a target's fused experts ignore; see `oracle.around`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.around import Answer, Request, Response
from pytest_moe_routing.oracle.target import Target


@dataclass(frozen=True)
class Ignored:
    """A request that a scheme's experts ignore, and the models that are served so."""

    request: Request
    response: Response
    models: tuple[str, ...]


def ignored_requests(
    target: Target, scheme: str, models: Iterable[ModelSpec]
) -> list[Ignored] | None:
    """Return each request that the experts of a scheme ignore, for the models that they accept.

    None if they accept none of the models.

    Raises:
        Unsupported: The target cannot answer for a model that could be asked about.
    """
    found: dict[tuple[Request, Response], list[str]] = {}
    reason: Unsupported | None = None
    answered = False
    for model in models:
        try:
            method = target.classify(model).method
            if not all(gate.ok for gate in target.gates(model, scheme, method)):
                continue
            responses = target.around(model, scheme, method)
        except Unsupported as error:
            reason = error
            continue
        answered = True
        for request, response in responses.items():
            if response.answer is Answer.IGNORED:
                found.setdefault((request, response), []).append(model.id)
    if not answered and reason is not None:
        raise reason
    return [Ignored(*key, tuple(ids)) for key, ids in found.items()] if answered else None
