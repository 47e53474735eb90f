"""What the framework's own routers compute, where no fused kernel routes.

One case for each router; a failure lists each cause once, by function and field.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pytest

from pytest_moe_routing.failure import Failure
from pytest_moe_routing.report.failures import fail
from pytest_moe_routing.report.unanswered import MODELS, ROUTERS, note
from pytest_moe_routing.suite.causes import of_router
from pytest_moe_routing.suite.skips import unsupported_is_skipped

if TYPE_CHECKING:
    from pytest_moe_routing.oracle.target import Target
    from pytest_moe_routing.session import MoESession


def test_router(
    _moe_framework: Target,
    moe_router: str,
    _moe_session: MoESession,
    _moe_property: Callable[[str, Any], None],
) -> None:
    """Experts and weights are the model's, whichever function of the framework chose them."""
    from pytest_moe_routing.oracle.routers import WRONG

    found = find(_moe_framework, moe_router, _moe_session, WRONG, _moe_property)
    fail(_moe_property, found)


def test_router_precision(
    _moe_framework: Target,
    moe_router: str,
    _moe_session: MoESession,
    _moe_property: Callable[[str, Any], None],
) -> None:
    """Nothing is computed in bfloat16 that decides about experts, or more than rounds weights."""
    from pytest_moe_routing.oracle.routers import PRECISION

    fail(_moe_property, find(_moe_framework, moe_router, _moe_session, (PRECISION,)))


def find(
    framework: Target,
    router: str,
    session: MoESession,
    kinds: Iterable[str],
    record_property: Callable[[str, Any], None] | None = None,
) -> list[Failure]:
    """Return the failures of these kinds, one for each cause; skip where nothing is judged.

    Args:
        record_property: Is told what is not judged: runs of this router, and with the first router
            also models without any run.
    """
    from pytest_moe_routing.oracle.routers import NOT_JUDGED, causes

    with unsupported_is_skipped():
        runs = [run for run in framework.router_runs(session.models) if run.router == router]
    if record_property is not None:
        open_runs = Counter(d.text for r in runs for d in r.deviations if d.kind == NOT_JUDGED)
        chosen = {model.id for model in session.models} if router == session.routers[0] else set()
        refused = {id: why for id, why in framework.refused_models().items() if id in chosen}
        note(record_property, {ROUTERS: open_runs, MODELS: Counter(refused.values())})
    if not runs:
        pytest.skip(f"{framework}: no chosen model and no configuration reaches {router}")
    found = sorted(map(of_router, causes(runs, kinds)), key=lambda failure: failure.rank)
    judged = [run for run in runs if not any(d.kind == NOT_JUDGED for d in run.deviations)]
    if not judged and not found:
        reasons = dict.fromkeys(d.text for run in runs for d in run.deviations)
        pytest.skip("; ".join(reasons))
    # Of those with one id, the most urgent.
    return list({failure.cause: failure for failure in reversed(found)}.values())
