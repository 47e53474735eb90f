"""The ranks that a layer of vLLM runs on, and the config of their server."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from pytest_moe_routing.targets.scales import FIRST
from pytest_moe_routing.targets.shares import rank_of, uneven_count
from pytest_moe_routing.targets.vllm.probe import server_defaults

#: The tokens of most calls.
TOKENS = 8
#: The ranks that share out the experts, where these are not too few: with two, code that is wrong
#: for the third rank would be right.
_RANKS = 4
EXPERT_PARALLEL = "--enable-expert-parallel"


def shared_out_to(experts: int) -> int:
    """Return how many ranks share out so many experts: 1 if these cannot be shared out.

    Each rank has all different scales that there are, if it can.
    """
    counts = [count for count in (_RANKS, 2, 1) if experts % count == 0]
    return next((count for count in counts if experts // count >= len(FIRST)), counts[0])


class Surroundings(SimpleNamespace):
    """An object of vLLM that a layer reads: what is not in it, the probe does not know."""


class Off:
    """Operators of other GPUs: none is enabled."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: False


@dataclass(frozen=True)
class Ranks:
    """Where a layer runs: as the last of so many ranks, each with all experts or a part of them.

    Of ranks that have a part of each expert, it is another one, see `rank_of`.

    Attributes:
        count: Ranks that the experts are shared out to.
        dispatched: Each rank has tokens of its own, which an all-gather brings to the others.
        placement: How vLLM is told to place the experts; None if it is not told.
        tokens: How many tokens the layer is given.
        split: Each rank has a part of each expert, rather than some of the experts.
        exchange: How vLLM is told to exchange tokens.
    """

    count: int = 1
    dispatched: bool = False
    placement: str | None = None
    tokens: int = TOKENS
    split: bool = False
    exchange: str = server_defaults.ALL_TO_ALL

    @property
    def tensor_parallel(self) -> int:
        """The ranks that have the same tokens."""
        return 1 if self.dispatched else self.count

    @property
    def shards(self) -> int:
        """The ranks that have some of the experts each."""
        return 1 if self.split else self.count

    @property
    def parts(self) -> int:
        """The ranks that have a part of each expert."""
        return self.count if self.split else 1

    @property
    def rank(self) -> int:
        """The rank that the layer runs as."""
        return rank_of(self.count) if self.split else self.count - 1

    @property
    def flags(self) -> tuple[str, ...]:
        """What a user gives a server for it."""
        if self.count == 1:
            return ()
        sharing = () if self.split else (EXPERT_PARALLEL,)
        parallel = "data" if self.dispatched else "tensor"
        told = self.exchange != server_defaults.ALL_TO_ALL
        exchanging = (f"--all2all-backend {self.exchange}",) if told else ()
        return (*sharing, f"--{parallel}-parallel-size {self.count}", *exchanging)

    def arguments(self) -> dict[str, int]:
        """Return the arguments of the factory that say so."""
        own = self.count // self.tensor_parallel
        return {"tp_size": self.tensor_parallel, "dp_size": own, "pcp_size": 1}

    def config(self, dtype: torch.dtype) -> Surroundings:
        """Return the config of the server."""
        placement = self.placement or server_defaults.parallel(server_defaults.PLACEMENT)
        return Surroundings(
            parallel_config=Surroundings(
                enable_expert_parallel=self.count > 1 and not self.split,
                all2all_backend=self.exchange,
                enable_eplb=False,
                enable_dbo=False,
                expert_placement_strategy=placement,
                elastic_ep_max_dp_size=None,
            ),
            compilation_config=Surroundings(
                max_cudagraph_capture_size=512, static_forward_context={}, static_all_moe_layers=[]
            ),
            scheduler_config=Surroundings(max_num_batched_tokens=8192),
            model_config=Surroundings(dtype=dtype, hf_config=None, hf_text_config=None),
            kernel_config=Surroundings(moe_backend=server_defaults.moe_backend()),
            device_config=Surroundings(device="cpu"),
            lora_config=None,
        )


def unevenly_shared_out(experts: int) -> Ranks | None:
    """Return ranks that cannot have equally many of so many experts; None if all can."""
    count = uneven_count(experts)
    return None if count is None else Ranks(count, dispatched=count % 2 == 1)
