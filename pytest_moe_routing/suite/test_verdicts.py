"""What the target makes of every model, judged by computed meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pytest_moe_routing.report.failures import fail
from pytest_moe_routing.report.unanswered import (
    AROUND,
    CHECKPOINTS,
    FORMATS,
    KEYS,
    LAYOUTS,
    METHODS,
    NAMED,
    OTHERS,
    PLACES,
    SPLITS,
    TAKEN,
    note,
)
from pytest_moe_routing.suite.skips import skip_without, unsupported_is_skipped

if TYPE_CHECKING:
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.target import Target
    from pytest_moe_routing.session import MoESession


def test_verdict(
    moe_target: Target,
    moe_model: ModelSpec,
    moe_scheme: str,
    _moe_property: Callable[[str, Any], None],
    _moe_session: MoESession,
) -> None:
    """A fused kernel runs exactly when it computes the model's router.

    The builtin target's known losses (`missed`) are frozen in its goldens; they fail for others.
    """
    from pytest_moe_routing.errors import TargetError, Unsupported
    from pytest_moe_routing.oracle.judge import judge, unjudged
    from pytest_moe_routing.suite.causes import of_verdict

    with unsupported_is_skipped():
        try:
            judgement = judge(moe_target, moe_model, moe_scheme)
            record = judgement.record()
        except (Unsupported, TargetError) as reason:
            no_verdict = unjudged(moe_target, moe_model, moe_scheme, reason)
            _moe_property("moe_verdict", no_verdict.as_dict())
            raise
    _moe_property("moe_verdict", record.as_dict())
    note(_moe_property, {NAMED: {judgement.unanswered: 1} if judgement.unanswered else {}})
    known_loss = _moe_session.is_builtin and record.verdict == "missed"
    if record.fails and not known_loss:
        fail(_moe_property, [of_verdict(record)])


def test_method_numbers(
    moe_target: Target, _moe_session: MoESession, _moe_property: Callable[[str, Any], None]
) -> None:
    """No gate accepts a method under a number that FlashInfer reads otherwise."""
    from pytest_moe_routing.oracle.enum_numbers import enum_mismatches
    from pytest_moe_routing.suite.causes import of_enum

    drift = moe_target.drift()
    if drift:
        pytest.fail(
            "\n".join(("the bundled facts about this FlashInfer are wrong:", *drift)), pytrace=False
        )
    with unsupported_is_skipped():
        mismatches = enum_mismatches(moe_target, _moe_session.cases)
    fail(_moe_property, [of_enum(moe_target, mismatch) for mismatch in mismatches])


def test_flashinfer_names(
    _moe_framework: Target, _moe_property: Callable[[str, Any], None]
) -> None:
    """FlashInfer has every name that the framework's MoE code needs, and takes its calls."""
    from pytest_moe_routing.suite.flashinfer_names import of_lacking

    with unsupported_is_skipped():
        lacking = _moe_framework.lacking()
    fail(_moe_property, [of_lacking(_moe_framework, each) for each in lacking])


def test_argument_names(_moe_framework: Target, _moe_property: Callable[[str, Any], None]) -> None:
    """No call of the framework's layers hands over two values in each other's place."""
    from pytest_moe_routing.suite.argument_names import of_crossed

    with unsupported_is_skipped():
        calls = _moe_framework.crossed()
    fail(_moe_property, [of_crossed(_moe_framework, each) for each in calls])


def test_quantization_keys(
    _moe_framework: Target, _moe_property: Callable[[str, Any], None]
) -> None:
    """Experts accept the weights and activations that their release is known to accept."""
    from pytest_moe_routing.oracle.changed_keys import changed_keys
    from pytest_moe_routing.suite.accepted_keys import of_changed_keys

    found = changed_keys(_moe_framework)
    note(_moe_property, {KEYS: found.unanswered})
    skip_without(found, "which quantization keys experts accept is not known of the target")
    fail(_moe_property, [of_changed_keys(_moe_framework, each) for each in found.changed])


def test_quantization_methods(
    _moe_framework: Target, _moe_property: Callable[[str, Any], None]
) -> None:
    """Quantization methods that hand weights to kernels of FlashInfer are run by other tests."""
    with unsupported_is_skipped():
        found = _moe_framework.methods_run()
    note(_moe_property, {METHODS: found.unanswered})
    skip_without(found, "what quantization methods hand to kernels is not known of the target")


def test_checkpoints(
    _moe_framework: Target,
    moe_scheme: str,
    _moe_session: MoESession,
    _moe_property: Callable[[str, Any], None],
) -> None:
    """A published checkpoint is served as the scheme that its quantization config states."""
    from pytest_moe_routing.oracle.served import served_otherwise
    from pytest_moe_routing.suite.checkpoints import of_served

    models = _moe_session.models_in(moe_scheme)
    found = served_otherwise(_moe_framework, moe_scheme, models)
    note(_moe_property, {CHECKPOINTS: found.unanswered})
    skip_without(found, "no format of the scheme's checkpoints is known of the target")
    fail(_moe_property, [of_served(_moe_framework, each) for each in found.wrong])


def test_modular(
    _moe_framework: Target,
    moe_scheme: str,
    _moe_session: MoESession,
    _moe_property: Callable[[str, Any], None],
) -> None:
    """Experts that are given ids and weights do not reject a router for its method."""
    from pytest_moe_routing.oracle.modular import rejected_by_method
    from pytest_moe_routing.suite.causes import of_rejection

    models = _moe_session.models_in(moe_scheme)
    with unsupported_is_skipped():
        rejections = rejected_by_method(_moe_framework, moe_scheme, models)
    fail(_moe_property, [of_rejection(_moe_framework, moe_scheme, r) for r in rejections])


