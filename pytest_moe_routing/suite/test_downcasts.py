"""What the target makes less precise than a model's router is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pytest_moe_routing.report.failures import fail
from pytest_moe_routing.suite.skips import unsupported_is_skipped

if TYPE_CHECKING:
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.target import Target


def test_downcasts(
    _moe_framework: Target,
    moe_model: ModelSpec,
    moe_scheme: str,
    _moe_property: Callable[[str, Any], None],
) -> None:
    """Nothing is downcast before a kernel that would have taken it as it is."""
    from pytest_moe_routing.oracle.downcasts import avoidable_downcasts
    from pytest_moe_routing.oracle.judge import judge
    from pytest_moe_routing.suite.causes import of_downcast

    with unsupported_is_skipped():
        judgement = judge(_moe_framework, moe_model, moe_scheme, recorded_only=True)
    if judgement.got is None:
        pytest.skip(f"there is no result of a fused kernel: the verdict is {judgement.verdict}")
    fail(_moe_property, [of_downcast(judgement, d) for d in avoidable_downcasts(judgement)])
