"""The failures of experts that ignore a request besides routing, or that fail over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytest_moe_routing.failure import Failure, Rank, cause_id, few
from pytest_moe_routing.oracle.around import Answer, Request
from pytest_moe_routing.oracle.record import Reach
from pytest_moe_routing.report import text

if TYPE_CHECKING:
    from pytest_moe_routing.oracle.ignored import Ignored
    from pytest_moe_routing.oracle.target import Target

#: Requests that change no result if they are ignored, and what is said of them.
_LATENT: Mapping[Request, str] = {
    # What such rows compute is dropped: they cost time.
    Request.PADDING: f"{Request.PADDING} ignored, as {{why}} ({{reach}})",
    # Whoever reads the error does not learn what to change.
    Request.REASONS: f"{Request.REASONS} not stated: {{why}}",
}

#: Requests to give each rank other experts than a kernel is told: one defect in several places.
_PLACING = (Request.BALANCING, Request.ROUND_ROBIN, Request.UNEVEN)


def of_ignored(target: Target, scheme: str, ignored: Ignored) -> Failure:
    """Return the failure of fused experts that ignore a request besides routing, or that fail."""
    request, response = ignored.request, ignored.response
    reach = text.reached(Reach.OPT_IN, response.switches, by_default=False)
    rank, done, cause = Rank.SILENT, "ignored", cause_id("ignored", request)
    if response.answer is Answer.FAILED:
        rank, done = Rank.LOUD, "fails in the forward pass"
        cause = cause_id("fails", request, response.raised_in)
    elif request in _LATENT:
        told = f"{scheme}: {_LATENT[request].format(why=response.why, reach=reach)}"
        return Failure(cause, Rank.LATENT, scheme, (told,), response.source)
    elif request is Request.DEVICE:
        return _of_device(target, scheme, ignored)
    elif request is Request.BACKEND:
        # Other experts are right as well, and not those that were asked for.
        rank = Rank.MISSED
    at = f"{response.source}: " if response.source else ""
    lines = (
        f"{target}, experts for {scheme}: {request} {done}",
        f"  reach    {reach}",
        f"  because  {at}{response.why}",
    )
    models = ", ".join(ignored.models), few(ignored.models)
    whole, brief = ((*lines, f"  models   {named}") for named in models)
    return Failure(
        cause,
        rank,
        scheme,
        whole,
        response.source,
        site=request if request in _PLACING and rank is Rank.SILENT else "",
        reach=reach,
        brief=brief,
        is_opt_in=True,
    )


def _of_device(target: Target, scheme: str, ignored: Ignored) -> Failure:
    """Return the failure of code that answers otherwise for a further device."""
    request, response = ignored.request, ignored.response
    lines = (
        f"{target}, experts for {scheme}: other answers for {request} than for 10.0",
        "  reach    whoever serves on B300 or GB300",
        f"  because  {response.why}",
        f"  models   {', '.join(ignored.models)}",
        f"  at       {response.source}",
    )
    cause = cause_id("other-device", response.source)
    return Failure(cause, Rank.MISSED, scheme, lines, response.source)
