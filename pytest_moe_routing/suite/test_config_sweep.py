"""What the target makes of routers that no model has yet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pytest_moe_routing.report.failures import fail
from pytest_moe_routing.report.unanswered import CONCERNED, CONFIGS, note
from pytest_moe_routing.suite.skips import unsupported_is_skipped

if TYPE_CHECKING:
    from pytest_moe_routing.oracle.config_sweep import CachedTarget, Sweep
    from pytest_moe_routing.oracle.target import Target
    from pytest_moe_routing.session import MoESession

pytestmark = pytest.mark.sweep


@pytest.fixture(scope="module")
def cached_target(moe_target: Target) -> CachedTarget:
    from pytest_moe_routing.oracle.config_sweep import CachedTarget

    return CachedTarget(moe_target)


def check(
    sweep: Callable[..., Sweep],
    cached_target: CachedTarget,
    moe_scheme: str,
    _moe_session: MoESession,
    _moe_property: Callable[[str, Any], None],
    *,
    behind_gates: bool = False,
) -> None:
    """Fail for every cause; one that concerns models is that of their verdicts."""
    from pytest_moe_routing.errors import Unsupported
    from pytest_moe_routing.suite.causes import of_sweep

    with unsupported_is_skipped():
        compute = partial(sweep, cached_target, moe_scheme, _moe_session.models_in(moe_scheme))
        found = _moe_session.computed((sweep.__name__, moe_scheme), compute)
        reasons = {CONFIGS: found.unanswered, CONCERNED: found.unanswered_models}
        note(_moe_property, reasons)
        if not found.verdicts:
            nothing = [
                ("no call of the config sweep is stopped only by a gate for the routing method", 0)
            ]
            raise Unsupported((found.unanswered.most_common(1) or nothing)[0][0])
    failures = [f for cause in found.causes for f in of_sweep(cause, behind_gates=behind_gates)]
    fail(_moe_property, failures)


def test_config_sweep(
    cached_target: CachedTarget,
    moe_scheme: str,
    _moe_session: MoESession,
    _moe_property: Callable[[str, Any], None],
) -> None:
    """No router of the config sweep passes all gates and goes wrong, or crashes."""
    from pytest_moe_routing.oracle.config_sweep import sweep

    check(sweep, cached_target, moe_scheme, _moe_session, _moe_property)


def test_behind_gates(
    _moe_framework: Target,
    cached_target: CachedTarget,
    moe_scheme: str,
    _moe_session: MoESession,
    _moe_property: Callable[[str, Any], None],
) -> None:
    """No call that only a gate for the routing method stops would go wrong."""
    from pytest_moe_routing.oracle.config_sweep import sweep_behind_gates

    check(
        sweep_behind_gates,
        cached_target,
        moe_scheme,
        _moe_session,
        _moe_property,
        behind_gates=True,
    )
