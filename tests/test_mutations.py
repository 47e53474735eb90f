"""Every single change of the builtin target, or of the table of releases, is noticed.

Mutants are made from the code and the data themselves. One is noticed by a golden or a verdict of a
model, by the config sweep, or by what methods make of its routers. Those that are not stand here, each
with the reason why it is none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import mutants
import pytest
from kernel_table import OTHER_EXPERTS, ROUTERS, outcomes, verdicts
from packaging.version import Version

from pytest_moe_routing.flashinfer import FlashInfer, known_releases
from pytest_moe_routing.flashinfer import rules as releases
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle import exact
from pytest_moe_routing.oracle import target as protocol
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.swept_configs import as_model
from pytest_moe_routing.schemes import SCHEMES, SERVED_SCHEMES, kernel_of
from pytest_moe_routing.targets.builtin import gates as experts
from pytest_moe_routing.targets.builtin import target as builtin
from pytest_moe_routing.targets.builtin.target import BuiltinTarget

MODELS = load_models(packaged_directory())
NEWEST = known_releases()[-1]
#: Goldens and tables hold all releases and schemes; these few tell nearly all mutants.
RELEASES = (NEWEST, "0.6.12", "0.6.7", "0.2.9")
SWEPT = [(NEWEST, "fp8_block"), (NEWEST, "fp8_per_tensor"), ("0.6.12", "nvfp4")]


def decided():
    """What goldens and tables freeze of the builtin target, one after the other."""
    targets = {release: BuiltinTarget(FlashInfer.of(release)) for release in RELEASES}
    for target in targets.values():
        for model in MODELS.values():
            for scheme in SERVED_SCHEMES:
                if scheme in model.checkpoints:
                    yield golden(judge(target, model, scheme))
        for scheme in SERVED_SCHEMES:
            yield verdicts(target, scheme, OTHER_EXPERTS)
    for release, scheme in SWEPT:
        yield verdicts(targets[release], scheme, map(as_model, ROUTERS))


def golden(found):
    """What a golden has of a judgement."""
    return (
        found.verdict,
        str(found.classification),
        tuple((g.name, g.reason) for g in found.gates if not g.ok),
        tuple(map(str, found.exact)),
        None if found.call is None else str(found.call),
        None if found.got is None else (str(found.got), found.notes),
    )


@pytest.fixture(scope="module")
def frozen():
    return list(decided())


def is_noticed(frozen):
    """Whether anything notices that the builtin target is not as it was."""
    try:
        return any(now != was for now, was in zip(decided(), frozen, strict=True))
    except Exception:  # A mutant that cannot run is noticed.
        return True


_NO_OTHER_SCORE = "models have no other scoring function; test_classify.py asks for one"
_REFUSED_BEFORE = "the gate for the router weight side has refused, so no call is made"
_NOT_GIVEN = "the tree gives RenormalizeNaive to all that are the same"
_OTHER_RULE = "every such call breaks another rule as well, to the same effect"

#: What is not noticed, by function, and why that is none.
SURVIVORS: dict[str, dict[str, str]] = {
    "tree": {
        "If always False (2)": _NO_OTHER_SCORE,
        "T.Unspecified to RenormalizeNaive (2)": _NO_OTHER_SCORE,
    },
    "before the tree": {
        "And of 3 without operand 1 (1)": "a sigmoid before top-1 means what one after it means",
        "classify with top_k None (1)": "no case of the tree depends on top_k",
    },
    "gates": {
        "Gate 'router logits dtype' always True (1)": "schemes take every dtype that a model has",
    },
    "kernel gates": {
        "Gate 'device' always True (1)": "verdicts are about one device",
    },
    "needs": {
        "If always False (1)": "the tree gives a router with a bias no method that ignores it; "
        "test_targets.py asks the gate",
    },
    "call": {
        "And of 3 without operand 2 (1)": "without an entry point, the gate for the quantization "
        "scheme has refused, so no call is made",
        "And of 3 without operand 3 (1)": _REFUSED_BEFORE,
        "Or of 2 without operand 2 (3)": "the dtype of zeros for a bias: the tree gives methods "
        "that read a bias to routers that have one",
    },
    "schemes": {f"{scheme}: Renormalize": _NOT_GIVEN for scheme in SERVED_SCHEMES},
    "arguments": {"nothing": "that it goes unnoticed shows that the changes are what is noticed"},
    "rules": dict.fromkeys(
        (
            "a float32 bias is read as bfloat16 in 0.6.7 (flashinfer PR 2909) [0.6.7-0.6.8 ]: when without bias",
            "the FP4 launcher accepts at most 256 experts in 0.2.9 [0-0.2.10 nvfp4]: dropped",
            "the FP4 launcher accepts at most 256 experts in 0.2.9 [0-0.2.10 nvfp4]: garbage",
            "the block-scale launcher's rules for DeepSeekV3 [0.6.3- fp8_block mxfp8]: require without n_group",
            "the block-scale launcher's rules for DeepSeekV3 [0.6.3- fp8_block mxfp8]: require without num_experts",
            "the FP4 launcher accepts top_k up to 8 before 0.5.0 [0.2.10-0.5.0 nvfp4 mxfp4]: dropped",
            "the FP4 launcher accepts top_k up to 8 before 0.5.0 [0.2.10-0.5.0 nvfp4 mxfp4]: garbage",
            "the block-scale launcher accepts top_k up to 10 before 0.6.7 [0.5.0-0.6.7 fp8_block mxfp8]: dropped",
            "the block-scale launcher accepts top_k up to 10 before 0.6.7 [0.5.0-0.6.7 fp8_block mxfp8]: garbage",
            # In the releases that are asked here; tests/test_limits.py asks another.
            "the block-scale launcher accepts top_k up to 32 [0.6.7- fp8_block mxfp8]: dropped",
            "the block-scale launcher accepts top_k up to 32 [0.6.7- fp8_block mxfp8]: garbage",
            "the DeepSeek kernel accepts at most 256 experts and top_k 8 before 0.4.1 [0-0.4.1 ]: require without topk_group",
            "the DeepSeek kernel accepts at most 384 experts and top_k 8 before 0.6.3 [0.4.1-0.6.3 ]: require without topk_group",
            "the DeepSeek kernel accepts at most 512 experts and top_k 22 before 0.6.8 [0.6.3-0.6.8 ]: require without topk_group",
        ),
        _OTHER_RULE,
    ),
}

classify_module = importlib.import_module("pytest_moe_routing.targets.builtin.classify")
FUNCTIONS: dict[str, tuple[Callable, tuple]] = {
    "tree": (classify_module.classify, (builtin,)),
    "before the tree": (BuiltinTarget.classify, (BuiltinTarget,)),
    "gates": (experts.support_gates, (experts, builtin)),
    "kernel gates": (exact._kernel_answers, (exact,)),
    "needs": (experts._lost, (experts,)),
    "call": (exact.kernel_call, (exact, experts, protocol)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_change_of_the_builtin_target_is_noticed(name, monkeypatch, frozen):
    function, places = FUNCTIONS[name]
    survivors = []
    for mutant in mutants.of_function(function):
        with monkeypatch.context() as patch:
            # Whose answers are remembered.
            patch.setattr(exact, "_kernel_gates", exact._kernel_gates.__wrapped__)
            for place in places:
                patch.setattr(place, function.__name__, mutant.value)
            if not is_noticed(frozen):
                survivors.append(mutant.name)
    # That the copy goes unnoticed shows that the changes are what is noticed.
    assert survivors == ["unchanged", *SURVIVORS[name]]


def test_a_scheme_that_takes_other_methods_or_dtypes_is_noticed(monkeypatch):
    target = BuiltinTarget(FlashInfer.of(NEWEST))
    survivors = []
    for scheme in SERVED_SCHEMES:
        row, accepts = SCHEMES[scheme], kernel_of(scheme)
        was = verdicts(target, scheme, map(as_model, ROUTERS))
        changed = {m: {"methods": accepts.methods - {m}} for m in sorted(accepts.methods)}
        changed |= {d: {"logits_dtypes": (d,)} for d in accepts.logits_dtypes}
        for name, change in changed.items():
            with monkeypatch.context() as patch:
                patch.setitem(SCHEMES, scheme, replace(row, kernel=replace(accepts, **change)))
                if verdicts(target, scheme, map(as_model, ROUTERS)) == was:
                    survivors.append(f"{scheme}: {name}")
    assert survivors == list(SURVIVORS["schemes"])


CALLS = {
    "nothing": lambda c: {},
    "no scale": lambda c: {"routed_scaling_factor": 1.0},
    "no bias": lambda c: {"bias": "none"},
    "zeros for bias": lambda c: {"bias": "zeros"},
    "groups swapped": lambda c: {"n_group": c.topk_group, "topk_group": c.n_group},
    "no groups": lambda c: {"n_group": 0, "topk_group": 0},
    "no topk_group": lambda c: {"topk_group": 0},
    "no n_group": lambda c: {"n_group": 0},
    "all groups": lambda c: {"topk_group": c.n_group},
    "top_k less one": lambda c: {"top_k": max(c.top_k - 1, 1)},
    "top_k more one": lambda c: {"top_k": c.top_k + 1},
    "weight on the input": lambda c: {"weight_on": "input"},
    "weight on the output": lambda c: {"weight_on": "output"},
    "scale twice": lambda c: {"routed_scaling_factor": c.routed_scaling_factor**2},
    "bias cast to bfloat16": lambda c: {"bias_dtype": "bfloat16"},
    "another method": lambda c: {"method": "Renormalize"},
}


def test_a_change_of_an_argument_is_noticed(monkeypatch, frozen):
    """The gates ask as before; what reaches the kernel is another call."""
    asked, survivors = BuiltinTarget.kernel_call, []
    for name, change in CALLS.items():

        def changed(self, model, scheme, method, change=change):
            call = asked(self, model, scheme, method)
            return replace(call, **change(call))

        with monkeypatch.context() as patch:
            patch.setattr(BuiltinTarget, "kernel_call", changed)
            if not is_noticed(frozen):
                survivors.append(name)
    assert survivors == list(SURVIVORS["arguments"])


def test_a_change_of_a_rule_is_noticed(monkeypatch):
    """The table that is frozen in test_kernel_table.py shows it, in the first, the last or a middle release."""
    rules, survivors = releases._data()["rules"], []
    table = cache(lambda flashinfer, *case: outcomes(flashinfer, *case))
    for place, rule in enumerate(rules):
        ends = [r for r in known_releases() if rule.in_force(Version(r))]
        cases = [
            (flashinfer, scheme, method)
            for flashinfer in dict.fromkeys(FlashInfer.of(ends[i]) for i in (0, len(ends) // 2, -1))
            for scheme in SERVED_SCHEMES
            for method in flashinfer.methods
            if rule.covers(scheme, method) and method != "Unspecified"
        ]
        was = [table(*case) for case in cases]
        for mutant in mutants.of_rule(rule):
            changed = [rule for rule in (mutant.value,) if rule is not None]
            with monkeypatch.context() as patch, fresh_rules():
                patch.setitem(
                    releases._data(), "rules", [*rules[:place], *changed, *rules[place + 1 :]]
                )
                if all(outcomes(*case) == old for case, old in zip(cases, was, strict=True)):
                    survivors.append(mutant.name)
    assert survivors == list(SURVIVORS["rules"])


@contextmanager
def fresh_rules():
    """Rules are compiled anew, inside and after."""
    for compiled in (releases._rules, releases._kernel, releases._honored):
        compiled.cache_clear()
    yield
    for compiled in (releases._rules, releases._kernel, releases._honored):
        compiled.cache_clear()
