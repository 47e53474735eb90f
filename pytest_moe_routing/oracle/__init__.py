"""The oracle: what a target decides, compared with what a model means. Imports no torch."""

from pytest_moe_routing.oracle.exact import Gate, exact_calls, kernel_call, same_calls
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.judge import judge, unjudged
from pytest_moe_routing.oracle.judgement import Judgement
from pytest_moe_routing.oracle.record import Reach, TestRecord, VerdictRecord
from pytest_moe_routing.oracle.target import Captured, Classification, Target
from pytest_moe_routing.oracle.verdict import Verdict

__all__ = [
    "Captured",
    "Classification",
    "Finding",
    "Gate",
    "Judgement",
    "Kind",
    "Reach",
    "Target",
    "TestRecord",
    "Verdict",
    "VerdictRecord",
    "exact_calls",
    "judge",
    "kernel_call",
    "same_calls",
    "unjudged",
]
