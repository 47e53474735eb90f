"""What is wrong with a call that is given a router's choice, of another kernel than TRT-LLM's.

What the arguments mean is in `flashinfer/given.yaml`; records are as in `oracle.arguments`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isclose
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.flashinfer.given import GivenExperts, given_experts, refused_on
from pytest_moe_routing.flashinfer.signatures import enum
from pytest_moe_routing.models import ExpertsConfig, ModelSpec
from pytest_moe_routing.oracle.calls import CUTLASS_ACTIVATIONS, PARAMETERS, wrong_activation
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.scales import Scales, wrong_factor, wrong_input
from pytest_moe_routing.schemes import kernel_of

#: What SwigluStep clamps to where it is given no limit: SwigluStepAdaptor in FlashInfer's
#: csrc/fused_moe/cutlass_backend/cutlass_fused_moe_kernels.cuh, 0.6.13 to 0.7.2.post1.
_LIMIT_OF_STEP = 7.0
#: What a kernel is told of a layer whose ranks cannot share out its experts evenly.
_UNEVEN = Finding(
    Kind.ARGUMENT,
    "first expert of the rank",
    "ranks that have one more than others",
    "if all ranks had as many",
)


def read_given(
    model: ModelSpec, record: Mapping[str, Any], flashinfer: FlashInfer
) -> Iterator[Finding]:
    """Yield what is wrong with a recorded call.

    Args:
        record: A call with its `function` and `arguments`, the number of `shards` of which the
            layer is the last, or of `parts` of experts (1 if left out) of which it has the second,
            what it is `stored` as (see `given.yaml`), the `roles` of tensors by argument, whether
            the layer `has_biases`, and what of the activation is
            `unprepared`, if anything: its values are not the target's own; and the `scales` of
            whole tensors that its experts have, if any are known, as in `RecordedLayer`, with the
            `input_scale` that a quantizer was given, if one was called.

    Raises:
        Unsupported: The meaning of the entry point's arguments is not known.
    """
    entry = given_experts(record["function"])
    if entry is None or record["stored"] not in entry.scales:
        raise Unsupported(
            f"not judged: the arguments of {record['function']} for {record['stored']} are not "
            "known"
        )
    arguments = record["arguments"]
    shards, parts = record["shards"], record.get("parts", 1)
    layer = {"ep_size": shards, "ep_rank": shards - 1, "tp_size": parts, "tp_rank": int(parts > 1)}
    experts = model.router.num_experts
    local = experts // shards
    layer |= {"experts": experts, "top_k": model.router.top_k}
    # The ranks before the last one may have one expert more.
    layer |= {"local_experts": local, "first_expert": experts - local}
    yield from _wrong_numbers(entry, arguments, layer, local)
    yield from _wrong_modes(entry, record["stored"], arguments)
    yield from _wrong_choice(entry, arguments)
    if not {"applied", "unusable"} & record.keys():
        yield from _wrong_weights(entry, model, arguments[entry.weights])
    known = () if record.get("unprepared") else entry.parameters.items()
    yield from _wrong_activation(entry, model.experts, arguments, dict(known), flashinfer)
    if known:
        yield from _wrong_situ(entry, model.experts, arguments)
    yield from _wrong_scales(entry, record)
    if given := record.get("scales"):
        yield from wrong_input(record["stored"], record, given)
    for name in sorted({*entry.unset, *(flag for flags in entry.flags.values() for flag in flags)}):
        wanted = name in entry.flags.get(record["stored"], ())
        if arguments.get(name, wanted) is not wanted:
            yield Finding(Kind.ARGUMENT, name, wanted, arguments[name])
    output, buffer = arguments.get("output_dtype"), arguments.get(entry.output)
    dtype = model.dtype if buffer is None else buffer["dtype"]
    if output != dtype:
        yield Finding(Kind.ARGUMENT, "output_dtype", dtype, str(output))


def refusal(function: str | None, scheme: str, device: str) -> Finding | None:
    """Return that FlashInfer does not run a kernel on a GPU; None if it does.

    The arguments are those of `flashinfer.given.refused_on`.
    """
    runs_on = refused_on(function, scheme, device)
    if runs_on is None:
        return None
    kernel = function or "TRT-LLM's kernels"
    fact = f"FlashInfer runs {kernel} for {scheme} on compute capability {runs_on}, not on {device}"
    return Finding(Kind.LIMIT, "compute capability", fact=fact)


def not_for(function: str | None, stored: str) -> Finding | None:
    """Return that a kernel has no code for a scheme; None if it has.

    Args:
        function: An entry point; None for one of several that have none.
        stored: The scheme.
    """
    entry, row = given_experts(function or ""), kernel_of(stored)
    own = (row.function(), row.function(routed=True))
    if function in own or (entry is not None and stored in entry.scales):
        return None
    kernel = function or "no kernel of FlashInfer's that they call"
    does = "does not serve" if function else "serves"
    return Finding(Kind.LIMIT, "scheme", fact=f"{kernel} {does} {stored}")


def _wrong_numbers(
    entry: GivenExperts, arguments: Mapping[str, Any], layer: Mapping[str, int], local: int
) -> Iterator[Finding]:
    for name, value in entry.numbers.items():
        wanted, got = value, arguments[name]
        if value == "columns":
            wanted = arguments[entry.matrices["fc2"]]["shape"][1]
        elif isinstance(value, str):
            wanted = layer[value]
        if got is None and name in entry.absent:
            got = layer[entry.absent[name]]
        if name == entry.offset and got == layer["ep_rank"] * local != wanted:
            yield _UNEVEN
        elif got != wanted:
            yield Finding(Kind.ARGUMENT, name, wanted, got if isinstance(got, int) else str(got))
    rows = arguments[entry.experts]["shape"][0]
    if rows != local:
        yield Finding(Kind.ARGUMENT, entry.experts, f"{local} experts", f"{rows} experts")
    elif entry.rank and not entry.offset and layer["ep_rank"] * local != layer["first_expert"]:
        yield _UNEVEN


def _wrong_modes(
    entry: GivenExperts, stored: str, arguments: Mapping[str, Any]
) -> Iterator[Finding]:
    for name, modes in entry.modes.items():
        # Releases without the argument have one mode.
        if arguments.get(name, modes[stored]) != modes[stored]:
            yield Finding(Kind.ARGUMENT, name, modes[stored], str(arguments[name]))


def _wrong_choice(entry: GivenExperts, arguments: Mapping[str, Any]) -> Iterator[Finding]:
    ids = arguments[entry.ids]
    if ids is None or ids.get("is") != "ids":
        yield Finding(Kind.ARGUMENT, entry.ids, "the layer's ids", "other values")
    for name, dtypes in ((entry.ids, entry.id_dtypes), (entry.weights, entry.weight_dtypes)):
        value = arguments[name]
        if value is not None and value["dtype"] not in dtypes:
            yield Finding(Kind.ARGUMENT, name, " or ".join(dtypes), value["dtype"])
    for name in (entry.ids, entry.weights, entry.hidden, entry.experts):
        value = arguments[name]
        if value is not None and not value["contiguous"]:
            yield Finding(Kind.ARGUMENT, name, "contiguous", "not contiguous")


def _wrong_weights(entry: GivenExperts, model: ModelSpec, weights: Any) -> Iterator[Finding]:
    """Weights where no marked tokens show how often they are applied."""
    is_router = weights is not None and weights.get("is") == "weights"
    if model.router.weight_on == "input" and is_router:
        wanted = "ones: the expert input has the weights"
        yield Finding(Kind.ARGUMENT, entry.weights, wanted, "the router's weights")
    elif model.router.weight_on == "output" and not is_router:
        yield Finding(Kind.ARGUMENT, entry.weights, "the router's weights", "other values")


def _wrong_activation(
    entry: GivenExperts,
    experts: ExpertsConfig,
    arguments: Mapping[str, Any],
    parameters: Mapping[str, str],
    flashinfer: FlashInfer,
) -> Iterator[Finding]:
    kernels = entry.activations or CUTLASS_ACTIVATIONS
    activation, kind = experts.activation, _kind_of(entry, arguments, flashinfer)
    if activation not in kernels:
        raise Unsupported(f"not judged: how {entry.function} is told {activation} is not known")
    names = tuple(kernels[activation])
    wrong = [*wrong_activation(entry.activation, kind, activation, kernels, flashinfer)]
    yield from (finding for finding in wrong if finding.kind is not Kind.PRECISION)
    checked: Iterable[tuple[str, str]] = parameters.items()
    if activation == "situ":
        # Of SiTU, the kernels read nothing else.
        checked = ()
    elif names != ("Swiglu",):
        # Of others, those that clamp after the activation have a limit, if they are what is called.
        is_step = names == ("SwigluStep",) and not wrong
        checked = [pair for pair in checked if is_step and pair[0] == "gemm1_clamp_limit"]
    for name, argument in checked:
        field, neutral = PARAMETERS[name]
        stated, value = getattr(experts, field), arguments.get(argument)
        wanted = neutral if stated is None else float(stated)
        neutral = neutral if names == ("Swiglu",) else _LIMIT_OF_STEP
        # A vector has one value for each expert.
        number = value.get("all") if isinstance(value, Mapping) else value
        number = neutral if value is None else number
        if number is None or not isclose(number, wanted, rel_tol=1e-6):
            arrived = "values that differ" if number is None else number
            yield Finding(Kind.ARGUMENT, argument, wanted, arrived)


def _kind_of(entry: GivenExperts, arguments: Mapping[str, Any], flashinfer: FlashInfer) -> Any:
    """Return the number of the activation that a kernel computes; else the name that has none."""
    if entry.activation in arguments:
        return arguments[entry.activation]
    # Releases before it take a word, or compute the first of them.
    word = arguments.get(entry.word, next(iter(entry.words), ""))
    name = entry.words.get(word, word)
    return enum("ActivationType", flashinfer.release).get(name, name)


def _wrong_situ(
    entry: GivenExperts, experts: ExpertsConfig, arguments: Mapping[str, Any]
) -> Iterator[Finding]:
    """Yield betas of SiTU that are not the model's: with the first, a kernel computes SiTU."""
    for name, argument in entry.situ.items():
        field, _ = PARAMETERS[name]
        wanted = getattr(experts, field) if experts.activation == "situ" else None
        got = arguments.get(argument)
        if wanted is None or got is None:
            is_same = wanted is got
        else:
            is_same = isclose(got, wanted, rel_tol=1e-6)
        if not is_same:
            stated, arrived = ("none" if each is None else float(each) for each in (wanted, got))
            yield Finding(Kind.ARGUMENT, argument, stated, arrived)


