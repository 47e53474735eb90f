"""What SGLang's models do while a CUDA graph is captured, and what decoder layers pass to blocks."""

from __future__ import annotations

import re
from functools import cache

import pytest
from sglang_targets import opened
from told import code_sentences
from wheels import unpack, wheels_since

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.model_code import compare_requests
from pytest_moe_routing.report.text import model_code

MODELS = load_models(packaged_directory())
DUAL = r"(def forward_normal_dual_stream(?:.|\n)*?)"
#: The file of a model, a pattern and what takes its place, and the model.
EDITS = [
    # A factor that is lost, or applied twice, on the second stream.
    ("sarvam_moe", rf"{DUAL}if self\.routed_scaling_factor != 1\.0", r"\1if False", "sarvam-105b"),
    ("exaone_moe", rf"{DUAL}return router_output,", r"\1return router_output * 2,", "k-exaone-236b-a23b"),
    ("qwen2_moe", rf"{DUAL}self\._forward_router_experts\(hidden_states\)\n",
     r"\1self._forward_router_experts(hidden_states) * 2\n", "qwen1.5-moe-a2.7b"),
    # Logits of a router that is float32 are computed of bfloat16, which has another dtype.
    ("hunyuan_v3", r"(def _forward_dual_stream(?:.|\n)*?)hidden_states\.to\(dtype=torch\.float32\)",
     r"\1hidden_states", "hy3-preview"),
    # The routed experts are not run at all.
    ("bailing_moe", rf"{DUAL}self\._forward_router_experts\(hidden_states, forward_batch\)",
     r"\1hidden_states", "ring-mini-sparse-2.0"),
    # Keys of the config that change places in decoder layers.
    ("olmoe", r"(OlmoeMoE\((?:.|\n)*?)hidden_size=config\.hidden_size,\n *intermediate_size=config\.intermediate_size",
     r"\1hidden_size=config.intermediate_size, intermediate_size=config.hidden_size", "olmoe-1b-7b"),
    ("mixtral", r"(MixtralMoE\((?:.|\n)*?)top_k=config\.num_experts_per_tok",
     r"\1top_k=config.num_local_experts", "mixtral-8x7b"),
    ("granitemoe", r"(GraniteMoeMoE\((?:.|\n)*?)num_experts=config\.num_local_experts",
     r"\1num_experts=config.num_experts_per_tok", "granite-3.0-1b-a400m"),
    # One for the other in a block.
    ("lfm2_moe", r"intermediate_size=config\.moe_intermediate_size", "intermediate_size=config.hidden_size",
     "lfm2-8b-a1b"),
]  # fmt: skip


#: A default of SGLang's own config class: no published config has the key.
DEFAULT = 'rounter_params_dtype="float32"'


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    wheels = wheels_since("0.5.23", "sglang")
    if not wheels:
        pytest.skip("MOE_WHEELS has no SGLang whose code is edited")
    root = unpack(wheels[-1], tmp_path_factory.mktemp("sglang"))
    for file, old, new, _ in EDITS:
        path = root / f"sglang/srt/models/{file}.py"
        text, count = re.subn(old, new, path.read_text(), count=1)
        assert count == 1, file
        path.write_text(text)
    path = root / "sglang/srt/configs/longcat_flash.py"
    text = path.read_text()
    assert text.count(DEFAULT) == 1
    path.write_text(text.replace(DEFAULT, DEFAULT.replace("float32", "bfloat16")))
    yield from opened(root)


@pytest.fixture
def found(edited):
    """Return what is wrong with a model's code: its sentences, and the lines of a failure."""

    @cache
    def ask(model):
        each = [*compare_requests(MODELS[model], edited.layer_request(MODELS[model]))]
        lines = [line for one in each if one.findings for line in model_code(one)]
        return [s for one in each for s in code_sentences(one)], lines

    return ask


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("sarvam-105b", "routed_scaling_factor: the model has 2.5, the model code asks for 1 "),
        ("k-exaone-236b-a23b", "routed_scaling_factor: the model has 2.5, the model code asks for 5 "),
        ("qwen1.5-moe-a2.7b", "routed_scaling_factor: the model has 1, the model code asks for 2 "),
    ],
)  # fmt: skip
def test_a_factor_that_is_wrong_only_in_a_cuda_graph(found, model, problem):
    problems, lines = found(model)
    assert any(each.startswith(problem) for each in problems)
    assert "  when     while a CUDA graph is captured, as servers decode by default" in lines


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("hy3-preview", "to have the same dtype"),
        ("ring-mini-sparse-2.0", "gives its experts nothing that its TopK has chosen"),
        ("olmoe-1b-7b", "OlmoeMoE cannot be built and run here"),
    ],
)
def test_code_that_does_not_run_is_not_judged(edited, model, reason):
    """Models that are not judged fail a run of a known release."""
    with pytest.raises(Unsupported, match=reason):
        edited.layer_request(MODELS[model])


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("mixtral-8x7b", "top_k: the model has 2, the model code asks for 8"),
        ("lfm2-8b-a1b", "intermediate_size: the model has 48, the model code asks for 32"),
    ],
)
def test_an_argument_that_is_taken_from_a_wrong_key(found, model, problem):
    problems, _ = found(model)
    assert any(each.startswith(problem) for each in problems)


def test_a_number_of_experts_that_is_taken_from_a_wrong_key(edited):
    model = MODELS["granite-3.0-1b-a400m"]
    (judged,) = compare_requests(model, edited.layer_request(model))
    assert judged.unanswered == "models/granitemoe.py:142: a gate's weight is [8, 32], not [32, 32]"


@pytest.mark.parametrize("model", ["deepseek-r1", "kimi-linear-48b-a3b", "north-mini-code"])
def test_blocks_that_do_the_same_in_a_cuda_graph(edited, model):
    """Deepseek's block has code for it as well."""
    request = edited.layer_request(MODELS[model])
    assert request.further == ()


def test_another_default_of_a_config_class(found):
    problems, _ = found("longcat-flash")
    assert "the float32 router logits are downcast to bfloat16 before the call" in problems