def test_modular_call(
    _moe_framework: Target,
    moe_model: ModelSpec,
    moe_scheme: str,
    _moe_property: Callable[[str, Any], None],
) -> None:
    """Experts and weights that a layer hands over arrive, with its shard and activation."""
    from pytest_moe_routing.suite.causes import of_modular_call

    with unsupported_is_skipped():
        method = _moe_framework.classify(moe_model).method
        gates = _moe_framework.modular_gates(moe_model, moe_scheme, method)
        rejected = [gate for gate in gates if not gate.ok]
        if rejected:
            pytest.skip(f"modular experts do not run: {rejected[0].name}")
        findings = _moe_framework.modular_findings(moe_model, moe_scheme)
        if not findings:
            return
        choice = _moe_framework.choice(moe_model, moe_scheme, method, modular=True)
    fail(_moe_property, [of_modular_call(_moe_framework, moe_model, moe_scheme, findings, choice)])


def test_other_experts(
    _moe_framework: Target,
    moe_scheme: str,
    _moe_session: MoESession,
    _moe_property: Callable[[str, Any], None],
) -> None:
    """Experts and weights arrive in the other kernels that a server may run instead."""
    from pytest_moe_routing.oracle.other_experts import other_calls
    from pytest_moe_routing.suite.causes import of_other_experts
    from pytest_moe_routing.suite.placements import of_lost_others

    models = _moe_session.models_in(moe_scheme)
    found = other_calls(_moe_framework, moe_scheme, models)
    note(_moe_property, {OTHERS: found.unanswered})
    skip_without(found, "no chosen model runs in experts of other kernels")
    causes = [of_other_experts(_moe_framework, moe_scheme, wrong) for wrong in found.wrong]
    causes += [of_lost_others(_moe_framework, moe_scheme, *lost) for lost in found.lost.items()]
    fail(_moe_property, causes)


def test_around_call(
    _moe_framework: Target,
    moe_scheme: str,
    _moe_session: MoESession,
    _moe_property: Callable[[str, Any], None],
) -> None:
    """Experts that route honor or reject padding rows, expert placement and captured ids."""
    from pytest_moe_routing.oracle.ignored import ignored_requests
    from pytest_moe_routing.suite.ignored import of_ignored

    models = _moe_session.models_in(moe_scheme)
    found = ignored_requests(_moe_framework, moe_scheme, models)
    note(_moe_property, {AROUND: found.unanswered})
    skip_without(found, "the experts accept no chosen model")
    fail(_moe_property, [of_ignored(_moe_framework, moe_scheme, each) for each in found.ignored])


def test_layouts(
    _moe_framework: Target,
    moe_scheme: str,
    _moe_session: MoESession,
    _moe_property: Callable[[str, Any], None],
) -> None:
    """Weights and scales lie as the kernel reads them, once a checkpoint is loaded.

    So do those of a rank that has a part of each expert. Checkpoints of the scheme's other formats
    have the same verdict as the usual one.
    """
    from pytest_moe_routing.oracle.formats import unlike_formats
    from pytest_moe_routing.oracle.layouts import wrong_layouts
    from pytest_moe_routing.oracle.shares import wrong_splits
    from pytest_moe_routing.suite.causes import of_format, of_layout, of_other_experts
    from pytest_moe_routing.suite.shares import of_split

    models = _moe_session.models_in(moe_scheme)
    found = wrong_layouts(_moe_framework, moe_scheme, models)
    others = unlike_formats(_moe_framework, moe_scheme, models)
    split = wrong_splits(_moe_framework, moe_scheme, models)
    counts = {LAYOUTS: found.unanswered, FORMATS: others.unanswered, SPLITS: split.unanswered}
    note(_moe_property, counts)
    skip_without(found, "no chosen model runs in kernels of this scheme")
    wrong = (*found.wrong, *others.layouts)
    causes = [of_layout(_moe_framework, moe_scheme, each) for each in wrong]
    causes += [of_other_experts(_moe_framework, moe_scheme, each) for each in others.calls]
    causes += [of_split(_moe_framework, moe_scheme, each) for each in split.wrong]
    fail(_moe_property, [*causes, *map(of_format, others.unlike)])


def test_placements(
    _moe_framework: Target,
    moe_scheme: str,
    _moe_session: MoESession,
    _moe_property: Callable[[str, Any], None],
) -> None:
    """Experts run on the GPUs, and however shared out to them, where their release runs them.

    So do other experts than FlashInfer's on one GPU, and those that route accept the methods that
    they compute.
    """
    from pytest_moe_routing.oracle.changed_experts import changed_experts
    from pytest_moe_routing.oracle.moved import moved_placements
    from pytest_moe_routing.suite.placements import of_moved
    from pytest_moe_routing.suite.taken_experts import of_other_class, of_wrong_gate

    models = _moe_session.models_in(moe_scheme)
    with unsupported_is_skipped():
        found = moved_placements(_moe_framework, moe_scheme, models)
        others = changed_experts(_moe_framework, moe_scheme, models)
    note(_moe_property, {PLACES: found.unanswered, TAKEN: others.unanswered})
    skip_without(
        found if found.answered else others, "where experts run is not known of any chosen model"
    )
    causes = [of_moved(_moe_framework, moe_scheme, each) for each in found.moved]
    causes += [of_other_class(_moe_framework, moe_scheme, each) for each in others.changed]
    causes += [of_wrong_gate(_moe_framework, moe_scheme, each) for each in others.gates]
    fail(_moe_property, causes)
