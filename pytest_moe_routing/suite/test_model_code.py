"""What the framework's own model code asks of its MoE layer is what the model's router does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.report.failures import fail
from pytest_moe_routing.suite.skips import unsupported_is_skipped

if TYPE_CHECKING:
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.target import Target


def test_model_code(
    _moe_framework: Target, moe_model: ModelSpec, _moe_property: Callable[[str, Any], None]
) -> None:
    """Scores, bias, groups, experts, weights, scale and dtypes; each scale is applied once."""
    from pytest_moe_routing.oracle.model_code import compare_request
    from pytest_moe_routing.suite.causes import of_model_code

    with unsupported_is_skipped():
        judgement = compare_request(moe_model, _moe_framework.layer_request(moe_model))
    if judgement.findings:
        fail(_moe_property, [of_model_code(judgement)])
