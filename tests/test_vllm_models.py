"""Model code of a real vLLM, built and run in a process of its own; skipped without vLLM."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
from told import code_sentences

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models, read_config
from pytest_moe_routing.oracle.model_code import compare_request
from pytest_moe_routing.targets import load_target
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.vllm.model_code import ModelCode, blocks
from pytest_moe_routing.targets.vllm.target import VllmTarget

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
MODELS = load_models(packaged_directory())

TOLD_NOTHING = [
    "dtype of the router logits arrives as float32, the layer has bfloat16 "
    "(router_logits_dtype=None)",
]
ROUNDED = ["the float32 router logits are downcast to bfloat16 before the call"]
#: Findings in vLLM 0.32.0. When a release has one no longer, the test says so.
FINDINGS = {
    "a.x-k1": ROUNDED,
    "deepseek-v3.2": ROUNDED,
    "hy3-preview": TOLD_NOTHING,
    "hy4-preview": TOLD_NOTHING,
    "k-exaone-236b-a23b": ROUNDED,
    "kimi-k3": TOLD_NOTHING,
    "kimi-linear-48b-a3b": TOLD_NOTHING,
    "laguna-s-2.1": TOLD_NOTHING,
    "sarvam-105b": TOLD_NOTHING,
}


@pytest.fixture(scope="module")
def target():
    target = load_target("vllm", FlashInfer.of("0.7.0"))
    yield target
    target.close()


def test_the_zoo(target):
    """Every model of the zoo that vLLM has, and nothing found but what is known."""
    found, skipped = {}, {}
    for model in MODELS.values():
        try:
            found[model.id] = code_sentences(compare_request(model, target.layer_request(model)))
        except Unsupported as reason:
            skipped[model.id] = str(reason)
    assert {name: problems for name, problems in found.items() if problems} == FINDINGS
    assert len({MODELS[name].architecture for name in found}) > 30
    reasons = (
        "is not known to this adapter",
        "no recipe computes",
        "this release has no vllm.models.beam",
    )
    assert [text for text in skipped.values() if not any(r in text for r in reasons)] == []


CONFIGS = {
    "BailingMoeV2ForCausalLM": {
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "num_shared_experts": 1,
        "hidden_size": 2048,
        "moe_intermediate_size": 512,
        "hidden_act": "silu",
    },
    "Cohere2MoeForCausalLM": {"expert_selection_fn": "sigmoid", "num_shared_experts": 1},
    "Lfm2MoeForCausalLM": {},
    "Step3VLForConditionalGeneration": {
        "moe_num_experts": 48,
        "moe_top_k": 3,
        "norm_expert_weight": True,
        "hidden_size": 7168,
        "moe_intermediate_size": 5120,
    },
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_configs_that_no_packaged_model_has(target, architecture, tmp_path):
    config = {"architectures": [architecture], "torch_dtype": "bfloat16", **CONFIGS[architecture]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_config(tmp_path)
    problems = code_sentences(compare_request(model, target.layer_request(model)))
    if architecture == "BailingMoeV2ForCausalLM":
        assert problems[0] == (
            "dtype of the router logits arrives as bfloat16, the layer has float32 "
            "(router_logits_dtype='float32')"
        )
    else:
        assert problems == []


def test_a_routing_function_is_judged_by_what_it_does(target):
    """Llama4's function against the router of a model that chooses and weighs otherwise."""
    scout = MODELS["llama-4-scout"]
    other = replace(scout, router=replace(scout.router, top_k=2, renormalize=True))
    found = compare_request(other, target.layer_request(other))
    assert "Llama4MoE.custom_routing_function routes otherwise" in code_sentences(found)[0]
    assert "wanted" in code_sentences(found)[0]


def test_asking_leaves_this_process_alone(target):
    before = set(sys.modules)
    target.layer_request(MODELS["deepseek-r1"])
    assert not any(
        name.startswith("vllm.model_executor.models") for name in set(sys.modules) - before
    )


