"""What model code asks of its MoE layer, compared with the model's router; needs no framework."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from layer_requests import MODELS, NOTHING_SPECIAL, RIGHT, compared
from told import code_sentences
from torch import nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.oracle.model_code import SplitExperts, compare_request
from pytest_moe_routing.report.text import model_code
from pytest_moe_routing.suite.causes import of_model_code, of_split_experts
from pytest_moe_routing.targets.dtypes import Dtypes
from pytest_moe_routing.targets.vllm.model_code import blocks, request_of
from pytest_moe_routing.targets.vllm.probe import blocks as probe
from pytest_moe_routing.targets.vllm.probe import world as worlds
from pytest_moe_routing.targets.vllm.probe.layer_recorder import recording
from pytest_moe_routing.targets.vllm.probe.running import in_bfloat16, run


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_request_has_no_problem(name):
    assert compared(name).findings == ()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("glm-5", {"use_grouped_topk": False, "num_expert_group": None, "topk_group": None}),
        ("glm-5", {"apply_routed_scale_to_output": True}),
        ("qwen3-30b-a3b", {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1}),
        ("glm-5", {"topk_group": None}),
        ("qwen3-30b-a3b", {"routed_scaling_factor": None}),
        ("qwen3-30b-a3b", {"logits_dtype": "float32", "router_logits_dtype": "float32"}),
        # As old releases did: the model's code scales the routed experts and adds the shared ones.
        (
            "glm-5",
            {"routed_scaling_factor": 1.0, "output_factor": 2.5, "shared_experts": False},
        ),
        # What it does not state is not compared; an alpha of 1 and a beta of 0 change nothing.
        ("minimax-m3", {"parameters": {}}),
        ("hy4-preview", {"parameters": {"swiglu_alpha": 1.0, "swiglu_beta": None}}),
        ("qwen3-30b-a3b", {"parameters": {"swiglu_limit": None, "swiglu_beta": 0.0}}),
        ("qwen3-30b-a3b", {"parameters": {"activation_situ_beta": 4.0}}),
    ],
)
def test_what_means_the_same_is_no_problem(name, changes):
    assert compared(name, **changes).findings == ()


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        (
            "deepseek-r1",
            {"num_expert_group": None},
            "n_group: the model has 8, the model code asks for 1 "
            "(use_grouped_topk=True, num_expert_group=None, topk_group=4)",
        ),
        ("deepseek-r1", {"use_grouped_topk": False}, "n_group: the model has 8"),
        ("deepseek-r1", {"topk_group": 8}, "topk_group: the model has 4"),
        (
            "glm-5",
            {"bias_dtype": None},
            "correction bias: the model has yes, the model code asks for no "
            "(e_score_correction_bias=None)",
        ),
        ("glm-5", {"bias_dtype": "bfloat16"}, "the float32 bias is downcast to bfloat16"),
        ("glm-5", {"bias_is_loaded": False}, "bias arrives as a copy that was made before the"),
        ("glm-5", {"scoring_func": "softmax"}, "scoring function: the model has sigmoid"),
        (
            "glm-5",
            {"scoring_func": "tanh"},
            "a routing that no router computes: Recipe.score: found 'tanh'",
        ),
        ("glm-5", {"renormalize": False}, "renormalize: the model has sum"),
        ("glm-5", {"top_k": 6}, "top_k: the model has 8"),
        ("glm-5", {"num_experts": 257}, "num_experts: the model has 256"),
        (
            "glm-5",
            {"routed_scaling_factor": None},
            "routed_scaling_factor: the model has 2.5, the model code asks for 1 "
            "(routed_scaling_factor=None",
        ),
        (
            "glm-5",
            {"output_factor": 2.5},
            "routed_scaling_factor: the model has 2.5, the model code asks for 6.25",
        ),
        (
            "glm-5",
            {"apply_router_weight_on_input": True},
            "router weight side: the model has output",
        ),
        (
            "glm-5",
            {"router_logits_dtype": None},
            "dtype of the router logits arrives as float32, the layer has bfloat16 "
            "(router_logits_dtype=None)",
        ),
        ("glm-5", {"gate_dtypes": ["bfloat16"]}, "router logits are downcast to bfloat16"),
        (
            "minimax-m2",
            {"router_weight_dtypes": ["bfloat16", "float32"]},
            "the router's weight, float32 in checkpoints, is downcast to bfloat16",
        ),
        ("qwen3-30b-a3b", {"renormalize": False}, "renormalize: the model has softmax"),
        (
            "qwen3-30b-a3b",
            {"activation": "silu_no_mul"},
            "gated: the model has yes, the model code asks for no",
        ),
        ("gpt-oss-20b", {"top_k": 2}, "top_k: the model has 4"),
        (
            "minimax-m3",
            {"parameters": {"swiglu_beta": 0.0}},
            "activation_beta: the model has 1, the model code asks for 0 (swiglu_beta=0.0)",
        ),
        (
            "minimax-m3",
            {"parameters": {"swiglu_alpha": None}},
            "activation_alpha: the model has 1.702, the model code asks for none "
            "(swiglu_alpha=None)",
        ),
        (
            "hy4-preview",
            {"parameters": {"swiglu_limit": None}},
            "activation_limit: the model has 10, the model code asks for none (swiglu_limit=None)",
        ),
        (
            "qwen3-30b-a3b",
            {"parameters": {"swiglu_limit": 7.0}},
            "activation_limit: the model has none, the model code asks for 7 (swiglu_limit=7.0)",
        ),
        (
            "kimi-k3",
            {"parameters": {"activation_situ_linear_beta": None}},
            "activation_beta: the model has 25, the model code asks for none "
            "(activation_situ_linear_beta=None)",
        ),
        ("deepseek-v2", {"bias_dtype": "float32"}, "group score: the model has max"),
        ("llama-4-scout", {"apply_router_weight_on_input": False}, "router weight side: the model"),
        (
            "llama-4-scout",
            {"routing_problem": "token 0: expert 3 instead of 5"},
            "Block.custom_routing_function routes otherwise: token 0: expert 3 instead of 5",
        ),
    ],
)
def test_a_difference_is_named_with_both_values(name, changes, problem):
    found = compared(name, **changes)
    assert any(problem in text for text in code_sentences(found)), code_sentences(found)
    assert model_code(found)[0].startswith(f"{name}: a.Block")


def test_a_bias_that_the_router_does_not_have_is_no_downcast():
    model = MODELS["deepseek-v2"]
    asked = {**NOTHING_SPECIAL, **RIGHT["deepseek-v2"], "bias_dtype": "bfloat16"}
    found = code_sentences(compare_request(model, request_of(asked, {}, model)))
    assert found
    assert not any("bias is downcast" in sentence for sentence in found)


def test_a_router_weight_of_which_nothing_is_known_is_not_compared():
    found = compared("minimax-m3", router_weight_dtypes=["bfloat16"])
    assert (found.findings, found.unanswered) == ((), None)


def test_logits_that_are_rounded_hide_the_weight():
    changes = {"router_weight_dtypes": ["bfloat16"], "gate_dtypes": ["bfloat16"]}
    found = compared("minimax-m2", **changes)
    assert [finding.field for finding in found.findings] == ["logits"]


def test_a_router_weight_that_cannot_be_traced_is_not_judged():
    found = compared("minimax-m2", router_weight_dtypes=[])
    assert found.findings == ()
    assert found.unanswered == "a.Block computes logits of no weight that can be traced"


def test_a_limit_that_a_config_class_fills_in_is_not_compared():
    model = MODELS["hy4-preview"]
    unlimited = replace(model, experts=replace(model.experts, activation_limit=None))
    answer = {**NOTHING_SPECIAL, **RIGHT["hy4-preview"]}
    request = request_of(answer, blocks()[model.architecture], unlimited)
    assert compare_request(unlimited, request).findings == ()


def FusedMoE(num_experts, top_k, activation="silu", swiglu_limit=None, swiglu_beta=None):  # noqa: N802
    raise NotImplementedError("the probe replaces it")


class ClampedBlock(nn.Module):
    """A block whose code states one parameter of the activation."""

    def __init__(self):
        super().__init__()
        self.experts = FusedMoE(8, 2, swiglu_limit=None)

    def forward(self, hidden_states):
        return self.experts(hidden_states, hidden_states)


def test_what_a_block_states_is_told_from_the_defaults_of_its_layer(monkeypatch):
    names = SimpleNamespace(
        has=lambda key: key == "code-layer", spelling=lambda _: SimpleNamespace(path="FusedMoE")
    )
    world = SimpleNamespace(names=names, linear_layers=lambda _: nullcontext())
    monkeypatch.setattr(worlds, "_world", world)
    layers = []
    with recording(ClampedBlock, layers, 64), in_bfloat16(), Dtypes() as dtypes:
        module = ClampedBlock()
        output = run(module, 64)
    block = probe.Block("a.ClampedBlock", "", module, layers, 64)
    answer = probe.answer_of(block, output, dtypes, MODELS["qwen3-30b-a3b"].router, {})
    assert answer["parameters"] == {"swiglu_limit": None}
    assert (answer["activation"], answer["has_bias"]) == ("silu", False)


def test_a_factor_on_the_whole_block_is_on_the_shared_experts_too():
    found = compared("glm-5", routed_scaling_factor=1.0, output_factor=2.5)
    assert code_sentences(found) == [
        "factor on the shared experts arrives as 2.5, the layer has 1",
    ]


def test_a_wrong_meaning_comes_with_a_token():
    found = compared("deepseek-r1", num_expert_group=None)
    assert len(found.findings) == 1
    assert any(line.strip().startswith("wanted") for line in model_code(found))


def test_rounding_that_the_publisher_does_as_well_is_a_note():
    found = compared("deepseek-r1")
    assert found.findings == ()
    assert "DeepSeek's own inference code" in found.notes[0].fact


def test_a_router_that_no_recipe_computes_is_not_compared():
    model = MODELS["gemma-4-26b-a4b"]
    request = request_of({**NOTHING_SPECIAL, "num_experts": 128, "top_k": 8}, {}, model)
    with pytest.raises(Unsupported, match="learned scale"):
        compare_request(model, request)


def test_an_edit_above_a_block_does_not_change_the_cause():
    """SGLang's blocks are named by file and line, and a ledger by causes."""
    first, later = (compared("glm-5", top_k=6, block=f"models/glm.py:{n}") for n in (104, 105))
    assert (
        of_model_code(first).cause == of_model_code(later).cause == "model-code:top_k:models/glm.py"
    )
    assert of_model_code(first).lines != of_model_code(later).lines


