"""What the target in force makes of every model, judged by computed meaning."""

from __future__ import annotations

import pytest

from pytest_moe_routing.suite.skips import unsupported_is_skipped


def test_verdict(moe_target, moe_model, moe_scheme, record_property, moe_session):
    """A fused kernel runs exactly when it means what the model means.

    The builtin target's known losses (`missed`) are frozen in its goldens; they fail for others.
    """
    from pytest_moe_routing.errors import Unsupported
    from pytest_moe_routing.oracle.judge import judge, unjudged

    with unsupported_is_skipped():
        try:
            found = judge(moe_target, moe_model, moe_scheme)
        except Unsupported as reason:
            no_verdict = unjudged(moe_target, moe_model, moe_scheme, reason)
            record_property("moe_verdict", no_verdict)
            raise
    record_property("moe_verdict", found.as_dict())
    known_loss = moe_session.is_builtin and found.verdict == "missed"
    if not (found.good or known_loss):
        pytest.fail("\n".join(found.lines()), pytrace=False)


def test_method_numbers(moe_target, moe_session):
    """No gate lets a method through under a number that FlashInfer reads as another method."""
    from pytest_moe_routing.oracle.enum_numbers import enum_mismatches

    drift = moe_target.drift()
    if drift:
        pytest.fail(
            "\n".join(("what is known of this FlashInfer is wrong:", *drift)), pytrace=False
        )
    with unsupported_is_skipped():
        problems = enum_mismatches(moe_target, moe_session.cases)
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_modular(moe_framework, moe_scheme, moe_session):
    """Experts that are given ids and weights refuse no router for its method."""
    from pytest_moe_routing.oracle.modular import rejected_by_method

    models = [model for model, scheme in moe_session.cases if scheme == moe_scheme]
    with unsupported_is_skipped():
        problems = rejected_by_method(moe_framework, moe_scheme, models)
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_modular_call(moe_framework, moe_model, moe_scheme):
    """Experts and weights that a layer hands over arrive, with its shard and activation."""
    with unsupported_is_skipped():
        method = moe_framework.classify(moe_model).method
        gates = moe_framework.modular_gates(moe_model, moe_scheme, method)
        refused = [gate for gate in gates if not gate.ok]
        if refused:
            pytest.skip(f"modular experts do not run: {refused[0].name}")
        problems = moe_framework.modular_problems(moe_model, moe_scheme)
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
