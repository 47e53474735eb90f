"""Runs modular experts behind an exchange of tokens over NVLink, with FlashInfer's part of it ours.

vLLM's own step before the experts quantizes the tokens of this rank and hands them to FlashInfer,
and its own step after the experts takes the output back. What FlashInfer would send lies here in
the order of an all-gather: the tokens of the other rank, which are these in reverse, and these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from torch import Tensor

from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.marked import in_reverse
from pytest_moe_routing.targets.vllm.probe.ranks import TOKENS
from pytest_moe_routing.targets.vllm.probe.release import names

#: The backends of an exchange, by the row of the contract that makes its steps.
BACKENDS: Mapping[str, str] = {
    "nvlink-one-sided": "flashinfer_nvlink_one_sided",
    "nvlink-two-sided": "flashinfer_nvlink_two_sided",
}
_RANKS = 2


class _Communication:
    """FlashInfer's communication of one side."""

    def dispatch(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        hidden_states_scale: Tensor | None,
        max_tokens_per_rank: int,
    ) -> SimpleNamespace:
        """Return what arrives on this rank."""
        if max_tokens_per_rank != TOKENS:
            raise ValueError(f"{max_tokens_per_rank} tokens a rank, of {TOKENS}")
        scale = None if hidden_states_scale is None else in_reverse(hidden_states_scale)
        return SimpleNamespace(
            hidden_states=in_reverse(hidden_states),
            hidden_states_scale=scale,
            topk_ids=in_reverse(topk_ids),
            topk_weights=in_reverse(topk_weights),
        )

    def combine(self, hidden_states: Tensor, *, output: Tensor) -> None:
        """Write what comes back to this rank."""
        output.copy_(_own(hidden_states))


class _Manager:
    """vLLM's manager of an exchange, on the second of two ranks."""

    world_size, rank = _RANKS, _RANKS - 1
    workspace_tensor = prepare_workspace_tensor = None

    def initialize(self, **_: Any) -> None:
        """Make nothing: there is no memory to share."""

    def get_communication(self) -> _Communication:
        return _Communication()

    def ensure_alltoall_workspace_initialized(self) -> bool:
        return True


class _TwoSided:
    """FlashInfer's functions of two sides."""

    @staticmethod
    def mnnvl_moe_alltoallv_prepare_without_allgather(
        ids: Tensor, weights: Tensor, *_: Any
    ) -> tuple[Any, ...]:
        return None, in_reverse(ids), in_reverse(weights), None

    @staticmethod
    def mnnvl_moe_alltoallv(x: Tensor, *_: Any) -> Tensor:
        return in_reverse(x)

    @staticmethod
    def mnnvl_moe_alltoallv_combine(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return _own(x)


def _own(x: Tensor) -> Tensor:
    return x[len(x) // _RANKS :]


@contextmanager
def exchange() -> Iterator[None]:
    """Have vLLM's steps around experts exchange tokens with the stand-ins."""
    communicator = SimpleNamespace(all2all_manager=_Manager())
    group = SimpleNamespace(world_size=_RANKS, device_communicator=communicator)
    values = {
        "get_ep_group": lambda: group,
        "get_local_sizes": lambda: [TOKENS] * _RANKS,
        "FlashInferNVLinkOneSidedManager": _Manager,
    }
    with ExitStack() as stack:
        modules = [names().spelling(key).module for key in BACKENDS if names().expects(key)]
        for name in (*modules, names().spelling("prepare-factory").module):
            known = vars(stubs.real_module(name))
            here = {each: value for each, value in values.items() if each in known}
            stack.enter_context(patch.dict(known, here))
        two_sided = vars(import_module("flashinfer.comm.trtllm_alltoall"))
        stack.enter_context(patch.dict(two_sided, MnnvlMoe=_TwoSided))
        yield