def test_a_token_whose_logits_say_nothing_is_one_line_in_a_terminal():
    failure = of_model_code(compared("deepseek-r1", routed_scaling_factor=1.0))
    told = [line for line in failure.lines if line not in failure.brief]
    assert told[0].strip() == "a token of 16 experts"
    assert [line.split()[0] for line in told[1:]] == ["logits", "bias", "wanted", "got"]
    (line,) = (line for line in failure.brief if line not in failure.lines)
    assert line == "    a token of 16 experts: wanted 0-7: 0.3125, got 0-7: 0.125"


def test_one_defect_in_two_blocks_is_told_once():
    blocks = "models/glm.py:104", "models/qwen.py:7", "GlmMoE", "a block"
    failures = [of_model_code(compared("glm-5", top_k=6, block=block)) for block in blocks]
    assert len({failure.cause for failure in failures}) == len(blocks)
    assert len({failure.defect for failure in failures}) == 1


def test_shared_experts_that_are_split_name_the_block_and_who_meets_them():
    split = SplitExperts("vllm.models.Block", ("up", "down"), ("--ranks 2",))
    failure = of_split_experts(MODELS["glm-5"], split)
    assert failure.cause == "split-shared-experts:vllm.models.Block"
    assert failure.lines[1:] == (
        "  reach    only with an opt-in switch: --ranks 2",
        "  because  each rank has a part of up, down, and nobody sums the parts",
        "  at       vllm.models.Block",
    )


