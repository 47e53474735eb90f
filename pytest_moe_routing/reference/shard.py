"""The experts of one rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """The experts of one rank, in the launchers' words."""

    local_expert_offset: int
    local_num_experts: int

    @classmethod
    def whole(cls, num_experts: int) -> Shard:
        return cls(0, num_experts)

    @property
    def experts(self) -> range:
        return range(self.local_expert_offset, self.local_expert_offset + self.local_num_experts)
