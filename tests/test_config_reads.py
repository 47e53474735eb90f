"""Keys that transformers ignores: the target that is judged decides whether they count."""

from __future__ import annotations

import pytest
from configs import read

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.oracle.judge import as_read_by, judge
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.targets import load_target
from pytest_moe_routing.targets.vllm.target import VllmTarget

V2 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "norm_topk_prob": True,
}


class Honoring(Target):
    """A target that answers one question as it is told."""

    name = "honoring"

    def __init__(self, answer):
        super().__init__(FlashInfer.of(None))
        self.answer = answer

    def honors(self, model, name):
        return self.answer


def test_an_honored_key_counts(tmp_path):
    spec = read(tmp_path, V2)
    honored = as_read_by(Honoring(True), spec)
    assert (spec.router.renormalize, honored.router.renormalize) == (False, True)
    assert honored.contradicted == {}


def test_an_ignored_key_does_not_count(tmp_path):
    spec = read(tmp_path, V2)
    ignored = as_read_by(Honoring(False), spec)
    assert (ignored.router, ignored.contradicted) == (spec.router, {})


def test_what_is_not_known_is_not_judged(tmp_path):
    """The builtin target follows vLLM's classifier and no model's code."""
    spec = read(tmp_path, V2)
    assert as_read_by(Honoring(None), spec) == spec
    target = load_target("builtin", FlashInfer.of(None))
    with pytest.raises(Unsupported, match="renormalize is False in transformers, and True for"):
        judge(target, spec, "bf16")


def test_an_epsilon_goes_with_the_renormalization(tmp_path):
    spec = read(tmp_path, {**V2, "architectures": ["HYV3ForCausalLM"], "norm_topk_prob": False})
    honored = as_read_by(Honoring(True), spec).router
    assert (honored.renormalize, honored.renormalize_epsilon) == (False, 0.0)
    assert not list(honored.problems())


@pytest.mark.parametrize(
    ("release", "architecture", "name", "expected"),
    [
        ("0.33.0", "DeepseekV2ForCausalLM", "renormalize", True),
        ("0.33.0", "Glm4MoeForCausalLM", "scoring_func", False),
        ("0.33.0", "Glm4MoeForCausalLM", "n_group", None),
        ("0.33.0", "UnheardOfForCausalLM", "renormalize", None),
        ("0.1.0", "DeepseekV2ForCausalLM", "renormalize", None),
    ],
)
def test_what_vllm_reads_is_known_by_release(tmp_path, release, architecture, name, expected):
    class OneRelease(VllmTarget):
        def __init__(self):
            """Open no sources: only the release is asked."""

        def version(self):
            return release

    spec = read(tmp_path, {**V2, "architectures": [architecture], "model_type": "deepseek_v2"})
    assert OneRelease().honors(spec, name) is expected
