"""The adapters of fused entry points: every call fits the signature of its release."""

import inspect

import fused_cases
import pytest
import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import (
    FlashInfer,
    KernelCall,
    installed_release,
    known_releases,
    signatures,
)
from pytest_moe_routing.kernels.fused import fused_arguments
from pytest_moe_routing.kernels.routing import routing_arguments
from pytest_moe_routing.kernels.weights import prepare
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.routing import RoutingMethodType
from pytest_moe_routing.schemes import KERNEL_SCHEMES, kernel_of

RELEASES = ("0.6.12", "0.6.18", "0.7.2.post1")

#: What these releases' own sources lack: entry points, and arguments that a case needs.
LACKING = {
    "0.6.12": {
        "trtllm_fp8_per_channel_scale_moe",
        "trtllm_fp8_per_channel_scale_routed_moe",
        "trtllm_fp8_per_tensor_scale_routed_moe",
        "trtllm_mxint4_block_scale_routed_moe",
        "swiglustep",
        "alpha of trtllm_fp8_block_scale_moe",
        "alpha of trtllm_fp8_block_scale_routed_moe",
        "alpha of trtllm_bf16_moe",
        "alpha of trtllm_bf16_routed_moe",
    },
    "0.6.18": {
        "trtllm_fp8_per_channel_scale_moe",
        "trtllm_fp8_per_channel_scale_routed_moe",
        "swiglustep",
    },
    "0.7.2.post1": set(),
}


def arguments(release, scheme, activated, *, layout="", **how):
    flashinfer = FlashInfer.of(release)
    call = fused_cases.call(scheme)
    problem = fused_cases.problem(flashinfer, call, scheme, activated)
    kernel = kernel_of(scheme)
    prepared = prepare(problem.experts, kernel, gated=problem.layer.activation.gated, layout=layout)
    return fused_arguments(problem, call, prepared, flashinfer, **how)


def lacks(release, function, activated):
    wants = {
        "swigluoai": f"alpha of {function}",
        "swiglustep": f"clamp of {function}",
    }.get(activated)
    return bool(LACKING[release] & {function, activated, wants})


@pytest.mark.parametrize("routed", [False, True], ids=["logits", "routed"])
@pytest.mark.parametrize(("scheme", "activated"), fused_cases.CASES)
@pytest.mark.parametrize("release", RELEASES)
def test_calls_fit_the_signatures(release, scheme, activated, routed):
    function = kernel_of(scheme).function(routed)
    if lacks(release, function, activated):
        with pytest.raises(Unsupported, match=r"has no|does not accept"):
            arguments(release, scheme, activated, routed=routed)
        return
    given = arguments(release, scheme, activated, routed=routed)
    signature = FlashInfer.of(release).signature(function)
    assert set(signature.bind(**given).arguments) == set(given)
    assert all(
        value is not None
        for name, value in given.items()
        if signature.parameters[name].default is None
    )


@pytest.mark.parametrize("routed", [False, True], ids=["logits", "routed"])
@pytest.mark.parametrize(("scheme", "activated"), fused_cases.CASES)
def test_calls_fit_the_installed_package(scheme, activated, routed):
    fused_moe = pytest.importorskip("flashinfer.fused_moe")
    flashinfer = FlashInfer.of(installed_release())
    try:
        given = arguments(flashinfer.release, scheme, activated, routed=routed)
    except Unsupported as reason:
        # What which release lacks is tested above.
        pytest.skip(str(reason))
    function = getattr(fused_moe, kernel_of(scheme).function(routed))
    inspect.signature(function).bind(**given)
    assert given["routing_method_type"] == fused_moe.RoutingMethodType.Renormalize
    members = {"silu": "Swiglu", "swigluoai": "Swiglu", "gelu_tanh": "Geglu", "relu2": "Relu2"}
    member = members.get(activated, "SwigluStep")
    enums = pytest.importorskip("flashinfer.tllm_enums")
    assert given.get("activation_type", 3) == enums.ActivationType[member]


