"""The call that a model's block ends in, as SGLang's child process records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.arguments import differing, read
from pytest_moe_routing.oracle.finding import (
    NOT_LOADED,
    Finding,
    Kind,
    number_of_tokens,
    only_with,
)
from pytest_moe_routing.oracle.target import Captured
from pytest_moe_routing.targets.sglang.handed_over import layer_of, raised

#: Tokens of further calls, as in decoding and in a prefill: code often branches on their number.
TOKENS = (1, 1025)


def captured_of(
    answer: Mapping[str, Any],
    model: ModelSpec,
    scheme: str,
    flashinfer: FlashInfer,
    numbers: Mapping[str, int],
) -> Captured:
    """Return the call that the child recorded.

    Args:
        numbers: SGLang's numbers of the routing methods.
    """
    if answer["failed"]:
        return Captured(None, (raised(answer),))
    layer = layer_of(answer["shared"], answer["scale_after"])
    captured = read(model, scheme, answer, layer, flashinfer)
    number = answer["arguments"]["routing_method_type"]
    open_ = [f.field for f in captured.findings if f.field in answer["unprepared"]]
    findings = [f for f in captured.findings if f.field not in open_]
    when = "prepared when weights are loaded, by code that does not run on a CPU"
    unknown = f"{', '.join(open_)}: {when}" if open_ else ""
    own = next((name for name, value in numbers.items() if value == number), None)
    if captured.call is not None and own not in (None, captured.call.method):
        findings.append(Finding(Kind.ENUM, own or "", number, captured.call.method))
    if not answer["bias_is_loaded"]:
        findings.append(NOT_LOADED)
    arriving = None if captured.call is None else captured.call.logits_dtype
    if (answer["logits_dtype"], arriving) == ("bfloat16", "float32"):
        findings.append(Finding(Kind.DOWNCAST, "gate", "float32", "bfloat16"))
    return Captured(captured.call, tuple(findings), answer["function"], unknown, answer["at"])


def with_tokens(
    captured: Captured, others: Mapping[int, Captured], refused: Mapping[int, str] | None = None
) -> Captured:
    """Return a call with what is wrong only with other numbers of tokens.

    Args:
        others: The calls with these numbers.
        refused: Why the kernel does not route that many, which leaves a call unknown.
    """
    call, findings, unknown = captured.call, captured.findings, [captured.unknown]
    unknown += [f"{number_of_tokens(n)}: {why}" for n, why in (refused or {}).items()]
    for tokens, other in others.items():
        more = [*other.findings]
        if call is not None and other.call is not None:
            more += differing(call, other.call)
        findings += tuple(only_with(tokens, more, captured.findings))
    if any(other.call is None for other in others.values()):
        call = None
    return replace(captured, call=call, findings=findings, unknown="; ".join(filter(None, unknown)))
