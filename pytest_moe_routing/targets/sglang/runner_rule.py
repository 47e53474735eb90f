"""Which function of SGLang's decides that a server takes another runner than a scheme's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pytest_moe_routing.oracle.choice import Rule
from pytest_moe_routing.targets.answers import RuleAnswer

#: Runs experts that route in TRT-LLM's kernels on Blackwell, and in CUTLASS's on Hopper.
_MXFP4 = "flashinfer_mxfp4"


def placed_by(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheme's quantization, see `configs.yaml`, and its runners by kind of experts."""
    first = "mxfp4" if row["runner"] == _MXFP4 else "monolithic"
    on_blackwell = (way["runner"] for way in row.get("others", ()) if "device" not in way)
    cutlass = next(on_blackwell, None)
    kinds = {
        first: row["runner"],
        "modular": row.get("routed"),
        "cutlass": cutlass,
        **row.get("placed", {}),
    }
    runners = {
        kind: runner
        for kind, runner in kinds.items()
        if runner is not None and (kind == first or runner != row["runner"])
    }
    return {"quantization": row["quantization"], "runners": runners}


def deciding(asked: Sequence[RuleAnswer], elsewhere: Iterable[RuleAnswer]) -> Rule:
    """Return the function that names a runner, or that could have named one.

    Of several that name none, it is the first that names one for the same model in another scheme;
    without such a function, the rule names them all.

    Args:
        asked: The functions that may name a runner, in order; `instead` is the runner, if any.
        elsewhere: Those that were asked about the model in other schemes.
    """
    named = [answer for answer in asked if answer["instead"]]
    if named:
        return Rule(**named[-1])
    if not asked:
        return Rule()
    able = {answer["name"] for answer in elsewhere if answer["instead"]} if len(asked) > 1 else ()
    one = next((answer for answer in asked if answer["name"] in able), None)
    if one is not None:
        return Rule(**one)
    name = " or ".join(answer["name"] for answer in asked)
    return Rule(name, asked[0]["source"])
