"""The oracle: what a target decides, compared with what a model means. Imports no torch."""

from pytest_moe_routing.oracle.exact import Gate, exact_calls, kernel_call, same_calls
from pytest_moe_routing.oracle.judge import GOOD, VERDICTS, Judgement, judge, story, unjudged
from pytest_moe_routing.oracle.target import Captured, Classification, Target

__all__ = [
    "GOOD",
    "VERDICTS",
    "Captured",
    "Classification",
    "Gate",
    "Judgement",
    "Target",
    "exact_calls",
    "judge",
    "kernel_call",
    "same_calls",
    "story",
    "unjudged",
]
