"""`moe-routing explain`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

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
        "fp8_block: missed",
        "  gate     routing method: no, fp8_block does not take Unspecified",
        "  same     DeepSeekV3(n_group=1, topk_group=1, routed_scaling_factor=3)",
    ):
        assert line in text


def test_explain_a_file(capsys):
    path = packaged_directory() / "deepseek-r1" / "model.yaml"
    assert main(["explain", str(path), "--flashinfer", "0.7.0"]) == 0
    text = capsys.readouterr().out
    assert "nvfp4: exact" in text
    assert "note     the float32 bias is rounded to bfloat16" in text


def test_explain_for_another_target(capsys):
    assert main(["explain", "deepseek-r1", "--target", "miniatures:LosesScale"]) == 1
    assert "routed_scaling_factor: the router has 2.5, the kernel 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["explain", "nothing"], "'nothing' is neither a file nor one of the "),
        (["explain", "deepseek-r1", "--flashinfer", "x"], "found 'x', expected a number"),
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
    assert main(["explain", str(tmp_path)]) == 0
    assert "not judged: int4; the schemes that are judged are fp8_block" in capsys.readouterr().out


def test_add_writes_what_is_then_read(tmp_path, capsys):
    (tmp_path / "config.json").write_text(CONFIG)
    assert main(["add", str(tmp_path / "config.json"), str(tmp_path / "golden")]) == 0
    assert "--moe-models tiny-moe -m 'not gpu' --snapshot-update" in capsys.readouterr().out
    written = load_model(tmp_path / "golden" / "tiny-moe")
    assert replace(written, folder=Path()) == replace(read_config(tmp_path), folder=Path())
    assert main(["add", str(tmp_path), str(tmp_path / "golden")]) == 2
    assert "already exists" in capsys.readouterr().err


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
