"""Weights that the adapters prepare are those of vLLM's and SGLang's own code, byte for byte."""

import pytest
import torch
from production import Sglang, Vllm, flashinfer  # noqa: F401

from pytest_moe_routing.kernels.padding import PaddedExperts, padded_sizes
from pytest_moe_routing.kernels.weights import prepare
from pytest_moe_routing.reference.weights import GeneratedExperts
from pytest_moe_routing.schemes import kernel_of, storage_of

pytestmark = pytest.mark.usefixtures("flashinfer")

GATED = ("bf16", "fp8_per_tensor", "fp8_block", "mxfp8", "nvfp4", "mxfp4", "mxint4")
PLAIN = ("bf16", "fp8_per_tensor", "mxfp8", "nvfp4")
EVEN = ((512, 256), (256, 384), (1024, 512))
#: Hidden and intermediate sizes that frameworks pad.
ODD = {
    "bf16": (256, 192),
    "fp8_per_tensor": (256, 168),
    "mxfp8": (160, 96),
    "nvfp4": (160, 176),
    "mxfp4": (160, 96),
}


def layer(scheme, sizes, gated):
    return GeneratedExperts(
        3,
        *sizes,
        storage_of(scheme).weight,
        gated,
        biases=scheme == "mxfp4",
        intermediate_scale=0.01,
    )


def checkpoint(experts):
    """The tensors of a layer's experts, one below the other, gate before up."""
    every = [experts[e] for e in range(len(experts))]
    found = {"w13": [e.gemm1.data for e in every], "w2": [e.gemm2.data for e in every]}
    if every[0].gemm1.scales is not None:
        found |= {"s13": [e.gemm1.scales for e in every], "s2": [e.gemm2.scales for e in every]}
    if every[0].bias1 is not None:
        found |= {"b13": [e.bias1 for e in every], "b2": [e.bias2 for e in every]}
    return {name: torch.stack(tensors) for name, tensors in found.items()}


def ours(experts, scheme, gated):
    """What the adapters prepare, in the layout that frameworks use."""
    kernel = kernel_of(scheme)
    layouts = kernel.layouts
    prepared = prepare(
        PaddedExperts(experts, scheme, gated),
        kernel,
        gated=gated,
        layout="blocks" if "blocks" in layouts else "",
    )
    found = dict(prepared.tensors)
    if prepared.bias1 is not None:
        found |= {"bias1": prepared.bias1, "bias2": prepared.bias2}
    return found


def assert_same_bytes(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        one, two = (
            t.detach().contiguous().view(torch.uint8).flatten() for t in (found[name], tensor)
        )
        assert one.numel() == two.numel(), name
        assert torch.equal(one, two), f"{name}: {int((one != two).sum())} of {one.numel()} bytes"


@pytest.mark.parametrize("sizes", EVEN, ids=str)
@pytest.mark.parametrize(
    ("scheme", "gated"), [*((s, True) for s in GATED), *((s, False) for s in PLAIN)]
)
def test_vllm(scheme, gated, sizes, monkeypatch):
    if scheme == "mxint4" and sizes[1] % 256:
        pytest.skip("blocks of 256 columns")
    experts = layer(scheme, sizes, gated)
    found = Vllm(monkeypatch).prepare(scheme, checkpoint(experts), gated)
    assert_same_bytes(ours(experts, scheme, gated), found)


@pytest.mark.parametrize("sizes", EVEN, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("scheme", PLAIN)
def test_sglang(scheme, gated, sizes, monkeypatch):
    experts = layer(scheme, sizes, gated)
    found = Sglang(monkeypatch).prepare(scheme, checkpoint(experts), gated)
    assert_same_bytes(ours(experts, scheme, gated), found)


@pytest.mark.parametrize(
    ("scheme", "gated"), [(s, gated) for s in PLAIN for gated in (True, False)]
)
def test_vllm_pads(scheme, gated, monkeypatch):
    experts = layer(scheme, ODD[scheme], gated)
    vllm = Vllm(monkeypatch)
    found = vllm.prepare(scheme, checkpoint(experts), gated)
    expected = ours(experts, scheme, gated)
    assert expected["gemm1_weights"].numel() > checkpoint(experts)["w13"].numel()
    assert_same_bytes(expected, found)


def test_vllm_pads_mxfp4_before_it_loads(monkeypatch):
    """Tensors of the rounded sizes are allocated with zeros, and the checkpoint is copied into them."""
    vllm = Vllm(monkeypatch)
    for sizes in (ODD["mxfp4"], (2880, 2880)):
        rounded = vllm.mxfp4.mxfp4_round_up_hidden_size_and_intermediate_size("TRTLLM", *sizes, "")
        assert rounded == padded_sizes(*sizes, "mxfp4", gated=True)
    experts = layer("mxfp4", ODD["mxfp4"], True)
    given, padded = checkpoint(experts), {}
    hidden, inner = padded_sizes(*ODD["mxfp4"], "mxfp4", gated=True)
    shapes = {
        "w13": (2 * inner, hidden // 2),
        "w2": (hidden, inner // 2),
        "s13": (2 * inner, hidden // 32),
        "s2": (hidden, inner // 32),
        "b13": (2 * inner,),
        "b2": (hidden,),
    }
    for name, shape in shapes.items():
        padded[name] = given[name].new_zeros(3, *shape)
        halves = 2 if "13" in name else 1
        for to, part in zip(
            padded[name].chunk(halves, 1), given[name].chunk(halves, 1), strict=True
        ):
            to[tuple(slice(size) for size in part.shape)] = part
    assert_same_bytes(ours(experts, "mxfp4", True), vllm.prepare("mxfp4", padded, True))


@pytest.mark.parametrize("scheme", ["fp8_per_tensor", "nvfp4"])
def test_sglang_pads_plain_experts(scheme, monkeypatch):
    hidden = 256
    experts = layer(scheme, (hidden, 176), False)
    found = Sglang(monkeypatch).prepare(scheme, checkpoint(experts), False)
    assert_same_bytes(ours(experts, scheme, False), found)


def test_sglang_pads_gate_and_up_as_one(monkeypatch):
    """A defect of SGLang 0.5.23 that docs/findings.md describes: the up rows end up in the gate."""
    weights = torch.arange(2 * 168).view(1, 336, 1).expand(1, 336, 256)
    align = Sglang(monkeypatch).trtllm._align_fp8_moe_weights
    padded, _, inner = align(weights, torch.zeros(1, 256, 168), True, 16)
    assert inner == 176
    # The kernel takes rows 0 to 175 for the first half.
    assert padded[0, 168:176, 0].tolist() == list(range(168, 176))


def test_a_difference_is_noticed(monkeypatch):
    experts = layer("nvfp4", (512, 256), True)
    swapped = checkpoint(experts)
    swapped["w13"] = torch.cat(swapped["w13"].chunk(2, 1)[::-1], 1)
    found = Vllm(monkeypatch).prepare("nvfp4", swapped, True)
    with pytest.raises(AssertionError, match="gemm1_weights: "):
        assert_same_bytes(ours(experts, "nvfp4", True), found)
