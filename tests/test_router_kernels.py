"""Adapters of compiled routers, with operators in torch in the place of the compiled ones."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pytest_moe_routing.compare import compare_routing
from pytest_moe_routing.errors import MoERoutingError, Unsupported
from pytest_moe_routing.kernels import sglang_jit
from pytest_moe_routing.kernels.routers import (
    RouterKernels,
    call_operator,
    kernel_names,
    load_kernels,
    load_library,
)
from pytest_moe_routing.kernels.sglang import SglangKernels, place_of_sources
from pytest_moe_routing.kernels.sglang_jit import MEMBER, JitRouters
from pytest_moe_routing.kernels.vllm import VllmKernels
from pytest_moe_routing.logits import make_case
from pytest_moe_routing.models import load_models
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.routing import Recipe

MODELS = load_models(Path(__file__).parent.parent / "golden")
#: As vLLM 0.33.0 and sglang-kernel 0.4.6 register them.
SCHEMAS = {
    "topk_softmax": "Tensor topk_weights, Tensor topk_indices, Tensor token_expert_indices, Tensor gating_output, bool renormalize, Tensor? bias, Tensor? is_padding",
    "topk_sigmoid": "Tensor topk_weights, Tensor topk_indices, Tensor token_expert_indices, Tensor gating_output, bool renormalize, Tensor? bias, float routed_scaling_factor, Tensor? is_padding",
    "topk_softplus_sqrt": "Tensor topk_weights, Tensor topk_indices, Tensor token_expert_indices, Tensor gating_output, bool renormalize, float routed_scaling_factor, Tensor? bias, Tensor? input_ids, Tensor? tid2eid, Tensor? is_padding, Tensor? bias_vl=None, int image_sentinel_lo=0",
    "grouped_topk": "Tensor scores, int n_group, int topk_group, int topk, bool renormalize, float routed_scaling_factor, Tensor bias, int scoring_func",
}
SGLANG = {
    "topk_softmax": "Tensor topk_weights, Tensor topk_indices, Tensor gating_output, bool renormalize, float moe_softcapping, Tensor? correction_bias",
    "topk_sigmoid": "Tensor topk_weights, Tensor topk_indices, Tensor gating_output, bool renormalize, Tensor? correction_bias",
}
SCORES = {
    "topk_softmax": "softmax",
    "topk_sigmoid": "sigmoid",
    "topk_softplus_sqrt": "sqrtsoftplus",
}


class Operator:
    """An operator in torch: takes what its schema names, by position."""

    def __init__(self, name, arguments):
        self.name = name
        returns = "(Tensor, Tensor)" if name == "grouped_topk" else "()"
        self.schema = torch._C.parse_schema(f"fake::{name}({arguments}) -> {returns}")
        self.default = SimpleNamespace(_schema=self.schema)

    def __call__(self, *values):
        given = dict(zip([a.name for a in self.schema.arguments], values, strict=True))
        bias = given.get("bias", given.get("correction_bias"))
        grouped = self.name == "grouped_topk"
        recipe = Recipe(
            given["topk"] if grouped else given["topk_weights"].shape[1],
            "sigmoid" if grouped else SCORES[self.name],
            bias=bias is not None,
            n_group=given.get("n_group", 1),
            topk_group=given.get("topk_group", 1),
            normalize="sum" if given["renormalize"] else "none",
            scale=given.get("routed_scaling_factor", 1.0),
        )
        logits = given["scores" if grouped else "gating_output"]
        routing = route(logits, recipe, bias)
        if grouped:
            return routing.topk_weights, routing.topk_ids.int()
        given["topk_weights"].copy_(routing.topk_weights)
        given["topk_indices"].copy_(routing.topk_ids)
        return None


def operators(schemas):
    return SimpleNamespace(**{name: Operator(name, text) for name, text in schemas.items()})


ADAPTERS = [VllmKernels(operators=operators(SCHEMAS)), SglangKernels(operators=operators(SGLANG))]
EXPRESSIBLE = [model for model in MODELS.values() if model.router.not_expressible is None]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: a.name)
def test_every_call_of_the_zoo_computes_its_recipe(adapter):
    called = set()
    for router in {model.router for model in EXPRESSIBLE}:
        for call in adapter.calls(router):
            called.add(call.kernel)
            case = make_case("plain", call.recipe, num_tokens=5, num_experts=router.num_experts)
            weights, ids = call.run(case.logits, case.bias)
            found = compare_routing(ids, weights, case.logits, call.recipe, case.bias)
            assert found.ok, found.message()
    assert called == set(SCHEMAS if adapter.name == "vllm" else SGLANG)


@pytest.mark.parametrize(
    ("model", "adapter", "kernels"),
    [
        ("deepseek-r1", 0, ["grouped_topk"]),
        ("glm-4.5", 0, ["grouped_topk"]),
        ("deepseek-v2", 0, []),  # groups without a bias: torch
        ("deepseek-v2-lite", 0, ["topk_softmax"]),
        ("minimax-m2", 0, ["topk_sigmoid"]),
        ("ernie-4.5-21b-a3b", 0, ["topk_softmax"]),
        ("deepseek-v4-flash", 0, ["topk_softplus_sqrt"]),
        ("llama-4-scout", 0, []),  # a function of its own
        ("ernie-4.5-21b-a3b", 1, []),  # SGLang passes no bias
        ("deepseek-r1", 1, []),
        ("minimax-m2", 1, ["topk_sigmoid"]),
        ("qwen3-30b-a3b", 1, ["topk_softmax"]),
    ],
)
def test_the_kernel_that_the_framework_calls(model, adapter, kernels):
    found = [call.kernel for call in ADAPTERS[adapter].calls(MODELS[model].router)]
    assert found == kernels


def test_the_factor_goes_to_the_operators_that_take_one():
    scales = {
        model: call.recipe.scale
        for model in ("deepseek-r1", "step-3.5-flash", "deepseek-v4-flash")
        for call in ADAPTERS[0].calls(MODELS[model].router)
    }
    assert scales == {"deepseek-r1": 2.5, "step-3.5-flash": 3.0, "deepseek-v4-flash": 1.5}
    softmax = replace(MODELS["mixtral-8x7b"].router, routed_scaling_factor=2.0)
    (call,) = ADAPTERS[0].calls(softmax)
    assert call.recipe.scale == 1.0


def test_what_an_operator_leaves_out_shows():
    class Idle(Operator):
        def __call__(self, *values):
            return None

    idle = VllmKernels(
        operators=SimpleNamespace(topk_sigmoid=Idle("topk_sigmoid", SCHEMAS["topk_sigmoid"]))
    )
    (call,) = idle.calls(MODELS["minimax-m2"].router)
    weights, ids = call.run(torch.zeros(3, 256), torch.zeros(256))
    assert weights.isnan().all()
    assert (ids < 0).all()


def test_an_argument_that_is_not_known_is_not_guessed():
    operator = Operator("topk_softmax", "Tensor topk_weights, int tiles")
    with pytest.raises(Unsupported, match="fake::topk_softmax needs tiles"):
        call_operator(operator, {"topk_weights": torch.zeros(1)})


def test_kernels_are_found_by_entry_points():
    assert {"vllm", "sglang"} <= {*kernel_names()}
    with pytest.raises(
        MoERoutingError, match=r"unknown kernels 'nothing'; kernels: .*sglang, vllm"
    ):
        load_kernels("nothing@x")


def test_a_wheel_without_the_library_is_not_judged(tmp_path):
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as wheel:
        wheel.writestr("vllm/__init__.py", "")
    with pytest.raises(Unsupported, match=r"has no vllm/_x\.so"):
        load_library(tmp_path / "empty.whl", "vllm", "vllm/_x.so", tmp_path)


def test_a_library_that_torch_does_not_load_is_not_judged(tmp_path):
    (tmp_path / "x.so").write_bytes(b"no library")
    with pytest.raises(Unsupported, match="does not load"):
        load_library(tmp_path / "x.so", "vllm", "vllm/_x.so", tmp_path)


def test_sources_of_kernels_are_told_from_a_library(tmp_path):
    """A wheel of `sglang` has sources that are built; one of `sglang-kernel` has a library."""
    for wheel, member in (("sources", MEMBER), ("library", "sgl_kernel/sm90/common_ops.abi3.so")):
        with zipfile.ZipFile(tmp_path / f"{wheel}.whl", "w") as file:
            file.writestr(member, "")
    tree = tmp_path / "checkout" / "python"
    (tree / MEMBER).parent.mkdir(parents=True)
    (tree / MEMBER).touch()
    assert place_of_sources(tmp_path / "sources.whl") == tmp_path / "sources.whl"
    assert place_of_sources(tmp_path / "library.whl") is None
    assert place_of_sources(tree) == place_of_sources(tree.parent) == tree


def test_what_building_kernels_needs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sglang_jit, "find_spec", lambda name: None if name == "tvm_ffi" else name)
    with pytest.raises(Unsupported, match=r"kernels need apache-tvm-ffi, not installed here"):
        JitRouters(tmp_path, tmp_path)


def test_an_adapter_of_others_needs_a_name_and_calls():
    class Other(RouterKernels):
        name = "other"

        def calls(self, router):
            yield from ()

    assert list(Other(None).calls(MODELS["minimax-m2"].router)) == []
    assert str(Other(Path("x.whl"))) == "other@x.whl"
