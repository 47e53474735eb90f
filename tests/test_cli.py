"""`moe-routing explain`."""

from __future__ import annotations

import pytest

from pytest_moe_routing.cli import main
from pytest_moe_routing.goldens import packaged_directory


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
    assert "scale: the router has 2.5, the kernel 1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["explain", "nothing"], "'nothing' is no file and no known model; models: deepseek-r1"),
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
