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
        """Return the shard of a rank that has all experts."""
        return cls(0, num_experts)

    def lies_within(self, num_experts: int) -> bool:
        """Whether it has experts, and all of them are among the layer's."""
        last = self.local_expert_offset + self.local_num_experts
        return 0 <= self.local_expert_offset < last <= num_experts

    @property
    def experts(self) -> range:
        """Global ids of its experts."""
        return range(self.local_expert_offset, self.local_expert_offset + self.local_num_experts)
