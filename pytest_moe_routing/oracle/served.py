"""Whether a target serves a checkpoint as the scheme that its quantization config states.

Verdicts on a scheme hold for a checkpoint only if the target reads the scheme from its config.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ExpertsConfig, ModelSpec, RouterConfig
from pytest_moe_routing.oracle.checkpoints import Checkpoint, Served
from pytest_moe_routing.oracle.target import Target

#: A router and experts that every kernel serves: a checkpoint is not rejected for them.
_ROUTER = RouterConfig(
    num_experts=64,
    top_k=4,
    scoring_func="softmax",
    correction_bias=None,
    renormalize=True,
    logits_dtype="bfloat16",
)
_EXPERTS = ExpertsConfig(hidden_size=1024, intermediate_size=512, activation="silu", gated=True)


@dataclass(frozen=True)
class ServedOtherwise:
    """Experts that a target does not serve as their checkpoint's scheme."""

    checkpoint: Checkpoint
    experts: str
    served: Served


@dataclass(frozen=True)
class CheckpointsFound:
    """How a target serves the checkpoints of a scheme.

    Attributes:
        answered: How many formats were asked about.
        unanswered: Why how many formats could not be asked about.
    """

    wrong: tuple[ServedOtherwise, ...]
    answered: int
    unanswered: Counter[str]


def served_otherwise(target: Target, scheme: str, models: Sequence[ModelSpec]) -> CheckpointsFound:
    """Ask how a target serves each format of a scheme's checkpoints.

    Args:
        models: Models that may have the scheme. Its config states it in the same way for each.
    """
    wrong: list[ServedOtherwise] = []
    answered, unanswered = 0, Counter[str]()
    plain = [replace(m, router=_ROUTER, experts=_EXPERTS, dtype="bfloat16") for m in models[:1]]
    for model, checkpoint in product(plain, target.checkpoints(scheme)):
        try:
            found = [
                ServedOtherwise(checkpoint, name, target.served(model, checkpoint, name))
                for name in checkpoint.experts
            ]
        except Unsupported as reason:
            unanswered[str(reason)] += 1
            continue
        answered += 1
        rejected = [each for each in found if each.served.rejection]
        # A checkpoint is rejected as a whole.
        wrong += rejected[:1] or [
            each for each in found if not _is_right(checkpoint.experts[each.experts], each.served)
        ]
    return CheckpointsFound(tuple(wrong), answered, unanswered)


def _is_right(scheme: str, served: Served) -> bool:
    return scheme in served.schemes if scheme else not served.schemes
