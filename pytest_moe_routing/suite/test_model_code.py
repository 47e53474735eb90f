"""What the framework's own model code asks of its MoE layer is what the model's router does."""

from __future__ import annotations

from pytest_moe_routing.report.failures import fail
from pytest_moe_routing.suite.skips import unsupported_is_skipped


def test_model_code(moe_framework, moe_model, moe_property):
    """Scores, bias, groups, experts, weights, scale and dtypes; each scale is applied once."""
    from pytest_moe_routing.oracle.model_code import compare_request
    from pytest_moe_routing.suite.causes import of_model_code

    with unsupported_is_skipped():
        judgement = compare_request(moe_model, moe_framework.layer_request(moe_model))
    if judgement.findings:
        fail(moe_property, [of_model_code(judgement)])
