"""Which quantization methods of a framework are run by the tests that judge it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class MethodsRun:
    """What quantization methods hand to kernels of FlashInfer.

    Attributes:
        answered: How many hand-overs the tests reach.
        unanswered: The others, with the reason.
    """

    answered: int
    unanswered: Counter[str]