@pytest.mark.parametrize("scheme", KERNEL_SCHEMES)
def test_experts_may_have_biases_where_the_entry_point_takes_them(scheme):
    """NVFP4 with scales of tokens has the entry point of NVFP4, and no documented use of biases."""
    kernel = kernel_of(scheme)
    takes = "gemm1_bias" in signatures.parameters(kernel.function(), known_releases()[-1])
    assert kernel.biases is (takes and scheme != "nvfp4_per_token")


def test_routing_call_fits_the_signature():
    flashinfer = FlashInfer.of(known_releases()[-1])
    call = fused_cases.call()
    given = routing_arguments(
        torch.zeros(1, 8), None, call, tile_tokens_dim=8, shard=Shard.whole(8)
    )
    flashinfer.signature("trtllm_gen_routing").bind(**given, routing_method=1)


@pytest.mark.parametrize("scheme", KERNEL_SCHEMES)
@pytest.mark.parametrize("release", RELEASES)
def test_pairs_of_ids_and_weights(release, scheme):
    """Told apart by the annotation of `topk_ids`: a tuple from the releases given on."""
    if lacks(release, kernel_of(scheme).function(True), "silu"):
        return
    takes = {"0.6.12": {"nvfp4", "nvfp4_per_token", "mxfp4", "mxfp4_bf16"}}.get(
        release, set(KERNEL_SCHEMES) - {"fp8_per_channel", "mxint4"}
    )
    if scheme in takes:
        ids, weights = arguments(release, scheme, "silu", routed=True, pair=True)["topk_ids"]
        assert (ids.dtype, weights.dtype) == (torch.int32, torch.bfloat16)
    else:
        with pytest.raises(Unsupported, match="only packed ids"):
            arguments(release, scheme, "silu", routed=True, pair=True)


def test_packed_ids_keep_negative_weights_apart():
    from pytest_moe_routing.kernels.fused import packed_or_pair
    from pytest_moe_routing.reference.routing import Routing

    routing = Routing(torch.tensor([[3, 300]]), torch.tensor([[-0.5, 0.25]]))
    packed = packed_or_pair(routing, torch.device("cpu"), pair=False)
    assert (packed >> 16).tolist() == [[3, 300]]
    # The bits of -0.5 and 0.25 in bfloat16.
    assert (packed & 0xFFFF).tolist() == [[0xBF00, 0x3E80]]


def test_routing_arguments_of_a_call():
    flashinfer = FlashInfer.of(known_releases()[-1])
    call = KernelCall("fp8_block", "DeepSeekV3", 8, 2, "bfloat16", 4, 2, "router", "bfloat16", 2.5)
    problem = fused_cases.problem(flashinfer, call, "fp8_block")
    shard = Shard(4, 2)
    prepared = prepare(problem.experts, kernel_of("fp8_block"), gated=True, shard=shard)
    replay = torch.zeros(5, 2, dtype=torch.int16)
    given = fused_arguments(problem, call, prepared, flashinfer, replay=replay, finalize=False)
    assert given["routing_logits"].dtype == given["routing_bias"].dtype == torch.bfloat16
    assert (given["n_group"], given["topk_group"]) == (4, 2)
    assert given["routed_scaling_factor"] == 2.5
    assert (given["local_expert_offset"], given["local_num_experts"]) == (4, 2)
    assert given["num_experts"] == 8
    assert len(given["gemm1_weights"]) == 2
    assert given["routing_method_type"] == RoutingMethodType.DeepSeekV3
    assert given["routing_replay_out"] is replay
    assert given["do_finalize"] is False
    assert given["hidden_states_scale"].shape == (2, 5)
    assert given["hidden_states_scale"].is_contiguous()


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(("scheme", "kind"), [("fp8_block", "DeepSeekFp8"), ("mxfp8", "MxFp8")])
def test_an_entry_point_of_two_schemes_is_told_which(release, scheme, kind):
    number = signatures.enum("Fp8QuantizationType", release)[kind]
    assert arguments(release, scheme, "silu")["fp8_quantization_type"] == number
