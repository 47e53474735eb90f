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
    """Scores, bias, groups, experts, weights, scale and dtypes; each scale is applied once.

    A config that the framework reads by a class of its own is read by that class, also without each
    key that it may leave out.
    """
    from pytest_moe_routing.oracle.model_code import compare_request
    from pytest_moe_routing.oracle.optional_keys import without_keys
    from pytest_moe_routing.suite.causes import of_left_out_key, of_model_code

    with unsupported_is_skipped():
        judgement = compare_request(moe_model, _moe_framework.layer_request(moe_model))
    failures = [of_model_code(judgement)] if judgement.findings else []
    failures += [of_left_out_key(*found) for found in without_keys(_moe_framework, judgement)]
    fail(_moe_property, failures)
