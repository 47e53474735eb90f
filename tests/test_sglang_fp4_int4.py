"""SGLang's MXFP4 and MXINT4 layers: other runners, configs and checkpoints than the other schemes'."""

from __future__ import annotations

from dataclasses import replace

import pytest
from packaging.version import Version
from sglang_targets import oldest_and_newest, opened

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.report.text import sentence, story
from pytest_moe_routing.targets.sglang.target import SglangTarget
from pytest_moe_routing.targets.source import Source

MODELS = load_models(packaged_directory())
TRTLLM, MXFP4 = "flashinfer_trtllm", "flashinfer_mxfp4"


@pytest.fixture(scope="module", **oldest_and_newest())
def target(request):
    yield from opened(request.param)


@pytest.mark.parametrize(
    ("model", "scheme", "runner"),
    [("gpt-oss-20b", "mxfp4", MXFP4), ("kimi-k2.5", "mxint4", TRTLLM)],
)
def test_release_is_exact_by_default(target, model, scheme, runner):
    """SGLang names the runner itself: arg_groups/model_overrides/gpt_oss.py, overrides.py."""
    found = judge(target, MODELS[model], scheme)
    record = found.record()
    assert found.verdict == "exact", "\n".join(story(record))
    assert target.chosen_runner(MODELS[model], scheme) == runner
    assert (record.opt_in, record.by_default, record.reach_question) == ((), True, "")


def test_release_is_seen_to_clamp_at_a_number_of_its_own(target):
    """Parameters are prepared with the weights: 7 where a model has no limit (mxfp4.py, `or 7.0`)."""
    model = MODELS["gpt-oss-20b"]
    unclamped = replace(model, experts=replace(model.experts, activation_limit=0.0))
    found = judge(target, unclamped, "mxfp4")
    assert any("gemm1_clamp_limit arrives as 7" in sentence(f) for f in found.findings)


def test_release_drops_the_clamp_of_mxint4(target):
    """`apply_weights` of CompressedTensorsMxInt4MoE reads another field than the model's."""
    if Version(target.version()) < Version("0.5.20"):
        pytest.skip("this release has no GLM-5.3-Flash")
    found = judge(target, MODELS["glm-5.3-flash"], "mxint4")
    assert found.verdict == "wrong"
    assert [sentence(f) for f in found.findings] == [
        "gemm1_clamp_limit arrives as inf, the layer has 10"
    ]
    assert found.record().by_default


def test_release_has_kimi_k3_route_itself_by_default(target):
    """models/kimi_k3.py asks its TopK for experts, for the runner that the server names."""
    found = judge(target, MODELS["kimi-k3"], "mxfp4")
    assert found.verdict == "missed"
    assert "SGLang's own top-k routes" in "\n".join(story(found.record()))
    assert found.record().opt_in == ()


def test_release_runs_mixed_checkpoints_of_models_that_say_so(target):
    """Code that does not tell its TopK of MXFP4 experts runs a bypass that raises."""
    r1 = MODELS["deepseek-r1"]
    if Version(target.version()) < Version("0.5.20"):
        with pytest.raises(
            Unsupported, match=r"DeepseekV3ForCausalLM in mxfp4 are known to SGLang"
        ):
            target.gates(r1, "mxfp4", "DeepSeekV3")
        return
    found = judge(target, r1, "mxfp4")
    assert found.verdict == "crash"
    assert "NotImplementedError" in sentence(found.findings[0])
    assert found.record().opt_in == (f"--moe-runner-backend {MXFP4}",)
    # DeepSeek-V4 and MiMo tell it.
    assert judge(target, MODELS["deepseek-v4-flash"], "mxfp4").verdict == "fallback"


@pytest.mark.parametrize(
    ("model", "version", "is_known"),
    [
        ("deepseek-r1", "0.5.18", False),
        ("deepseek-r1", "0.5.20", True),
        ("gpt-oss-20b", "0.5.18", True),
    ],
)
def test_checkpoints_are_judged_from_the_release_that_knows_them(
    tmp_path, model, version, is_known
):
    """Without sources, what is asked next is a name of the contract."""
    (tmp_path / "sglang").mkdir()
    target = SglangTarget(FlashInfer.of(), Source(tmp_path, version, None))
    reason = "not judged: " if is_known else "are known to SGLang from 0.5.20 on"
    with pytest.raises(Unsupported, match=reason):
        target.chosen_runner(MODELS[model], "mxfp4")
    target.close()
