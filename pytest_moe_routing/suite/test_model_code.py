"""What the framework's own model code asks of its MoE layer is what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.report.failures import fail
from pytest_moe_routing.report.unanswered import FILES, REQUESTS, SPLIT, WEIGHTS, note
from pytest_moe_routing.suite.skips import unsupported_is_skipped

if TYPE_CHECKING:
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.model_code import CodeJudgement
    from pytest_moe_routing.oracle.target import Target


def test_model_code(
    _moe_framework: Target, moe_model: ModelSpec, _moe_property: Callable[[str, Any], None]
) -> None:
    """Scores, bias, groups, experts, weights, scale and dtypes; each scale is applied once.

    The parameters of the experts' activation are compared where the model code states them. A block
    with experts for each kind of token is asked about each kind. Layers that differ from the others
    are asked about as well, at both ends.

    Shared experts are whole on each rank that has tokens of its own. The weights of gate, up and
    down are loaded into their own places.

    A config that the framework reads by a class of its own is read by that class, also without each
    key that it may leave out.
    """
    from pytest_moe_routing.errors import Unsupported
    from pytest_moe_routing.oracle.model_code import compare_requests
    from pytest_moe_routing.oracle.optional_keys import without_keys
    from pytest_moe_routing.suite.causes import of_left_out_key, of_model_code, of_split_experts
    from pytest_moe_routing.suite.weight_names import of_misnamed

    failures, unanswered = [], {}
    try:
        split = _moe_framework.split_shared_experts(moe_model)
        failures = [] if split is None else [of_split_experts(moe_model, split)]
    except Unsupported as reason:
        unanswered[SPLIT] = {str(reason): 1}
    with suppress(Unsupported):
        # Where the models of a release are not known, the next question says so.
        weights = _moe_framework.misnamed_weights(moe_model)
        failures += of_misnamed(moe_model, (each for each in weights if each.own))
        unknown = [f"{each.file}:{each.line}: {each.name}" for each in weights if not each.own]
        unanswered[WEIGHTS] = dict.fromkeys(unknown, 1)
    judgements: list[CodeJudgement] = []
    with unsupported_is_skipped():
        try:
            request = _moe_framework.layer_request(moe_model)
            judgements = [*compare_requests(moe_model, request)]
        except Unsupported as reason:
            # A skip would hide what was found before.
            if not failures:
                raise
            unanswered[REQUESTS] = {str(reason): 1}
    open_ones = {each.unanswered: 1 for each in judgements if each.unanswered is not None}
    for layers, variant in moe_model.variants().items():
        if not layers:
            continue
        try:
            judgements += compare_requests(variant, _moe_framework.layer_request(variant))
        except Unsupported as reason:
            open_ones[str(reason)] = 1
    if open_ones:
        unanswered[REQUESTS] = open_ones
    note(_moe_property, unanswered)
    failures += [of_model_code(part) for each in judgements for part in each.by_effect()]
    for judgement in judgements[:1]:
        failures += [of_left_out_key(*found) for found in without_keys(_moe_framework, judgement)]
    fail(_moe_property, failures)


def test_transformers_backend(
    _moe_framework: Target, moe_model: ModelSpec, _moe_property: Callable[[str, Any], None]
) -> None:
    """The same of the layer that the framework puts into transformers' own code of a model."""
    from pytest_moe_routing.oracle.model_code import compare_request
    from pytest_moe_routing.suite.causes import of_model_code

    with unsupported_is_skipped():
        request = _moe_framework.backend_request(moe_model)
        # Where transformers' own code routes, `--moe-target transformers` judges it.
        judged = [] if request is None else [compare_request(moe_model, request)]
    fail(_moe_property, [of_model_code(part) for each in judged for part in each.by_effect()])


def test_model_files(_moe_framework: Target, _moe_property: Callable[[str, Any], None]) -> None:
    """The files of models that make layers of experts are run for packaged models."""
    with unsupported_is_skipped():
        files = _moe_framework.files_not_run()
    note(_moe_property, {FILES: dict.fromkeys(files, 1)})
