"""What entry points that are given a router's choice are told in their arguments: `given.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from packaging.version import Version

from pytest_moe_routing.data import read_data
from pytest_moe_routing.flashinfer.scales import Formula

#: What scales there are for a scheme, by argument: one, or those of a list in its order.
Scales = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class SizeLimit:
    """What a size is a multiple of, on GPUs from the first to the last of some.

    Attributes:
        until: The first release without the limit; None if no known one is.
    """

    of: int
    devices: Sequence[str]
    reason: str
    until: str | None = None

    def holds(self, release: str, device: str) -> bool:
        """Return whether a release has the limit on a compute capability."""
        first, last = map(Version, self.devices)
        is_over = self.until is not None and Version(release) >= Version(self.until)
        return not is_over and first <= Version(device) <= last


@dataclass(frozen=True)
class GivenExperts:
    """The meaning of the arguments of one entry point; see the header of `given.yaml`.

    Attributes:
        ids, weights, hidden, scale, tiled, experts, rank, activation, word, output: Names of
            arguments.
        words: FlashInfer's kinds of activations, by the word for it.
        id_dtypes, weight_dtypes: The dtypes that the kernel accepts, by their names in torch.
        numbers: The value of each integer, or the name of a number of the layer.
        absent: What a number is if its argument is None.
        modes: By argument and scheme, the word that says how numbers are stored.
        activations: By activation of a model, FlashInfer's kinds; empty for those of CUTLASS.
        parameters: Names of arguments, by those of TRT-LLM's entry points.
        situ: The same of SiTU, where an argument of its own says that this is computed.
        biases: What each argument with biases has.
        scales: By scheme; a scheme without an entry is none of the kernel's.
        ones: By scheme, the scales that must be 1.
        factors: What other scales of whole tensors are, by what they are to the kernel.
        matrices: Names of arguments with weights, by product.
        orders: By scheme, how weights and their block scales lie.
        inputs: By scheme, how the scales of hidden states lie, where that is compared.
        flags: By scheme, the arguments that must be true.
        unset: Arguments that must be false.
        devices: By scheme, the first and the last compute capability that the kernel runs on.
        group: How many up and gate rows alternate; 0 if all up rows come first.
        sizes: Limits of sizes, by name.
    """

    function: str
    ids: str
    id_dtypes: Sequence[str]
    weights: str
    weight_dtypes: Sequence[str]
    hidden: str
    scale: str
    experts: str
    activation: str
    scales: Mapping[str, Scales]
    factors: Mapping[str, Formula]
    matrices: Mapping[str, str]
    orders: Mapping[str, Sequence[str]]
    devices: Mapping[str, Sequence[str]]
    tiled: str = ""
    rank: str = ""
    word: str = ""
    words: Mapping[str, str] = field(default_factory=dict)
    output: str = ""
    numbers: Mapping[str, int | str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    modes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    activations: Mapping[str, Sequence[str]] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    situ: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    ones: Mapping[str, Sequence[str]] = field(default_factory=dict)
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unset: Sequence[str] = ()
    group: int = 0
    sizes: Mapping[str, Sequence[SizeLimit]] = field(default_factory=dict)

    @property
    def offset(self) -> str:
        """The argument that is the first expert of a rank; empty if the rank tells which it is."""
        return next((name for name, of in self.numbers.items() if of == "first_expert"), "")


@cache
def _entry_points() -> Mapping[str, GivenExperts]:
    data: Mapping[str, Mapping[str, Any]] = read_data(__package__, "given.yaml")["entry_points"]
    return {name: _read(name, row) for name, row in data.items()}


def _read(function: str, row: Mapping[str, Any]) -> GivenExperts:
    ((ids, id_dtypes),) = row["ids"].items()
    ((weights, weight_dtypes),) = row["weights"].items()
    chosen = {"ids": ids, "weights": weights}
    dtypes = {"id_dtypes": id_dtypes, "weight_dtypes": weight_dtypes}
    made = {
        "factors": {role: Formula.of(text) for role, text in row["factors"].items()},
        "sizes": {
            name: [SizeLimit(**limit) for limit in limits]
            for name, limits in row.get("sizes", {}).items()
        },
    }
    return GivenExperts(function=function, **{**row, **chosen, **dtypes, **made})


def given_experts(function: str) -> GivenExperts | None:
    """Return the meaning of an entry point's arguments; None if it is not one of these."""
    return _entry_points().get(function)


def refused_on(function: str | None, scheme: str, device: str) -> str | None:
    """Return the compute capabilities that a kernel runs on, as text; None if `device` is one.

    Args:
        function: One of these entry points; None for those of TRT-LLM.
        scheme: That of the weights, or a way to store it that the entry point knows.
    """
    if function is None:
        limits = [read_data(__package__, "given.yaml")["trtllm_devices"]]
    else:
        entry = _entry_points()[function]
        stored = [name for name in entry.scales if name == scheme or name.startswith(f"{scheme}_")]
        limits = [entry.devices.get(name, ("0", "99")) for name in stored]
    if any(Version(first) <= Version(device) <= Version(last) for first, last in limits):
        return None
    return " or ".join(
        first if first == last else f"{first} to {last.partition('.')[0]}.x"
        for first, last in limits
    )
