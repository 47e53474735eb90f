"""The table of FlashInfer's releases: sound in itself, and true to the packages that are here."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import resources
from itertools import product

import pytest
import yaml
from packaging.version import Version

from pytest_moe_routing.errors import DataError, ReleaseError
from pytest_moe_routing.flashinfer import FlashInfer, KernelCall, known_releases, rules
from pytest_moe_routing.flashinfer.check import check_data
from pytest_moe_routing.flashinfer.grammar import in_words
from pytest_moe_routing.flashinfer.rules import _data
from pytest_moe_routing.routing import METHODS, RoutingMethodType
from pytest_moe_routing.schemes import SERVED_SCHEMES, kernel_of

RULES = _data()["rules"]


def calls_of(rule, flashinfer):
    """Calls on both sides of every number that a rule speaks of, as a scheme would make them."""
    said = " ".join([*rule.when, *rule.require, *rule.when.values(), *rule.require.values()])
    numbers = {int(n) for n in re.findall(r"\d+", said)}
    near = sorted({0, 1, 4, 8, *numbers, *(n + 1 for n in numbers), *(n + 4 for n in numbers)})
    grouped = "group" in said or "kept" in said
    choices = {
        "scheme": [b for b in rule.schemes or SERVED_SCHEMES if flashinfer.entry_point(b)],
        "method": [m for m in rule.methods or flashinfer.methods if m != "Unspecified"],
        "num_experts": [n for n in (*near, 64, 256) if n > 1],
        "top_k": [n for n in near if n > 0],
        "n_group": [0, *(n for n in near if n > 0)] if grouped else [0],
        "topk_group": [0, *(n for n in near if 0 < n < 9)] if grouped else [0],
        "logits_dtype": ["float32", "bfloat16", "float16"],
        "bias": ["none", "router"],
        "bias_dtype": ["float32", "bfloat16"],
        "weight_on": ["output", "input"],
    }
    for values in product(*choices.values()):
        yield KernelCall(**dict(zip(choices, values, strict=True)))


def rule_of(data, method):
    """The first row about one method alone."""
    return next(row for row in data["rules"] if row.get("methods") == [method])


def is_reached(rule, release):
    flashinfer = FlashInfer.of(release)
    for made in calls_of(rule, flashinfer):
        if rule in [violation.rule for violation in flashinfer.violations(made)]:
            return True
        if not rule.effect and (
            rule.note in flashinfer.notes(made) or rule.fact in flashinfer.facts(made)
        ):
            return True
    return False


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.fact[:60])
def test_every_rule_is_reached_by_a_call(rule):
    assert any(is_reached(rule, r) for r in known_releases() if rule.in_force(Version(r)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["releases"].reverse(), "releases: expected oldest first"),
        (lambda d: d["numbers"].update({"0.6.10": ["Default"]}), "numbers at 0.6.10: found release '0.6.10'"),
        (lambda d: d["numbers"].update({"0.7.0": ["Renormalise"]}), "found method 'Renormalise', expected one of Default"),
        (lambda d: d["devices"].update({"0.1": [9]}), "devices: found release '0.1'"),
        (lambda d: d["entry_points"].update(int4={}), "found scheme 'int4', expected one of fp8_block"),
        (lambda d: d["entry_points"]["bf16"].update(since="0.5.2"), "entry point of bf16: found release '0.5.2'"),
        (lambda d: d["entry_points"]["bf16"].update(since="0.4.1"), "found function 'trtllm_bf16_moe', expected one of"),
        (lambda d: d["entry_points"]["bf16"].update(weight_on=["both"]), "found weight side 'both'"),
        (lambda d: d["entry_points"]["bf16"]["activations"].update(selu="0.6.0"), "found activation 'selu'"),
        (lambda d: d["entry_points"]["bf16"].pop("multiple_of"), "entry point of bf16: has no multiple_of"),
        (lambda d: d["rules"][0].update(untl="0.6.8"), "found field 'untl', expected one of fact, since"),
        (lambda d: d["rules"][0].pop("fact"), "rule 1 (no fact): has no fact"),
        (lambda d: d["rules"][0].update(fact=d["rules"][1]["fact"]), "expected one of its own"),
        (lambda d: d["rules"][0].update(until="0.6.9"), "found release '0.6.9'"),
        (lambda d: d["rules"][0].update(schemes=["fp4"]), "found scheme 'fp4'"),
        (lambda d: d["rules"][0].update(methods=["Softmax"]), "found method 'Softmax'"),
        (lambda d: d["rules"][0].update(effect="wrong"), "found effect 'wrong', expected one of error, garbage"),
        (lambda d: d["rules"][0].pop("effect"), "has no effect"),
        (lambda d: d["rules"][0].update(recipe={"skale": 1}), "found recipe field 'skale'"),
        (lambda d: d["rules"][0].update(ignores=["scale"]), "found argument 'scale', expected one of bias, n_group, topk_group, routed_scaling_factor"),
        (lambda d: rule_of(d, "MiniMax2").update(ignores=["weight_on"]), "found argument 'weight_on'"),
        (lambda d: rule_of(d, "MiniMax2").update(ignores=["n_group"]), "MiniMax2 ignores n_group in all releases"),
        (lambda d: rule_of(d, "MiniMax2").update(methods=["DeepSeekV3"], ignores=["n_group"]), "found one of n_group and topk_group in ignores"),
        (lambda d: rule_of(d, "MiniMax2").pop("methods"), "has no methods, whose recipe it would change"),
        (lambda d: rule_of(d, "MiniMax2").update(methods=["Unspecified"]), "Unspecified has no recipe to change"),
        (lambda d: rule_of(d, "MiniMax2").update(recipe={"score": "sigmoid"}), "the recipe of MiniMax2 has these fields anyway"),
        (lambda d: rule_of(d, "MiniMax2").update(recipe={"score": "tanh"}), "Recipe.score: found 'tanh', expected one of"),
        (lambda d: d["rules"][0].update(when={"experts": "<=8"}), "found name in when 'experts'"),
        (lambda d: d["rules"][0].update(when={"top_k": 8}), "when top_k: found 8, expected such as"),
        (lambda d: d["rules"][0].update(when={"top_k": "8"}), "when top_k: found '8', expected such as"),
        (lambda d: d["rules"][0].update(when={"top_k": "<=experts"}), "found <=experts, expected a number or a name"),
        (lambda d: d["rules"][0].update(when={"bias": "<none"}), "found operator '<'"),
        (lambda d: d["rules"][0].update(require={"bias_dtype": "==fp32"}), "found value 'fp32', expected one of float32"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_are_one_clear_error(change, message):
    data = yaml.safe_load(
        resources.files("pytest_moe_routing.flashinfer")
        .joinpath("releases.yaml")
        .read_text("utf-8")
    )
    check_data(data)
    change(data)
    with pytest.raises(DataError, match=f"^releases.yaml, .*{re.escape(message)}"):
        check_data(data)


def test_every_backend_has_an_entry_point():
    assert set(_data()["entry_points"]) == set(SERVED_SCHEMES)


@pytest.mark.parametrize(
    ("asked", "judged_as"),
    [
        ("0.6.12", "0.6.12"),
        ("0.6.10.post1", "0.6.8"),
        ("0.6.7.post3", "0.6.7"),
        ("0.6.18rc4", "0.6.17"),
        ("9.9", known_releases()[-1]),
    ],
)
def test_a_release_in_between_is_judged_as_the_one_before(asked, judged_as):
    assert FlashInfer.of(asked).judged_as == judged_as


def test_the_installed_release_is_judged_before_the_newest_known(monkeypatch):
    monkeypatch.setattr(rules, "installed_release", lambda: "0.6.12")
    assert FlashInfer.of().release == "0.6.12"
    monkeypatch.setattr(rules, "installed_release", lambda: None)
    assert FlashInfer.of().release == known_releases()[-1]


@pytest.mark.parametrize("release", ["0.2.8", "newest", "1.x"])
def test_releases_that_cannot_be_judged(release):
    with pytest.raises(ReleaseError):
        FlashInfer.of(release)


def test_numbers_move():
    unspecified = {
        r: FlashInfer.of(r).number("Unspecified")
        for r in ("0.2.9", "0.6.0", "0.6.8", "0.6.12", "0.7.0")
    }
    assert list(unspecified.values()) == [5, 6, 8, 9, 10]
    assert FlashInfer.of("0.6.0").method(6) == "Unspecified"
    assert FlashInfer.of("0.6.8").method(6) == "SigmoidRenorm"
    assert FlashInfer.of("0.6.8").method(100) is None


def call(**changes):
    base = KernelCall(
        scheme="fp8_block",
        method="DeepSeekV3",
        num_experts=256,
        top_k=8,
        logits_dtype="float32",
        n_group=8,
        topk_group=4,
        bias="router",
        routed_scaling_factor=2.5,
    )
    return replace(base, **changes)


def effects(release, **changes):
    return {v.rule.effect for v in FlashInfer.of(release).violations(call(**changes))}


@pytest.mark.parametrize("release", [r for r in known_releases() if r != "0.6.7"])
def test_deepseek_r1_runs_on_the_block_scale_kernel_of_every_release(release):
    assert effects(release) == set()


FLAT = {"n_group": 0, "topk_group": 0}


@pytest.mark.parametrize(
    ("release", "changes", "wanted"),
    [
        # rows of known-bugs: fp32-bias-as-bf16, minimax tiers, all-negative-topk, per method limits
        ("0.6.7", {}, {"garbage"}),
        ("0.6.7", {"bias_dtype": "bfloat16"}, set()),
        ("0.7.0", {"logits_dtype": "float16"}, {"error"}),
        ("0.7.0", {"n_group": 16}, {"error"}),
        ("0.7.0", {"topk_group": 5}, {"error"}),
        ("0.7.0", {"num_experts": 512}, {"error"}),
        ("0.7.0", {"top_k": 9}, {"error"}),
        ("0.7.0", {"n_group": 0, "topk_group": 0}, {"error"}),
        ("0.7.0", {"n_group": 1, "topk_group": 1}, set()),
        ("0.7.0", {"n_group": 1, "topk_group": 1, "bias": "none"}, {"garbage"}),
        ("0.7.0", {"method": "MiniMax2", **FLAT}, set()),
        ("0.6.7", {"method": "MiniMax2", **FLAT}, {"error"}),
        ("0.7.0", {"method": "Default", **FLAT, "bias": "none"}, set()),
        ("0.6.7", {"method": "Default", **FLAT, "bias": "none", "logits_dtype": "bfloat16"}, {"error"}),
        ("0.6.12", {"method": "Sigmoid", **FLAT, "num_experts": 512}, {"garbage"}),
        ("0.6.16", {"method": "Sigmoid", **FLAT, "num_experts": 512}, {"error"}),
        ("0.6.3", {"method": "Renormalize", **FLAT, "logits_dtype": "bfloat16"}, {"garbage"}),
        ("0.6.3", {"method": "Renormalize", **FLAT, "logits_dtype": "bfloat16", "top_k": 10}, set()),
        ("0.6.3", {"method": "Renormalize", **FLAT, "logits_dtype": "bfloat16", "num_experts": 128}, set()),
        ("0.6.7", {"method": "Renormalize", **FLAT, "logits_dtype": "bfloat16"}, set()),
        ("0.6.7", {"method": "Renormalize", **FLAT}, {"error"}),
        ("0.6.7", {"method": "Renormalize", **FLAT, "scheme": "nvfp4"}, {"garbage"}),
        ("0.7.0", {"method": "Renormalize", **FLAT}, set()),
        ("0.7.0", {"method": "Llama4", **FLAT, "top_k": 1, "num_experts": 256}, {"error"}),
        ("0.7.0", {"method": "Llama4", **FLAT, "top_k": 1, "num_experts": 128}, set()),
        ("0.7.0", {"method": "Sigmoid", "n_group": 8, "topk_group": 4}, {"error"}),
        ("0.7.0", {"method": "Unspecified"}, {"error"}),
        # bf16 passes no scaling factor in 0.5.3; bf16 and mxint4 read logits in a dtype of their own
        ("0.5.3", {"scheme": "bf16"}, {"garbage"}),
        ("0.6.0", {"scheme": "bf16"}, set()),
        ("0.6.0", {"scheme": "bf16", "logits_dtype": "bfloat16"}, {"garbage"}),
        ("0.6.8", {"scheme": "bf16", "logits_dtype": "bfloat16"}, set()),
        ("0.6.6", {"scheme": "mxint4", "method": "TopK", **FLAT, "num_experts": 128}, {"error", "garbage"}),
        ("0.6.8", {"scheme": "bf16", **FLAT}, set()),
        # mxint4 takes no float32 bias before 0.6.18
        ("0.6.17", {"scheme": "mxint4"}, {"error"}),
        ("0.6.17", {"scheme": "mxint4", "bias_dtype": "bfloat16"}, set()),
        ("0.6.18", {"scheme": "mxint4"}, set()),
        # the FP4 launcher takes float32 logits of DeepSeekV3 alone, and any top_k up to 8, from 0.2.10 on
        ("0.2.10", {"scheme": "mxfp4", "method": "Renormalize", **FLAT, "num_experts": 32, "top_k": 4, "logits_dtype": "bfloat16", "bias": "none"}, set()),
        ("0.2.9", {"scheme": "nvfp4", "method": "Renormalize", **FLAT, "num_experts": 32, "top_k": 4, "logits_dtype": "bfloat16", "bias": "none"}, {"error"}),
        # as many experts as the DeepSeek kernel's largest top_k
        ("0.6.7", {"bias_dtype": "bfloat16", "num_experts": 16, "n_group": 1, "topk_group": 1}, {"error"}),
        ("0.6.8", {"num_experts": 16, "n_group": 1, "topk_group": 1}, set()),
        ("0.7.0", {"method": "DeepseekV4"}, {"error"}),
    ],
)  # fmt: skip
def test_known_limits_and_defects(release, changes, wanted):
    assert effects(release, **changes) == wanted


def test_minimax2_honours_the_scale_from_0_6_13_on():
    minimax = call(method="MiniMax2", **FLAT)
    scales = {
        r: FlashInfer.of(r).recipe(minimax).scale for r in ("0.6.8", "0.6.12", "0.6.13", "0.7.0")
    }
    assert list(scales.values()) == [1.0, 1.0, 2.5, 2.5]
    assert not FlashInfer.of("0.6.7").honors("MiniMax2", "routed_scaling_factor")


def test_only_the_grouped_kernel_rounds_the_bias():
    flashinfer = FlashInfer.of(known_releases()[-1])
    assert flashinfer.recipe(call()).bias_dtype == "bfloat16"
    assert flashinfer.recipe(call(n_group=1, topk_group=1)).bias_dtype == "float32"
    assert "rounded to bfloat16" in " ".join(flashinfer.notes(call()))


def test_arguments_that_a_method_ignores_have_no_effect():
    sigmoid = FlashInfer.of("0.7.0").recipe(call(method="Sigmoid"))
    assert (sigmoid.bias, sigmoid.scale, sigmoid.n_group) == (False, 1.0, 1)


@pytest.mark.parametrize("release", known_releases())
def test_entry_points_take_the_arguments_that_calls_have(release):
    flashinfer = FlashInfer.of(release)
    for scheme in SERVED_SCHEMES:
        entry = flashinfer.entry_point(scheme)
        if entry is None:
            continue
        takes = set(flashinfer.signature(kernel_of(scheme).function()).parameters)
        assert {"routing_logits", "routing_bias", "top_k", "n_group", "topk_group"} <= takes
        # The per-channel launcher takes the argument, and drops the weights: a rule says so.
        ignored = scheme == "fp8_per_channel"
        assert ("use_routing_scales_on_input" in takes) == ("input" in entry.weight_on or ignored)
        # The one entry point that had no scaling factor has a rule that says so.
        assert ("routed_scaling_factor" in takes) != (scheme == "bf16" and release == "0.5.3")


def test_every_kernel_method_of_every_release_has_a_recipe_row():
    for release in known_releases():
        for method in FlashInfer.of(release).methods:
            assert method == "Unspecified" or RoutingMethodType[method] in METHODS


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("%4 >top_k", "a multiple of 4 and more than top_k"),
        (">=1 <=4 <=n_group", "at least 1 and at most 4 and at most n_group"),
        ("==bfloat16", "bfloat16"),
        ("!=none", "any value but none"),
        ("in:float32,bfloat16", "float32 or bfloat16"),
    ],
)
def test_conditions_in_words(condition, words):
    assert in_words(condition) == words
