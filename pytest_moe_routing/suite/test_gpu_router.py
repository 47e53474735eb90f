"""Compiled routers of vLLM and SGLang compute what they are for, on any NVIDIA GPU.

`--moe-kernels vllm[@WHEEL]` or `sglang[@WHEEL]`: each kernel as its framework drives it, for every
distinct router of the models. The kernels run in a process of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pytest_moe_routing.errors import TargetError
from pytest_moe_routing.suite.skips import unsupported_is_skipped

if TYPE_CHECKING:
    from pytest_moe_routing.kernels.process import RouterProcess
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


@pytest.fixture(scope="session")
def _router_process(_moe_session: MoESession) -> Iterator[RouterProcess | str]:
    """Return the process of the compiled routers, or why there is none; end it with the run."""
    kernels = _moe_session.router_kernels
    yield kernels
    if not isinstance(kernels, str):
        kernels.close()


@pytest.fixture
def router_kernels(
    _router_process: RouterProcess | str, record_property: Callable[[str, Any], None]
) -> RouterProcess:
    """Return the compiled routers under test, or skip the test without an NVIDIA GPU."""
    if isinstance(_router_process, str):
        record_property("moe_gpu", {"missing": _router_process})
        pytest.skip(_router_process)
    record_property("moe_gpu", _router_process.environment)
    return _router_process


@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_router_kernel(
    router_kernels: RouterProcess, moe_model: ModelSpec, pattern: str, logits_dtype: str
) -> None:
    """Experts and weights are right; two calls give the same; every row is written."""
    router = moe_model.router
    if router.not_expressible:
        pytest.skip(f"no recipe computes the router: {router.not_expressible}")
    message = ""
    try:
        with unsupported_is_skipped():
            found = router_kernels.compare(router, pattern, logits_dtype)
    except TargetError as error:
        message = str(error)
    if message:
        pytest.fail(message, pytrace=False)
    if not found["kernels"]:
        pytest.skip(f"{router_kernels.name} has no compiled kernel for this router")
    if found["problems"]:
        pytest.fail("\n".join(found["problems"]), pytrace=False)
