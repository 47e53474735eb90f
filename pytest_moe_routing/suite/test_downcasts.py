"""What the target in force makes less precise than a model's router is."""

from __future__ import annotations

import pytest

from pytest_moe_routing.suite.skips import unsupported_is_skipped


def test_downcasts(moe_framework, moe_model, moe_scheme):
    """Nothing is rounded on the way to a kernel that would have taken it as it is."""
    from pytest_moe_routing.oracle.downcasts import avoidable_downcasts, lines
    from pytest_moe_routing.oracle.judge import judge

    with unsupported_is_skipped():
        found = judge(moe_framework, moe_model, moe_scheme, recorded_only=True)
    if found.got is None:
        pytest.skip(f"no kernel runs: {found.verdict}")
    lost = avoidable_downcasts(found)
    if lost:
        pytest.fail("\n".join(lines(found, lost)), pytrace=False)
