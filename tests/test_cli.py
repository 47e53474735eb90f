"""`moe-routing explain`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from configs import R1

from pytest_moe_routing.cli import main
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_model, read_config


def test_explain_tells_the_whole_story(capsys):
    assert main(["explain", "step-3.7-flash", "--flashinfer", "0.6.12"]) == 1
    text = capsys.readouterr().out
    for line in (
        "Step-3.7-Flash (stepfun-ai/Step-3.7-Flash, Step3p7ForConditionalGeneration)",
        "  router   sigmoid -> + bias to choose -> top 8 -> / sum -> x 3",
        "not routed_scaling_factor is 1 -> Unspecified",
        "fp8_block                no    missed    Unspecified  a published checkpoint",
        "fp8_block: missed",
        "  exact    as DeepSeekV3: routing_method_type=2,",
        "           routed_scaling_factor=3.0, intermediate_size=1280, activation_type=3,",
        "  gate     routing method: no, fp8_block does not accept Unspecified",
        "  gates    6 of 7 accept",
        "  router   alone would be exact as DeepSeekV3(n_group=1, topk_group=1, routed_scaling_factor=3)",
    ):
        assert line in text
    # In the order in which an engineer decides.
    order = ["scheme  ", "fp8_block: missed", "  exact  ", "  gate  ", "  gates  "]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)


def test_explain_says_what_to_pass(capsys):
    """One call for all schemes that share it, each entry point with what only it takes."""
    assert main(["explain", "deepseek-r1", "--schemes", "all", "--flashinfer", "0.7.0"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "call as DeepSeekV3: routing_method_type=2, routing_logits=float32[num_tokens, 256], "
        in text
    )
    assert "routing_bias=float32[256], num_experts=256, top_k=8, n_group=8, topk_group=4, " in text
    assert (
        "to trtllm_fp8_block_scale_moe for mxfp8, with activation_type=3, fp8_quantization_type=2"
        in text
    )
    assert text.count("gates 9 of 9 accept") == 1
    assert main(["explain", "gpt-oss-120b"]) == 0
    text = capsys.readouterr().out
    assert "gemm1_alpha=1.702 (float32[local_num_experts])" in text
    assert "gemm1_bias=float32[local_num_experts, 5760]" in text
    assert "  exact    other calls: Renormalize()" in text


def test_explain_as_json_says_what_is_assumed_and_what_to_pass(tmp_path, capsys):
    (tmp_path / "config.json").write_text(CONFIG.replace('"num_experts_per_tok": 4, ', ""))
    assert main(["explain", str(tmp_path), "--schemes", "all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["assumed"] == {"top_k": 8, "activation": "silu"}
    # 64 rows of experts are no multiple of what most kernels take.
    verdicts = {v["scheme"]: (v["verdict"], v["call"] is None) for v in found["verdicts"]}
    assert verdicts["bf16"] == ("fallback", True)
    assert all(none == (verdict == "fallback") for verdict, none in verdicts.values())
    assert main(["explain", "swiglu/MiniMax-M2", "--json"]) == 2
    assert "did you mean minimax-m2" in capsys.readouterr().err
    assert main(["explain", "MINIMAXAI/minimax-m2", "--json"]) == 0
    call = json.loads(capsys.readouterr().out)["verdicts"][0]["call"]
    assert call["function"] == "trtllm_fp8_block_scale_moe"
    assert call["arguments"]["routing_bias"] == {"dtype": "float32", "shape": [256]}


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it raises
from pytest_moe_routing.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "args",
    [
        ("explain", "step-3.7-flash", "--schemes", "all", "--flashinfer", "0.6.12"),
        ("diff", "builtin", "builtin", "--models", "deepseek-r1"),
        ("check", str(packaged_directory())),
        ("--version",),
    ],
    ids=lambda args: args[0],
)
def test_nothing_of_this_needs_torch(args):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *args], capture_output=True, text=True, check=False
    )
    # Before 0.6.13 step-3.7-flash is lost: an answer that is bad.
    assert result.returncode == (args[0] == "explain"), result.stderr
    assert result.stdout
    assert not result.stderr


def test_explain_a_file(capsys):
    path = packaged_directory() / "deepseek-r1" / "model.yaml"
    assert main(["explain", str(path), "--flashinfer", "0.7.0"]) == 0
    text = capsys.readouterr().out
    assert "nvfp4: exact" in text
    assert "note     the float32 bias is rounded to bfloat16" in text


def test_explain_for_another_target(capsys):
    assert main(["explain", "deepseek-r1", "--target", "miniatures:LosesScale"]) == 1
    assert "routed_scaling_factor: the router has 2.5, the kernel 1" in capsys.readouterr().out


def test_explain_names_the_call_and_the_exact_one_of_the_same_method(capsys):
    assert main(["explain", "minimax-m3", "--target", "miniatures:NamesItsCall"]) == 1
    text = capsys.readouterr().out
    assert "  at       own/experts.py:7 with MiniMax2()\n" in text
    assert "  exact    as MiniMax2: routing_method_type=7" in text
    assert "  exact    other calls: DeepSeekV3(n_group=1, topk_group=1, " in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["explain", "nothing"], "'nothing' is neither a file nor one of the "),
        (["explain", "deepseek-r1", "--flashinfer", "x"], "found 'x', expected a release"),
        (["explain", "deepseek-r1", "--target", "x"], "unknown target 'x'"),
        (["explain", "deepseek-r1", "--golden-dir", "nowhere"], "expected a golden directory"),
    ],
)
def test_misuse_is_one_line(capsys, args, message):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_command_is_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "usage: moe-routing" in capsys.readouterr().err


CONFIG = """{
 "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 256, "moe_intermediate_size": 64,
 "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": true, "torch_dtype": "bfloat16",
 "_name_or_path": "somebody/Tiny-MoE"
}"""


def test_explain_a_config(tmp_path, capsys):
    (tmp_path / "config.json").write_text(CONFIG)
    assert main(["explain", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "router   softmax -> top 4 -> / sum" in text
    assert "bf16: fallback" in text
    assert "intermediate_size 64 not a multiple of 128" in text


def test_explain_says_what_no_backend_serves(tmp_path, capsys):
    quantized = CONFIG.replace(
        '"norm_topk', '"quantization_config": {"quant_method": "awq", "bits": 4}, "norm_topk'
    )
    (tmp_path / "config.json").write_text(quantized)
    assert main(["explain", str(tmp_path)]) == 1
    assert "not judged: int4; the schemes that are judged are fp8_block" in capsys.readouterr().out


def test_add_writes_what_is_then_read(tmp_path, capsys):
    (tmp_path / "config.json").write_text(CONFIG)
    assert main(["add", str(tmp_path / "config.json"), str(tmp_path / "golden")]) == 0
    assert "--moe-models tiny-moe --snapshot-update" in capsys.readouterr().out
    written = load_model(tmp_path / "golden" / "tiny-moe")
    assert replace(written, folder=Path()) == replace(read_config(tmp_path), folder=Path())
    assert main(["add", str(tmp_path), str(tmp_path / "golden")]) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "keys", "question"),
    [
        ({"norm_topk_porb": True}, ["unproven"], "norm_topk_porb is not read (did you mean norm"),
        ({"architectures": ["NewForCausalLM"]}, ["unknown_architectures"], "NewForCausalLM is not"),
        ({"scoring_func": "softmax"}, ["contradicted"], "scoring_func is sigmoid in transformers"),
        (
            {"scoring_func": "softmax", "architectures": ["NewForCausalLM"], "moe_odd": 1},
            ["unproven", "unknown_architectures", "contradicted"],
            "about experts or routing, and not read: moe_odd",
        ),
    ],
)
def test_what_add_tells_to_do_about_open_questions_settles_them(
    tmp_path, capsys, change, keys, question
):
    config = {key: value for key, value in R1.items() if key != "norm_topk_prob"}
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    golden = tmp_path / "golden"
    assert main(["add", str(tmp_path / "config.json"), str(golden)]) == 0
    shown = capsys.readouterr().out
    file = Path(shown.splitlines()[0])
    named = " and ".join(f"'{key}'" for key in keys)
    assert f"Settle these points, then remove {named} from the file:\n  {question}" in shown
    assert shown.endswith("--snapshot-update\n")
    assert main(["check", str(golden)]) == 0
    assert f": not judged: {question}" in capsys.readouterr().out
    settled = [line for line in file.read_text().splitlines() if line.partition(":")[0] not in keys]
    if "unproven" in keys:
        settled = [line for line in settled if "not read" not in line]
    file.write_text("\n".join(settled))
    assert main(["check", str(golden)]) == 0
    assert ": valid; fp8_block.golden.json" in capsys.readouterr().out
    assert main(["explain", str(file)]) == 0
    assert "not judged" not in capsys.readouterr().out


def test_add_of_a_broken_config_writes_nothing(tmp_path, capsys):
    (tmp_path / "config.json").write_text(CONFIG.replace("32", "-32"))
    assert main(["add", str(tmp_path), str(tmp_path / "golden")]) == 2
    error = capsys.readouterr().err
    assert "num_experts: found -32" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "golden").exists()


def test_the_page_of_models_is_current(capsys):
    assert main(["models"]) == 0
    page = Path(__file__).parents[1] / "docs" / "models.md"
    assert page.read_text() == capsys.readouterr().out, "moe-routing models > docs/models.md"


def test_layers_in_other_schemes_are_judged_in_theirs(tmp_path, capsys):
    layers = {
        "model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.1.mlp.experts": {"quant_algo": "FP8"},
    }
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": layers,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["explain", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["verdicts"]
    assert [(v["model"].partition("@")[2], v["scheme"]) for v in found] == [
        ("", "bf16"),
        ("0", "nvfp4"),
        ("1", "fp8_per_tensor"),
    ]


@pytest.mark.parametrize(
    "words",
    [("explain", ""), ("explain", "deepseek-r1", "--flashinfer", ""), ("check", " "), ("explain", "deepseek-r1", "--schemes", ",")],
)  # fmt: skip
def test_an_empty_argument_is_a_variable_that_is_not_set(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*words])
    assert caught.value.code == 2
    assert "error: found an empty argument, expected a value\n" in capsys.readouterr().err
