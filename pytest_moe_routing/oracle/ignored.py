"""The requests besides routing that fused experts ignore or fail over; see `oracle.around`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.around import Answer, Request, Response
from pytest_moe_routing.oracle.target import Target


@dataclass(frozen=True)
class Ignored:
    """A request that a scheme's experts ignore or fail over, and the models that are served so."""

    request: Request
    response: Response
    models: tuple[str, ...]


@dataclass(frozen=True)
class Requests:
    """What a target's experts for a scheme make of requests besides routing.

    Attributes:
        ignored: Each request that is ignored or fails, for the models that the experts accept.
        answered: For how many models that the experts accept at least one request is judged.
        unanswered: Why the target cannot be asked about how many models, or about one request.
    """

    ignored: tuple[Ignored, ...]
    answered: int
    unanswered: Counter[str]


def ignored_requests(target: Target, scheme: str, models: Iterable[ModelSpec]) -> Requests:
    """Ask about every model of a scheme; models that the experts reject need no answer."""
    found: dict[tuple[Request, Response], list[str]] = {}
    answered, unanswered = 0, Counter[str]()
    for model in models:
        try:
            method = target.classify(model).method
            if not all(gate.ok for gate in target.gates(model, scheme, method)):
                continue
            responses = target.around(model, scheme, method)
        except Unsupported as reason:
            unanswered[str(reason)] += 1
            continue
        answered += any(each.answer is not Answer.NOT_JUDGED for each in responses.values())
        for request, response in responses.items():
            if response.answer is Answer.NOT_JUDGED:
                unanswered[f"{request}: {response.why}"] += 1
            elif response.answer in (Answer.IGNORED, Answer.FAILED):
                found.setdefault((request, response), []).append(model.id)
    ignored = tuple(Ignored(*key, tuple(ids)) for key, ids in found.items())
    return Requests(ignored, answered, unanswered)
