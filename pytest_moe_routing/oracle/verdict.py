"""The five verdicts, and what keeps one from being given."""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    """What becomes of a model in a quantization scheme when a target decides."""

    #: The fused kernel runs and computes the model's router.
    EXACT = "exact"
    #: The fused kernel runs and computes something else.
    WRONG = "wrong"
    #: The gates accept the model and the call fails.
    CRASH = "crash"
    #: The model is rejected, and no fused kernel of the release could have run it.
    FALLBACK = "fallback"
    #: The model is rejected, and a routing method computes its router exactly.
    MISSED = "missed"
    #: The target could not be asked a question that the verdict needs.
    NOT_JUDGED = "not judged"
    #: The target's code, or the adapter's, failed while it was asked.
    ERROR = "error"

    @property
    def is_given(self) -> bool:
        """Whether it is one of the five."""
        return self not in (Verdict.NOT_JUDGED, Verdict.ERROR)

    @property
    def is_good(self) -> bool:
        """Whether a target that decides well may have it."""
        return self in (Verdict.EXACT, Verdict.FALLBACK)
