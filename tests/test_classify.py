"""The classifier's truth table, and the path that it reports."""

from __future__ import annotations

import itertools

import pytest

from pytest_moe_routing.routing import RoutingMethodType
from pytest_moe_routing.targets.builtin.classify import classify, get_routing_method_type

# scoring_func, renormalize, num_expert_group, has_e_score_bias, routed_scaling_factor -> method
TABLE = [
    ("sqrtsoftplus", True, None, True, 1.5, "DeepseekV4"),
    ("sqrtsoftplus", True, None, False, 1.0, "DeepseekV4"),
    ("sqrtsoftplus", False, None, True, 1.0, "Unspecified"),
    ("sigmoid", True, 8, True, 2.5, "DeepSeekV3"),
    ("sigmoid", True, 1, True, 2.5, "DeepSeekV3"),
    ("sigmoid", False, 8, True, 2.5, "Unspecified"),
    ("sigmoid", True, None, True, 1.0, "MiniMax2"),
    ("sigmoid", True, None, True, None, "MiniMax2"),
    ("sigmoid", True, 0, True, 1.0, "MiniMax2"),
    ("sigmoid", True, None, True, 3.0, "Unspecified"),
    ("sigmoid", False, None, True, 1.0, "Unspecified"),
    ("softmax", True, None, True, 1.0, "Unspecified"),
    ("softmax", True, 8, True, 1.0, "Unspecified"),
    ("sigmoid", True, None, False, 1.0, "SigmoidRenorm"),
    ("sigmoid", False, None, False, 1.0, "Sigmoid"),
    ("softmax", True, None, False, 1.0, "RenormalizeNaive"),
    ("softmax", False, None, False, 1.0, "Default"),
    ("tanh", True, None, False, 1.0, "Unspecified"),
    ("tanh", True, 8, True, 1.0, "Unspecified"),
]


@pytest.mark.parametrize("top_k", [1, 8])
@pytest.mark.parametrize(("scoring", "renormalize", "groups", "bias", "scale", "method"), TABLE)
def test_truth_table(scoring, renormalize, groups, bias, scale, top_k, method):
    got = get_routing_method_type(scoring, top_k, renormalize, groups, bias, scale)
    assert got is RoutingMethodType[method]


def test_a_scaled_router_becomes_minimax2_where_that_scales():
    assert classify("sigmoid", 8, True, None, True, 3.0, minimax2_scales=True).method == "MiniMax2"


def test_the_scaling_flag_changes_no_other_decision():
    axes = itertools.product(
        ("softmax", "sigmoid", "sqrtsoftplus", "tanh"),
        (True, False),
        (None, 0, 1, 8),
        (True, False),
        (None, 1.0, 2.5),
    )
    for scoring, renormalize, groups, bias, scale in axes:
        before = classify(scoring, 8, renormalize, groups, bias, scale).method
        after = classify(scoring, 8, renormalize, groups, bias, scale, minimax2_scales=True).method
        scaled_minimax = (scoring, renormalize, bias, scale) == (
            "sigmoid",
            True,
            True,
            2.5,
        ) and not groups
        assert (before != after) == scaled_minimax


def test_the_path_is_the_questions_that_were_asked():
    assert classify("sigmoid", 8, True, None, True, 3.0).path == (
        "scoring_func is sigmoid",
        "e_score_correction_bias",
        "renormalize",
        "not num_expert_group > 0",
        "not routed_scaling_factor is 1",
    )


def test_numbers_are_those_of_the_newest_flashinfer():
    from pytest_moe_routing.flashinfer import FlashInfer, known_releases

    newest = FlashInfer.of(known_releases()[-1])
    kernel_methods = [member for member in RoutingMethodType if member < 100]
    assert [member.name for member in kernel_methods] == list(newest.methods)
