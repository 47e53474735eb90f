"""The builtin target's decisions, and the reference's numbers, are what was reviewed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from pytest_moe_routing import goldens
from pytest_moe_routing.errors import Unsupported

if TYPE_CHECKING:
    from pytest_moe_routing.models import ModelSpec

# Goldens are the builtin target's: this fixture leaves the module out for any other.
pytestmark = pytest.mark.usefixtures("_moe_golden")


def test_router(moe_model: ModelSpec, _moe_golden: Callable[[str], None]) -> None:
    """What a model says of its router, and how it is classified in each FlashInfer release."""
    _moe_golden(goldens.ROUTER)


def test_routing(moe_model: ModelSpec, _moe_golden: Callable[[str], None]) -> None:
    """Which experts, with which weights, for named logits."""
    if moe_model.router.not_expressible:
        pytest.skip("no recipe computes this router")
    _moe_golden(goldens.ROUTING)


def test_scheme(moe_model: ModelSpec, moe_scheme: str, _moe_golden: Callable[[str], None]) -> None:
    """Gates and verdict of a scheme in each FlashInfer release."""
    try:
        _moe_golden(moe_scheme)
    except Unsupported as reason:
        pytest.fail(f"{reason}; without a verdict, the scheme has no golden", pytrace=False)


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