def test_every_row_says_what_it_must():
    columns = {"module", "block", "config", "keys", "nested", "published", "arguments", "prepare"}
    columns |= {"rounds_logits", "own_factor", "shared", "rewrite", "intermediate", "decoder"}
    columns |= {"computed", "passes", "ones", "per_layer", "step", "kinds"}
    router = {"num_experts", "top_k", "n_group", "topk_group", "renormalize", "scoring_func"}
    router |= {"router_n_groups"}
    experts = {"shared_experts", "latent_size"}
    experts |= {f"activation_{name}" for name in ("limit", "alpha", "beta")}
    values = router | experts | {"routed_scaling_factor"}
    for architecture, row in blocks().items():
        assert {"module", "block", "config", "keys"} <= set(row) <= columns, architecture
        assert {"top_k", "num_experts"} <= set(row["keys"]) <= values, architecture


@pytest.mark.parametrize(
    ("target", "test", "status", "line"),
    [
        ("builtin", "test_model_code", pytest.ExitCode.NO_TESTS_COLLECTED, "*deselected*"),
        ("AnswersNothing", "test_model_code", 0, "*2 skipped*"),
        ("AsksForTwo", "test_model_code", 1, "*top_k: the model has 8, the model code asks for 2*"),
        (
            *("SplitsSharedExperts", "test_model_code", 1),
            "*minimax-m2: under sequence parallelism, its*",
        ),
        ("SplitsSharedExperts", "test_model_code", 1, "model code: 1 model is not judged; -v *"),
        (
            *("KnowsNoRanks", "test_model_code", 1),
            "*model code: 1 model is not judged on ranks with other tokens*",
        ),
        (
            *("RunsTransformers", "test_transformers_backend", 1),
            "*only with an opt-in switch: --model-impl transformers*",
        ),
    ],
)
def test_the_suite_asks_frameworks_alone(pytester, monkeypatch, target, test, status, line):
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", here, prepend=os.pathsep)
    target = target if target == "builtin" else f"miniatures:{target}"
    only = ("--moe-models", "minimax-m2", "-k", test, "-p", "no:cacheprovider")
    result = pytester.runpytest_subprocess("--moe-golden", "--moe-target", target, *only)
    assert result.ret == status
    result.stdout.fnmatch_lines([line])
    if target == "miniatures:AsksForTwo":
        result.stdout.fnmatch_lines(["*a transformers backend, which the target does not have*"])
