"""What the framework's own routers compute, where no fused kernel routes.

One case for each router; a failure lists each cause once, by function and field.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pytest

from pytest_moe_routing.suite.skips import unsupported_is_skipped

if TYPE_CHECKING:
    from pytest_moe_routing.oracle.target import Target
    from pytest_moe_routing.session import MoESession


def test_router(_moe_framework: Target, moe_router: str, _moe_session: MoESession) -> None:
    """Experts and weights are the model's, whichever function of the framework chose them."""
    from pytest_moe_routing.oracle.routers import WRONG

    check(_moe_framework, moe_router, _moe_session, WRONG)


def test_router_precision(
    _moe_framework: Target, moe_router: str, _moe_session: MoESession
) -> None:
    """Nothing is computed in bfloat16 that decides about experts, or more than rounds weights."""
    from pytest_moe_routing.oracle.routers import PRECISION

    check(_moe_framework, moe_router, _moe_session, (PRECISION,))


def check(framework: Target, router: str, session: MoESession, kinds: Iterable[str]) -> None:
    """Fail with the causes of these kinds; skip where nothing was judged."""
    from pytest_moe_routing.oracle.routers import NOT_JUDGED, causes

    with unsupported_is_skipped():
        runs = [run for run in framework.router_runs(session.models) if run.router == router]
    if not runs:
        pytest.skip(f"{framework}: no chosen model and no configuration reaches {router}")
    found = causes(runs, kinds)
    if found:
        pytest.fail("\n\n".join("\n".join(cause.lines()) for cause in found), pytrace=False)
    judged = [run for run in runs if not any(d.kind == NOT_JUDGED for d in run.deviations)]
    if not judged:
        reasons = dict.fromkeys(d.text for run in runs for d in run.deviations)
        pytest.skip("; ".join(reasons))
