"""Numbers of routing methods that the FlashInfer in force reads as other methods.

FlashInfer's enum has moved between releases, and frameworks keep copies of it. A number that means
another method is harmless as long as no gate lets its method through: both halves are asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.target import Target

#: So many of the cases that a method passes are named.
_NAMED = 3


def enum_mismatches(target: Target, cases: Sequence[tuple[ModelSpec, str]]) -> list[str]:
    """A line for each method that passes all gates of a case and is read as another method.

    Args:
        target: Asked for its numbers, and for the gates of every case.
        cases: Models with a scheme each; those that the target cannot answer for are passed over.

    Raises:
        Unsupported: The target has no numbers, or a number is misread and no case has an answer.
    """
    flashinfer, lines = target.flashinfer, []
    for method, number in target.method_numbers().items():
        read_as = flashinfer.method(number)
        if read_as in (None, method):
            continue
        passes, unanswered = [], Counter[str]()
        for model, scheme in cases:
            try:
                gates = target.gates(model, scheme, method)
            except Unsupported as reason:
                unanswered[str(reason)] += 1
                continue
            if all(gate.ok for gate in gates):
                passes.append(f"{model}-{scheme}")
        what = f"{target} passes {method} as {number}, which {flashinfer} reads as {read_as}"
        if passes:
            more = len(passes) - _NAMED
            named = ", ".join(passes[:_NAMED]) + (f" and {more} more" if more > 0 else "")
            lines.append(f"{what}; no gate stops it for {named}")
        elif unanswered.total() == len(cases):
            raise Unsupported(f"{what}; no gate answers: {unanswered.most_common(1)[0][0]}")
    return lines