def _wrong_scales(entry: GivenExperts, record: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield scales in the place of others or of another value, and biases that are not the layer's.

    Scales of blocks are compared only where they are tensors of the layer's own.
    """
    roles: Mapping[str, Sequence[str | None]] = record["roles"]
    given: Scales = record.get("scales") or {}
    for name, wanted in entry.scales[record["stored"]].items():
        expected = [wanted] if isinstance(wanted, str) else list(wanted)
        # A tensor that is none of the layer's own has no role.
        got = list(roles.get(name, (None,) if isinstance(wanted, str) else ()))
        if len(got) != len(expected):
            yield Finding(Kind.ARGUMENT, name, f"{len(expected)} scales", f"{len(got)} scales")
            continue
        wrong = [(w, g) for w, g in zip(expected, got, strict=True) if g not in (w, None)]
        if wrong:
            yield Finding(Kind.ARGUMENT, name, *(", ".join(side) for side in zip(*wrong)))  # noqa: B905
            continue
        ones = entry.ones.get(record["stored"], ())
        yield from _wrong_ones(entry, record, name, expected)
        value = record["arguments"].get(name)
        values = value if isinstance(value, list) else [value]
        for role, scale in zip(expected, values, strict=False):
            if scale is None and role not in (*entry.factors, *ones):
                yield Finding(Kind.ARGUMENT, name, role, "none")
            elif role in entry.factors and role not in ones and given:
                yield from wrong_factor(name, scale, role, entry.factors[role], given)
    if record["has_biases"] and not entry.biases:
        fact = f"{entry.function} takes no biases of experts"
        yield Finding(Kind.LIMIT, "biases", fact=fact)
    for name, wanted in entry.biases.items() if record["has_biases"] else ():
        (bias,) = roles.get(name) or ["none"]
        if bias != wanted:
            yield Finding(Kind.ARGUMENT, name, f"its {wanted}", str(bias or "another tensor"))


def _wrong_ones(
    entry: GivenExperts, record: Mapping[str, Any], name: str, scales: Sequence[str]
) -> Iterator[Finding]:
    """Yield scales that are not 1 where the kernel needs none."""
    arguments = record["arguments"]
    local = arguments[entry.experts]["shape"][0]
    for at, scale in enumerate(scales):
        if scale in entry.ones.get(record["stored"], ()):
            value = arguments[name][at]
            if value is None:
                yield Finding(Kind.ARGUMENT, f"{name}[{at}]", f"1 for {local} experts", "none")
                continue
            number, shape = value.get("all"), value["shape"]
            if number != 1.0 or shape not in ([], [local]):
                got = "values that differ" if number is None else f"{number:g} of shape {shape}"
                yield Finding(Kind.ARGUMENT, f"{name}[{at}]", f"1 for {local} experts", got)
