"""What the framework's own model code asks of its MoE layer is what the model's router does."""

from __future__ import annotations

import pytest

from pytest_moe_routing.suite.skips import unsupported_is_skipped


def test_model_code(moe_framework, moe_model):
    """Scores, bias, groups, experts, weights, scale and dtypes; each scale is applied once."""
    from pytest_moe_routing.oracle.model_code import compare_request

    with unsupported_is_skipped():
        found = compare_request(moe_model, moe_framework.layer_request(moe_model))
    if found.problems:
        pytest.fail("\n".join(found.lines()), pytrace=False)
