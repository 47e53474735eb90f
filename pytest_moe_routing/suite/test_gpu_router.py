"""Compiled routers of vLLM and SGLang compute what they are for, on any NVIDIA GPU.

`--moe-kernels vllm[@WHEEL]` or `sglang[@WHEEL]`: each kernel as its framework drives it, for every
distinct router of the models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_moe_routing.kernels.routers import RouterKernels
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.session import MoESession

pytestmark = [pytest.mark.gpu(kernels="compiled"), pytest.mark.moe_models(distinct_routers=True)]

PATTERNS = (
    "plain",
    "all-negative",
    "deep-negative-high-bias",
    "saturated",
    "ties-at-k",
    "ties-at-groups",
    "near-ties",
    "hot-expert",
    "bias-below-minus-1",
    "narrow-bias",
)
#: On both sides of a warp, of a block and of the kernels' own switches.
TOKENS = (1, 7, 64, 515)


@pytest.fixture
def router_kernels(
    _moe_session: MoESession, record_property: Callable[[str, Any], None], _moe_stderr: int
) -> Iterator[RouterKernels]:
    """Return the compiled routers under test, or skip the test without an NVIDIA GPU."""
    from pytest_moe_routing.kernels import gpu

    kernels = _moe_session.router_kernels
    if isinstance(kernels, str):
        record_property("moe_gpu", {"missing": kernels})
        pytest.skip(kernels)
    record_property("moe_gpu", kernels.environment())
    with gpu.guarded(_moe_stderr):
        yield kernels


@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_router_kernel(
    router_kernels: RouterKernels, moe_model: ModelSpec, pattern: str, logits_dtype: str
) -> None:
    """Experts and weights are right; two calls give the same; every row is written."""
    import torch

    from pytest_moe_routing.compare import compare_routing
    from pytest_moe_routing.logits import make_case

    router = moe_model.router
    calls = [] if router.not_expressible else list(router_kernels.calls(router))
    if not calls:
        pytest.skip(f"{router_kernels.name} has no compiled kernel for this router")
    problems = []
    for call in calls:
        case = make_case(
            pattern, call.recipe, num_tokens=max(TOKENS), num_experts=router.num_experts
        )
        logits = case.logits.to(getattr(torch, logits_dtype))
        bias = None if case.bias is None else case.bias.cuda()
        for tokens in TOKENS:
            some = logits[:tokens]
            weights, ids = (x.cpu() for x in call.run(some.cuda(), bias))
            found = compare_routing(
                ids,
                weights,
                some,
                call.recipe,
                case.bias,
                precision=call.precision,
                lower_index=False,
            )
            if not found.ok:
                problems.append(f"{call.kernel}, {tokens} tokens: {found.message()}")
                break
            again = [x.cpu() for x in call.run(some.cuda(), bias)]
            if not (torch.equal(again[1], ids) and torch.equal(again[0], weights)):
                problems.append(
                    f"{call.kernel}, {tokens} tokens: a second call gives different results"
                )
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
