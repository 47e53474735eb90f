"""Asks whether a release takes the same experts on every device of the Blackwell family.

The kernels run on compute capability 10.0 (B200, GB200) and 10.3 (B300, GB300). All questions are
asked as on the first; gates and selectors are asked again as on the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.answers import RuleAnswer
from pytest_moe_routing.targets.vllm.probe.choice import (
    default_experts,
    on_capability,
    selector_of,
)
from pytest_moe_routing.targets.vllm.probe.gates import ALL, function_of, gates
from pytest_moe_routing.targets.vllm.probe.rule import rule_of

#: The other capability of the family.
_OTHER = (10, 3)


#: The name of the selector's answer, among those of gates.
_SELECTOR = "selector"


def other_device(model: Mapping[str, Any], scheme: str, method: str) -> dict[str, Any]:
    """Return what becomes of a layer on the other device, as `around` does."""
    here = _answers(model, scheme, method)
    with on_capability(*_OTHER):
        there = _answers(model, scheme, method)
    rules = {}
    for key in _deciding([key for key in here if here[key] != there.get(key)]):
        rule = _rule(model, scheme, method, *key)
        both = f"{here[key]} on 10.0 and {there.get(key)} on 10.3"
        rules[rule["source"]] = f"{rule['name']} answers {both}"
    return {
        "answer": "ignored" if rules else "honored",
        "why": "; ".join(rules.values()) or "all gates and the selector answer as on 10.0",
        "switches": [],
        "source": next(iter(rules), ""),
    }


def _answers(model: Mapping[str, Any], scheme: str, method: str) -> dict[tuple[str, bool], str]:
    """Return the answer of each gate, by its name and whether it is that of modular experts."""
    found = {}
    for modular in (False, True):
        # A scheme may have no modular experts.
        with suppress(Unsupported):
            for name, is_accepted, _ in gates(model, scheme, method, modular):
                found[name, modular] = "yes" if is_accepted else "no"
    selector = selector_of(model, scheme, method)
    if selector is not None:
        found[_SELECTOR, False] = default_experts(selector)
    return found


def _deciding(differing: Sequence[tuple[str, bool]]) -> Sequence[tuple[str, bool]]:
    """Return those that do not differ only because they ask another one that does."""
    single = [key for key in differing if key[0] not in (ALL, _SELECTOR)]
    together = [key for key in differing if key[0] == ALL]
    return single or together or differing


def _rule(
    model: Mapping[str, Any], scheme: str, method: str, name: str, modular: bool
) -> RuleAnswer:
    if name != _SELECTOR:
        return rule_of(function_of(scheme, name, modular=modular))
    selector = selector_of(model, scheme, method)
    assert selector is not None
    return rule_of(selector.function)
