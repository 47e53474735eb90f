"""The builtin target's decisions, and the reference's numbers, are what was reviewed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pytest_moe_routing import goldens
from pytest_moe_routing.errors import MoERoutingError

if TYPE_CHECKING:
    from pytest_moe_routing.models import ModelSpec

# Goldens are the builtin target's: this fixture leaves the module out for any other.
pytestmark = pytest.mark.usefixtures("_moe_golden")


def test_router(moe_model: ModelSpec, _moe_golden: Callable[[str, dict[str, Any]], None]) -> None:
    """What a model says of its router, and how it is classified in each FlashInfer release."""
    from pytest_moe_routing.suite import payloads

    _moe_golden(goldens.ROUTER, payloads.router_payload(moe_model))


def test_routing(moe_model: ModelSpec, _moe_golden: Callable[[str, dict[str, Any]], None]) -> None:
    """Which experts, with which weights, for named logits."""
    from pytest_moe_routing.suite import payloads

    if moe_model.router.not_expressible:
        pytest.skip(f"no recipe computes this router: {moe_model.router.not_expressible}")
    try:
        stored = goldens.read(goldens.golden_path(moe_model.folder, goldens.ROUTING))
    except MoERoutingError:
        stored = None
    _moe_golden(goldens.ROUTING, payloads.routing_payload(moe_model, stored))


def test_scheme(
    moe_model: ModelSpec, moe_scheme: str, _moe_golden: Callable[[str, dict[str, Any]], None]
) -> None:
    """Gates and verdict of a scheme in each FlashInfer release."""
    from pytest_moe_routing.suite import payloads

    _moe_golden(moe_scheme, payloads.scheme_payload(moe_model, moe_scheme))


def test_no_stray_goldens(moe_model: ModelSpec) -> None:
    """A golden that no test reads would look like a decision and be none."""
    found = {path.name for path in moe_model.folder.glob(f"*{goldens.SUFFIX}")}
    stray = found - {f"{name}{goldens.SUFFIX}" for name in goldens.names_of(moe_model)}
    if stray:
        names = ", ".join(sorted(stray))
        pytest.fail(f"{moe_model.folder}: no test reads {names}; delete them", pytrace=False)
    if left := goldens.left_by_killed_updates(moe_model.folder):
        names = ", ".join(path.name for path in left)
        message = f"{moe_model.folder}: an update that was killed left {names}; delete them"
        pytest.fail(message, pytrace=False)
