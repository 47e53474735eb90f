"""A router in Triton that runs on a CPU: host code, and the source of its kernel."""

from __future__ import annotations

import sys

import pytest
import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.sglang.probe.triton_gate import gate, language
from pytest_moe_routing.targets.stubs import Stub

MODULE = "own.gate"
NUMBERS = '{"sigmoid": 0, "softmax": 1}'
SOURCE = f"""
import torch
import triton
import triton.language as tl

NUMBERS = {NUMBERS}


@triton.jit
def _router_triton_kernel(
    scores_ptr, weights_ptr, ids_ptr, M, stride, N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SCORE: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    place = scores_ptr + rows[:, None] * stride + columns[None, :]
    x = tl.load(place, mask=mask, other=-float("inf")).to(tl.float32)
    if SCORE == 0:
        x = tl.sigmoid(x)
    else:
        e = tl.exp(x - tl.max(x, axis=1)[:, None])
        x = e / tl.sum(e, axis=1)[:, None]
    best = tl.max(x, axis=1)
    beyond = tl.full((1, BLOCK_N), N, dtype=tl.int32)
    lane = tl.where(x == best[:, None], columns[None, :], beyond)
    tl.store(weights_ptr + rows, best, mask=rows < M)
    tl.store(ids_ptr + rows, tl.min(lane, axis=1), mask=rows < M)


def route(scores, score):
    M, N = scores.shape
    weights, ids = torch.full((M,), torch.nan), torch.full((M,), -7, dtype=torch.int32)
    _router_triton_kernel[(triton.cdiv(M, 2),)](
        scores, weights, ids, M, scores.stride(0), N=N, BLOCK_M=2,
        BLOCK_N=triton.next_power_of_2(N), SCORE=NUMBERS[score], num_warps=1,
    )
    return weights, ids
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, Stub(name))

    def make(source, name="route"):
        (tmp_path / "own").mkdir()
        (tmp_path / "own" / "gate.py").write_text(source)
        return gate(str(tmp_path), MODULE, name)

    return make


def logits():
    """Five rows of six, in memory that has more columns and more rows around them."""
    return torch.randn(9, 16, generator=torch.Generator().manual_seed(3))[2:7, 4:10]


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_kernel_computes_what_its_source_says(made, score):
    weights, ids = made(SOURCE)(logits(), score)
    wanted = (logits().sigmoid() if score == "sigmoid" else logits().softmax(1)).max(1)
    torch.testing.assert_close(weights, wanted.values)
    assert ids.tolist() == wanted.indices.tolist()


def test_numbers_mean_what_the_kernel_does_with_them(made):
    swapped = made(SOURCE.replace(NUMBERS, '{"sigmoid": 1, "softmax": 0}'))
    torch.testing.assert_close(swapped(logits(), "softmax")[0], logits().sigmoid().amax(1))


def test_rows_that_no_program_has_are_not_written(made):
    weights, ids = made(SOURCE.replace("triton.cdiv(M, 2)", "M // 2"))(logits(), "sigmoid")
    assert weights.isnan().tolist() == [False] * 4 + [True]
    assert ids[-1] == -7


def test_a_nan_is_no_largest_number():
    numbers = torch.tensor([[torch.nan, 1.0, -torch.inf], [torch.inf, torch.nan, 0.0]])
    assert language().max(numbers, axis=1).tolist() == [1.0, torch.inf]
    assert language().maximum(torch.tensor([torch.nan, -2.0]), 0.0).tolist() == [0.0, 0.0]


def test_a_kernel_that_uses_what_is_not_here_is_not_judged(made):
    route = made(SOURCE.replace("tl.sigmoid(x)", "tl.fast_sigmoid(x)"))
    with pytest.raises(Unsupported, match=r"does not run on a CPU: AttributeError: .*fast_sigmoid"):
        route(logits(), "sigmoid")


def test_a_launch_without_an_argument_fails(made):
    with pytest.raises(TypeError, match="missing a required argument: 'SCORE'"):
        made(SOURCE.replace(", SCORE=NUMBERS[score]", ""))(logits(), "sigmoid")


@pytest.mark.parametrize(
    ("old", "new"),
    [("def route", "def other"), ("_router_triton_kernel", "_kernel"), ("BLOCK_M", "ROWS")],
)
def test_another_kernel_is_not_judged(made, old, new):
    with pytest.raises(Unsupported, match=r"own\.gate has no route that launches _router_triton"):
        made(SOURCE.replace(old, new))
