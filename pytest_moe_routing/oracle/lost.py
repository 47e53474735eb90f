"""Cases that lost their fused kernel: the target is known to run it, and no longer does."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.oracle.choice import Expected, Rule
from pytest_moe_routing.oracle.judgement import Judgement
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.oracle.verdict import Verdict


def held_to_expectation(target: Target, judgement: Judgement) -> Judgement:
    """Return a judgement that states whether its case lost the fused kernel, and to which code."""
    model, scheme = judgement.model, judgement.scheme
    expected = target.expected(model, scheme)
    if expected is None or not _is_lost(judgement, expected):
        return judgement
    gate = next((gate.name for gate in judgement.rejections), "")
    rule = Rule()
    with suppress(Unsupported):
        rule = target.rule(model, scheme, judgement.classification.method, gate)
    return replace(judgement, lost_since=expected.release, rule=rule)


def _is_lost(judgement: Judgement, expected: Expected) -> bool:
    """Return whether a kernel that would be exact does not run, or no longer by default.

    A kernel that is wrong or crashes fails as that. Where no kernel of the FlashInfer release is
    exact, the target is right to reject the model.
    """
    if judgement.verdict is Verdict.EXACT:
        return expected.by_default and bool(judgement.opt_in)
    return judgement.verdict is Verdict.MISSED