MUTANTS = '''
import torch
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.models.deepseek_v2 import DeepseekV2MoE

class ScalesAgain(DeepseekV2MoE):
    def forward(self, hidden_states):
        return super().forward(hidden_states) * self.routed_scaling_factor

class Own(torch.nn.Module):
    """The router's right arguments, but for those that a mutant drops or changes."""

    wrong = {}

    def __init__(self, config, prefix=""):
        super().__init__()
        self.gate = GateLinear(config.hidden_size, config.n_routed_experts, out_dtype=torch.float32)
        bias = torch.nn.Parameter(torch.zeros(config.n_routed_experts, dtype=torch.float32))
        self.experts = FusedMoEFactory(**{**dict(
            num_experts=config.n_routed_experts, top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size, intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob, scoring_func="sigmoid", e_score_correction_bias=bias,
            use_grouped_topk=True, num_expert_group=config.n_group, topk_group=config.topk_group,
            routed_scaling_factor=config.routed_scaling_factor, router_logits_dtype=torch.float32,
        ), **self.wrong})

    def forward(self, hidden_states):
        return self.experts(hidden_states, self.gate(hidden_states)[0])

class NoGroups(Own):
    wrong = {"num_expert_group": None, "topk_group": None}

class RoundsTheBias(Own):
    wrong = {"e_score_correction_bias": torch.zeros(256, dtype=torch.bfloat16)}

class NoBias(Own):
    wrong = {"e_score_correction_bias": None}

class NoScale(Own):
    wrong = {"routed_scaling_factor": 1.0}

class Softmax(Own):
    wrong = {"scoring_func": "softmax"}

class NotTold(Own):
    wrong = {"router_logits_dtype": None}

class Rounds(Own):
    def forward(self, hidden_states):
        return self.experts(hidden_states, self.gate(hidden_states)[0].to(torch.bfloat16))
'''


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    """`mutants(block)`: what is found when DeepSeek-R1's block is that one of `MUTANTS`."""
    path = tmp_path_factory.mktemp("mutants")
    (path / "wrong_models").mkdir()
    (path / "wrong_models" / "__init__.py").touch()
    (path / "wrong_models" / "blocks.py").write_text(MUTANTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        code = ModelCode(Source.installed("vllm", VllmTarget.distributions))
        row = blocks()["DeepseekV3ForCausalLM"]

        def compare(block):
            wrong = {**row, "module": "wrong_models.blocks", "block": block}
            patch.setattr(
                "pytest_moe_routing.targets.vllm.model_code.blocks",
                lambda: {"DeepseekV3ForCausalLM": wrong},
            )
            model = MODELS["deepseek-r1"]
            return code_sentences(compare_request(model, code.layer_request(model)))

        yield compare
        code.close()


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("ScalesAgain", "routed_scaling_factor: the model has 2.5, the model code asks for 6.25"),
        ("ScalesAgain", "factor on the shared experts arrives as 2.5, the layer has 1"),
        ("RoundsTheBias", "the float32 bias is downcast to bfloat16"),
        (
            "NoGroups",
            "n_group: the model has 8, the model code asks for 1 (use_grouped_topk=True, ",
        ),
        ("NoBias", "correction bias: the model has yes, the model code asks for no"),
        ("NoScale", "routed_scaling_factor: the model has 2.5, the model code asks for 1"),
        ("Softmax", "scoring function: the model has sigmoid, the model code asks for softmax"),
        ("NotTold", "arrives as float32, the layer has bfloat16 (router_logits_dtype=None)"),
        ("Rounds", "arrives as bfloat16, the layer has float32 (router_logits_dtype='float32')"),
    ],
)
def test_a_mutant_is_caught(mutants, block, problem):
    assert any(problem in text for text in mutants(block)), mutants(block)


def test_the_right_block_is_not(mutants):
    assert mutants("Own") == []
    assert mutants("DeepseekV2MoE") == []
