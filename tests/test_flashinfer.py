"""The table of FlashInfer's releases: sound in itself, and true to the packages that are here."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

import pytest
from packaging.version import Version

from pytest_moe_routing.backends import (
    BACKENDS,
    FlashInfer,
    KernelCall,
    installed_release,
    known_releases,
)
from pytest_moe_routing.backends.flashinfer import _TEST, _data
from pytest_moe_routing.errors import ReleaseError
from pytest_moe_routing.models.spec import ACTIVATIONS, DTYPES
from pytest_moe_routing.routing import METHODS, Recipe, RoutingMethodType

RULES = _data()["rules"]
NAMES = {name for name, _ in inspect.getmembers(KernelCall)} | {f.name for f in fields(KernelCall)}


def test_releases_are_sorted_and_every_change_is_at_one():
    known = known_releases()
    assert known == sorted(known, key=Version)
    data = _data()
    turns = {*data["numbers"], *data["devices"]}
    for entry in data["entry_points"].values():
        turns |= {entry.since, *entry.activations.values()}
    for rule in RULES:
        turns |= {rule.since, rule.until}
    assert turns - {"0", ""} <= set(known)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.fact[:60])
def test_rules_are_well_formed(rule):
    assert set(rule.methods) <= set(RoutingMethodType.__members__)
    assert set(rule.backends) <= set(BACKENDS)
    assert rule.effect in ("", "error", "garbage")
    assert rule.effect or rule.recipe or rule.ignores or rule.note
    assert not rule.require or rule.effect
    assert set(rule.recipe) <= {f.name for f in fields(Recipe)}
    for name, condition in (*rule.when.items(), *rule.require.items()):
        assert name in NAMES
        assert _TEST.sub("", condition).strip() == "", condition


def test_entry_points_are_well_formed():
    assert set(_data()["entry_points"]) == set(BACKENDS)
    for entry in _data()["entry_points"].values():
        assert set(entry.activations) <= set(ACTIVATIONS)
        assert set(entry.weight_on) <= {"output", "input"}


@pytest.mark.parametrize(
    ("asked", "judged_as"),
    [
        ("0.6.12", "0.6.12"),
        ("0.6.10.post1", "0.6.8"),
        ("0.6.7.post3", "0.6.7"),
        ("0.6.18rc4", "0.6.17"),
        ("9.9", "0.7.2.post1"),
    ],
)
def test_a_release_in_between_is_judged_as_the_one_before(asked, judged_as):
    assert FlashInfer.of(asked).judged_as == judged_as


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
        backend="fp8_block",
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
    return {effect for effect, _ in FlashInfer.of(release).troubles(call(**changes))}


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
        ("0.6.7", {"method": "Renormalize", **FLAT, "backend": "nvfp4"}, {"garbage"}),
        ("0.7.0", {"method": "Renormalize", **FLAT}, set()),
        ("0.7.0", {"method": "Llama4", **FLAT, "top_k": 1, "num_experts": 256}, {"error"}),
        ("0.7.0", {"method": "Llama4", **FLAT, "top_k": 1, "num_experts": 128}, set()),
        ("0.7.0", {"method": "Sigmoid", "n_group": 8, "topk_group": 4}, {"error"}),
        ("0.7.0", {"method": "Unspecified"}, {"error"}),
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
    assert not FlashInfer.of("0.6.7").honours("MiniMax2", "scale")


def test_only_the_grouped_kernel_rounds_the_bias():
    flashinfer = FlashInfer.of("0.7.2.post1")
    assert flashinfer.recipe(call()).bias_dtype == "bfloat16"
    assert flashinfer.recipe(call(n_group=1, topk_group=1)).bias_dtype == "float32"
    assert "rounded to bfloat16" in " ".join(flashinfer.notes(call()))


def test_arguments_that_a_method_ignores_have_no_effect():
    sigmoid = FlashInfer.of("0.7.0").recipe(call(method="Sigmoid"))
    assert (sigmoid.bias, sigmoid.scale, sigmoid.n_group) == (False, 1.0, 1)


def test_the_installed_flashinfer_says_the_same():
    """Enum and signatures of the real package, where it is installed."""
    release = installed_release()
    if release is None:
        pytest.skip("flashinfer-python is not installed")
    fused_moe = pytest.importorskip("flashinfer.fused_moe")
    flashinfer = FlashInfer.of(release)
    numbers = {member.name: int(member) for member in fused_moe.RoutingMethodType}
    assert {name: number for number, name in enumerate(flashinfer.methods)} == numbers
    for backend in BACKENDS:
        entry = flashinfer.entry_point(backend)
        takes = inspect.signature(getattr(fused_moe, entry.function)).parameters
        assert {
            "routing_logits",
            "routing_bias",
            "n_group",
            "topk_group",
            "routed_scaling_factor",
        } <= set(takes)
        assert ("use_routing_scales_on_input" in takes) == ("input" in entry.weight_on)


def test_every_kernel_method_of_every_release_has_a_recipe_row():
    for release in known_releases():
        for method in FlashInfer.of(release).methods:
            assert method == "Unspecified" or RoutingMethodType[method] in METHODS


def test_dtypes_of_calls_are_those_of_models():
    assert set(DTYPES) == {"float32", "bfloat16"}
