"""Unwritten memory shows in what kernels return; a machine without a driver is told in one line."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch

from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
from pytest_moe_routing.kernels.fused import launch_fused
from pytest_moe_routing.kernels.gpu import has_driver, poisoned
from pytest_moe_routing.kernels.routing import run_routing
from pytest_moe_routing.simulator.simulator import Simulator

FLASHINFER = FlashInfer.of("0.7.2.post1")


def test_unwritten_memory_is_nan_or_the_largest_integer():
    with poisoned():
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.empty(64, dtype=dtype).isnan().all()
        for dtype in (torch.int16, torch.int32):
            assert (torch.empty(64, dtype=dtype) == torch.iinfo(dtype).max).all()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


class Forgetful:
    """A routing operator that leaves one output as it was allocated."""

    RoutingMethodType = Simulator(FLASHINFER).RoutingMethodType

    def __init__(self, output):
        self.output = output
        operator = Simulator(FLASHINFER).trtllm_gen_routing

        def trtllm_gen_routing(*args, **kwargs):
            result = operator(*args, **kwargs)
            setattr(result, output, torch.empty_like(getattr(result, output)))
            return result

        trtllm_gen_routing.__signature__ = inspect.signature(operator)
        self.trtllm_gen_routing = trtllm_gen_routing


@pytest.mark.parametrize(
    ("output", "sign"),
    [
        ("topk_weights", lambda r: r.topk_weights.isnan().all()),
        ("topk_ids", lambda r: (r.topk_ids == 2**31 - 1).all()),
        ("expanded_idx_to_permuted_idx", lambda r: "at row 2147483647 of" in r.broken),
        ("cta_idx_xy_to_batch_idx", lambda r: "to expert 2147483647" in r.broken),
    ],
)
def test_what_a_routing_kernel_does_not_write_shows(output, sign):
    call = KernelCall("fp8_block", "Renormalize", 8, 2, "float32")
    # What stands for FlashInfer's module must not look like the simulator.
    fused_moe = Forgetful(output)
    torch.full((1 << 16,), 3, dtype=torch.int32)
    assert sign(run_routing(torch.zeros(5, 8), None, call, fused_moe=fused_moe))


def test_what_a_fused_kernel_does_not_write_shows():
    fused_moe = SimpleNamespace(trtllm_bf16_moe=lambda: torch.empty(4, 8, dtype=torch.bfloat16))
    (output,) = launch_fused(fused_moe, "trtllm_bf16_moe", {})
    assert output.isnan().all()


@pytest.mark.skipif(has_driver(), reason="there is a driver")
@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["serial", "xdist"])
def test_a_machine_without_a_driver_is_told_in_one_line(pytester, workers):
    chosen = ("--moe-models", "mixtral-8x7b", "-p", "no:cacheprovider")
    result = pytester.runpytest_subprocess("--moe-golden", "-m", "gpu", "-rs", *workers, *chosen)
    assert result.ret == 0
    told = re.findall(r"^SKIPPED \[(\d+)\].*: no NVIDIA driver.*$", result.stdout.str(), re.M)
    assert len(told) == 1
    assert int(told[0]) == result.parseoutcomes()["skipped"]
    assert int(told[0]) > 50
