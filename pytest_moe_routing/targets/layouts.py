"""What a child says about the order of a kernel's weights and scales."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NotRequired, Required, TypedDict

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.flashinfer.given import given_experts
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.laid_out import LaidOut
from pytest_moe_routing.oracle.layouts import layout_findings
from pytest_moe_routing.oracle.scales import wrong_factor, wrong_factors, wrong_input
from pytest_moe_routing.oracle.shares import split_findings
from pytest_moe_routing.schemes import kernel_of
from pytest_moe_routing.targets import scales

_NO_KERNEL = "FlashInfer has no kernel for other sizes"


class WrongOrder(TypedDict):
    """A tensor that lies otherwise than its kernel reads it; see `marked_weights.orders`."""

    name: str
    read: dict[str, Any]
    found: dict[str, Any] | None
    told: dict[str, int]


class _Factors(TypedDict, total=False):
    """Where whole tensors have scales: what comes of them, and what a quantizer is given.

    Attributes:
        halves: The scales of gate (`w1`) and up rows (`w3`) of the first experts, if the call has
            two of each expert.
        scales: Those of a kernel that is not TRT-LLM's, by what they are to it.
    """

    factors: dict[str, Any]
    halves: dict[str, list[float]]
    scales: dict[str, Any]
    input_scale: dict[str, Any] | None


class _Raised(TypedDict):
    type: str
    message: str
    where: str
    code: str


class _WrongPadding(TypedDict, total=False):
    misread: list[str]
    raised: _Raised


class LaidOutAnswer(_Factors):
    """The entry point, the code that prepares its weights, and what lies wrongly.

    Attributes:
        padding: What is wrong where sizes are padded: an argument of the kernel, or the output of
            the layer, with what is right and what is there instead; or what was raised.
        run: The lines that make a quantization config, and the one that calls the kernel.
        columns: Those of hidden states, and those that the weights are for.
        unanswered: Why nothing is known of the weights, if so; then there is nothing else.
    """

    function: str
    method: str
    orders: list[WrongOrder]
    columns: NotRequired[list[int]]
    padding: NotRequired[list[_WrongPadding]]
    run: NotRequired[list[str]]
    unanswered: NotRequired[str]


class _Limited(LaidOutAnswer, total=False):
    """An answer about a kernel that may limit sizes."""

    sizes: dict[str, int]
    capability: str


class LaidOutElsewhere(_Limited):
    """The same on a GPU, or for a server, that makes another kernel run.

    Attributes:
        switches: Those without which the call is not made.
        sizes: Those that the kernel limits, by name.
        capability: The compute capability of the GPU, if there are such.
    """

    device: str
    switches: list[str]


class SplitAnswer(TypedDict, total=False):
    """What a rank's kernel is given of split experts, or what was raised before.

    Attributes:
        is_refused: Whether the layer was not made, rather than not prepared or run.
        function, orders, is_torn, rows, inner, told: See `oracle.shares.split_findings`.
    """

    method: Required[str]
    raised: _Raised
    is_refused: bool
    function: str
    orders: list[WrongOrder]
    is_torn: bool
    rows: int
    inner: int
    told: int


def split(answer: SplitAnswer, scheme: str, flashinfer: FlashInfer) -> LaidOut:
    """Read an answer about split experts."""
    if "raised" not in answer:
        findings = tuple(split_findings(flashinfer, scheme, answer))
        return LaidOut(answer["function"], answer["method"], findings)
    finding = _raised(answer["raised"])
    refused = finding if answer["is_refused"] else None
    return LaidOut("", answer["method"], () if refused else (finding,), refused=refused)


def _raised(said: _Raised) -> Finding:
    where = said["where"]
    return Finding(Kind.RAISED, said["type"], None, said["message"], where, "", said["code"])


def _wrong_padding(answer: LaidOutAnswer) -> Iterator[Finding]:
    """Yield what is wrong where sizes are padded."""
    for each in answer.get("padding", []):
        if "raised" in each:
            yield _raised(each["raised"])
        else:
            yield Finding(Kind.ARGUMENT, *each["misread"])


def _beyond_limits(answer: Mapping[str, Any], release: str) -> tuple[Finding, ...]:
    """Return the sizes of a call that the kernel of a FlashInfer release does not take."""
    entry, where = given_experts(answer["function"]), answer["function"]
    sizes = answer.get("sizes", {})
    if entry is None or not sizes:
        return ()
    return tuple(
        Finding(Kind.LIMIT, name, f"%{limit.of}", size, where, limit.reason)
        for name, size in sizes.items()
        for limit in entry.sizes[name]
        if size % limit.of and limit.holds(release, answer["capability"])
    )


def _wrong_columns(columns: Sequence[int], tile: int) -> Iterator[Finding]:
    """Yield that hidden states have other columns than the weights, or no whole tiles of columns.

    Nothing if it is not known how many they have.
    """
    if len({*columns}) > 1:
        given, wanted = (f"{count} columns" for count in columns)
        yield Finding(Kind.ARGUMENT, "hidden_states", wanted, given)
    elif columns and columns[0] % tile:
        yield Finding(Kind.LIMIT, "number of columns", f"%{tile}", columns[0], "", _NO_KERNEL)


def laid_out(
    answer: LaidOutAnswer,
    model: ModelSpec,
    scheme: str,
    switches: Iterable[str] | None,
    device: str = "",
    *,
    release: str = "",
    tile: int = 1,
) -> LaidOut:
    """Read an answer.

    Args:
        switches: Those without which the call is not made; None if that cannot be asked.
        device: The GPU, if it is not the usual one.
        release: That of FlashInfer, if the kernel may limit sizes.
        tile: What columns of hidden states must be a multiple of.
    """
    function, method = answer["function"], answer["method"]
    halves = answer.get("halves", {})
    given = {**scales.GIVEN, **{f"{part}_scale": tuple(each) for part, each in halves.items()}}
    entry, own = given_experts(function), answer.get("scales", {})
    formulas = {} if entry is None else entry.factors
    wrong = (
        *(
            finding
            for role, value in own.items()
            for finding in wrong_factor(role, value, role, formulas[role], given)
        ),
        *_wrong_columns(answer.get("columns", []), tile),
        *wrong_factors(model.experts, kernel_of(scheme), answer.get("factors", {}), given),
        *wrong_input(scheme, answer, given),
    )
    return LaidOut(
        function,
        method,
        (
            *layout_findings(answer["orders"], function),
            *(replace(finding, where=function) for finding in wrong),
            *_wrong_padding(answer),
            *_beyond_limits(answer, release),
        ),
        None if switches is None else tuple(switches),
        device,
        unanswered=answer.get("unanswered", ""),
        run=tuple(answer.get("run", ())),
    )
