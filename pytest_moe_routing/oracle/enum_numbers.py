"""Numbers of routing methods that FlashInfer reads as another method, or as none.

FlashInfer's enum has moved between releases, and frameworks keep copies of it. A number that means
something else is harmless as long as no gate accepts its method: both halves are asked. A method of
both enums with two numbers is reported in any case, as no model may have needed it yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.target import Target

#: The name for no method, whose number does not matter.
_NONE = "Unspecified"


@dataclass(frozen=True)
class EnumMismatch:
    """A method whose number means something else, and who passes it.

    Attributes:
        cases: Ids of the cases, `model-scheme`, whose gates all accept the method; none if the
            mismatch is latent.
        classified: Those of them whose model the target classifies as the method, or may: then the
            case says so.
    """

    finding: Finding
    cases: tuple[str, ...]
    classified: tuple[str, ...] = ()


def enum_mismatches(target: Target, cases: Sequence[tuple[ModelSpec, str]]) -> list[EnumMismatch]:
    """Return each method of another number that passes all gates of a case, or is in both enums.

    Args:
        target: Asked for its numbers, and for the gates of every case.
        cases: Models with a scheme each; those that the target cannot answer for are passed over.

    Raises:
        Unsupported: The target has no numbers, or there is a mismatch and no case has an answer.
    """
    flashinfer, found = target.flashinfer, []
    read = {name: flashinfer.method(number) for name, number in target.method_numbers().items()}
    misread = [method for method, read_as in read.items() if read_as != method]
    for scheme in dict.fromkeys(scheme for _, scheme in cases):
        target.prepare_gates([m for m, named in cases if named == scheme], scheme, misread)
    for method in misread:
        number, read_as = target.method_numbers()[method], read[method]
        passes: dict[str, str] = {}
        unanswered = Counter[str]()
        for model, scheme in cases:
            try:
                gates = target.gates(model, scheme, method)
            except Unsupported as reason:
                unanswered[str(reason)] += 1
                continue
            if all(gate.ok for gate in gates):
                passes[f"{model}-{scheme}"] = _classified(target, model, scheme, method)
        finding = Finding(Kind.ENUM, method, number, read_as)
        if passes:
            classified = tuple(filter(None, passes.values()))
            found.append(EnumMismatch(finding, tuple(passes), classified))
        elif cases and unanswered.total() == len(cases):
            raise Unsupported(
                f"no gate answers for {method} ({number}): {unanswered.most_common(1)[0][0]}"
            )
        elif method != _NONE and flashinfer.number(method) is not None:
            found.append(EnumMismatch(finding, ()))
    return found


def _classified(target: Target, model: ModelSpec, scheme: str, method: str) -> str:
    """Return the case if its model is classified as the method, or may be; empty if it is not."""
    try:
        return f"{model}-{scheme}" if target.classify(model).method == method else ""
    except Unsupported:
        return f"{model}-{scheme} (not known)"
