"""What SGLang's servers take by default on other GPUs than Blackwell, and mistakes that show there."""

from __future__ import annotations

import pytest
from sglang_targets import oldest_and_newest, opened
from test_sglang_mistakes import edit
from wheels import unpack, wheels_since

from pytest_moe_routing.failure import Rank
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.layouts import wrong_layouts
from pytest_moe_routing.oracle.other_experts import other_calls
from pytest_moe_routing.suite.causes import of_layout, of_other_experts

MODELS = load_models(packaged_directory())
FP8 = "fp8_per_tensor"
RUNNER = "layers/moe/moe_runner/flashinfer_cutlass.py"
#: The scale of the input, and one that the second GEMM's input is multiplied by.
INPUT = "scaled_fp8_quant(x, quant_info.quant_scales[3])"
#: The factor behind the kernel.
SCALED = 'if quant_info.quant_type in ("bf16", "fp8"):'


@pytest.fixture(scope="module", **oldest_and_newest())
def target(request):
    yield from opened(request.param)


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    wheels = wheels_since("0.5.18", "sglang")
    root = unpack(wheels[-1], tmp_path_factory.mktemp("sglang")) if wheels else None
    if root is not None:
        edit(root, RUNNER, (INPUT, INPUT.replace("3", "1")))
        edit(root, RUNNER, (SCALED, SCALED.replace(', "fp8"', "")))
    yield from opened(root)


@pytest.mark.parametrize(
    ("model", "scheme", "devices"),
    [
        # arg_groups/model_overrides/nemotron_h.py, in releases before 0.5.20 nemotron_h_hook.py.
        ("nemotron-3-nano", FP8, ["Hopper", "RTX Blackwell"]),
        ("nemotron-3-super", "bf16", ["Hopper", "RTX Blackwell"]),
        # FlashInfer has no kernel for it on Hopper: Marlin's runs there.
        ("nemotron-3-nano", "nvfp4", ["RTX Blackwell"]),
        ("qwen3-30b-a3b", FP8, []),
        # Triton's kernels are the default on Hopper.
        ("gpt-oss-20b", "mxfp4", ["RTX Blackwell"]),
    ],
)
def test_gpus_on_which_a_server_takes_other_kernels_by_default(target, model, scheme, devices):
    found = target.taken_elsewhere(MODELS[model], scheme)
    assert [device for device in ("Hopper", "RTX Blackwell") if device in str(found)] == devices


def test_a_call_that_is_made_by_default_on_hopper_is_asked_about_there(target):
    calls = target.other_experts(MODELS["nemotron-3-nano"], FP8)
    assert [(call.device, call.requests) for call in calls] == [
        ("Blackwell", True),
        ("Hopper", False),
        ("RTX Blackwell", False),
    ]
    assert not any(call.findings for call in calls)
    devices = {at.device for at in target.laid_out_elsewhere(MODELS["nemotron-3-nano"], FP8)}
    assert devices == {"Blackwell", "Hopper", "RTX Blackwell"}


def test_an_activation_that_is_lost_by_default_on_rtx_blackwell(target):
    """flashinfer_cutlass.py has no SwigluStep; `_moe_runner_backend_quant_constraints` takes it."""
    found = other_calls(target, "nvfp4", [MODELS["step-3.7-flash"].variants()["43-44"]])
    told = [of_other_experts(target, "nvfp4", wrong) for wrong in found.wrong]
    [by_default] = [failure for failure in told if failure.rank is not Rank.LATENT]
    assert by_default.lines[1:3] == (
        "  reach    a published checkpoint, by default on RTX Blackwell",
        "  because  activation_type arrives as Swiglu, the layer has SwigluStep",
    )


def test_an_input_scale_that_is_wrong_by_default_on_hopper(mistaken):
    models = [MODELS["qwen3-30b-a3b"], MODELS["nemotron-3-nano"]]
    found = wrong_layouts(mistaken, FP8, models)
    failures = [of_layout(mistaken, FP8, wrong) for wrong in found.wrong]
    [by_default, _, named] = sorted(failures, key=lambda failure: failure.rank)
    assert (by_default.rank, by_default.case) == (Rank.SILENT, f"nemotron-3-nano {FP8}")
    assert by_default.lines[1:3] == (
        "  reach    a published checkpoint, by default on Hopper",
        "  because  input_scale arrives as 1 / a2_scale, the layer has a1_scale",
    )
    # No server takes the runner for Qwen3 by itself.
    assert (named.rank, named.case) == (Rank.LATENT, f"qwen3-30b-a3b {FP8}")


def test_a_factor_that_is_lost_by_default_on_hopper(mistaken):
    models = [MODELS["nemotron-3-nano"], MODELS["deepseek-r1"]]
    ways = "requested-experts", "other-experts"
    found = other_calls(mistaken, FP8, models)
    told = [of_other_experts(mistaken, FP8, wrong) for wrong in found.wrong]
    lost = {f.cause.partition(":")[0]: f for f in told if "applied-routed" in f.cause}
    assert [name in lost for name in ways] == [True, True]
    reach = "  reach    a published checkpoint, by default on Hopper"
    assert (lost["other-experts"].rank, lost["other-experts"].lines[1]) == (Rank.SILENT, reach)
    assert lost["requested-experts"].rank is Rank.LATENT
