"""Runs a loaded layer whose sizes its method pads, and says what becomes of the padding.

A kernel that is given more columns than the layer has must find zeros there, and what it writes
into those columns must not leave the layer: neither alone, nor next to shared experts, nor between
the projections of a model whose experts have a latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer.given import given_experts
from pytest_moe_routing.targets import marked
from pytest_moe_routing.targets.marked import UnusableArgumentError
from pytest_moe_routing.targets.recorder import Reached, buffer_of, returned
from pytest_moe_routing.targets.vllm.probe import release
from pytest_moe_routing.targets.vllm.probe.capture import raised
from pytest_moe_routing.targets.vllm.probe.loaded import LoadedLayer, exact_quantizers
from pytest_moe_routing.targets.vllm.probe.ranks import TOKENS
from pytest_moe_routing.targets.vllm.probe.release import names

#: How much wider than its experts a model with a latent size is.
_WIDER = 256
#: What a kernel writes into the columns that pad its output: no other value is negative.
_IN_PADDING = -1.0
#: How far two products in bfloat16 may be off.
_TOLERANCE = 2**-6
#: The least scale of some formats, and next to nothing: they have none that is 0.
_NOTHING = 2.0**-100
#: Elements in a byte of hidden states in e2m1.
_PACKED = 2


class _Shared(nn.Module):
    """Shared experts that add nothing, to all columns of their input."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


class _Projection(nn.Module):
    """A linear layer that keeps the first columns of its input, and adds zeros."""

    def __init__(self, columns: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(out, columns), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


def unlike_unpadded(layer: LoadedLayer) -> list[dict[str, Any]]:
    """Return what differs from a layer whose sizes nobody pads, each mistake once.

    Returns:
        The argument, what is right and what is there instead, as `misread`; or the exception that
        was `raised`.
    """
    found: list[dict[str, Any]] = []
    for parts, columns in _surroundings(layer.hidden_size):
        wrong = _run(layer, parts, columns)
        found += [each for each in wrong if each not in found]
    return found


def _surroundings(columns: int) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Yield what may lie around a layer's experts, and how many columns the layer then has."""
    yield {}, columns
    if names().has("layer-parts"):
        whole = columns + _WIDER
        latent = {
            "routed_input_transform": _Projection(whole, columns),
            "routed_output_transform": _Projection(columns, whole),
        }
        shared = {"shared_experts": _Shared()}
        yield shared, columns
        yield {**latent, **shared}, whole
        yield latent, whole


def _run(layer: LoadedLayer, parts: Mapping[str, Any], columns: int) -> list[dict[str, Any]]:
    calls: list[tuple[str, Mapping[str, Any], Tensor]] = []

    def kernel(function: str, arguments: Mapping[str, Any]) -> Any:
        if arguments.get("do_finalize") is False:
            raise Unsupported(
                f"not judged: {function} leaves the sum over the experts to its caller"
            )
        output = _output(function, arguments, layer.hidden_size)
        calls.append((function, arguments, output[:, : layer.hidden_size]))
        return returned(function, arguments, output)

    hidden = torch.zeros(TOKENS, columns, dtype=torch.bfloat16)
    hidden[:, : layer.hidden_size] = marked.hidden_states(TOKENS, layer.hidden_size)
    try:
        with exact_quantizers(), patch.object(release, "answer", kernel):
            got = layer.run_with(parts, hidden)
    except (Unsupported, Reached):
        raise
    except Exception as error:
        # Whatever is raised: the kernel was called before, with the same weights.
        return [{"raised": raised(error)}]
    function, arguments, output = calls[-1]
    wrong = _misread(function, arguments, hidden[:, : layer.hidden_size])
    return [{"misread": each} for each in (wrong, _miscut(got, output, columns)) if each]


def _names(function: str) -> tuple[str, str]:
    """Return the arguments of an entry point with activations and with their scales."""
    entry = given_experts(function)
    return (
        ("hidden_states", "hidden_states_scale") if entry is None else (entry.hidden, entry.scale)
    )


def _columns(function: str, arguments: Mapping[str, Any]) -> int:
    """Return how many columns the activations of a call have."""
    given = arguments[_names(function)[0]]
    return int(given.shape[-1]) * (_PACKED if given.dtype == torch.uint8 else 1)


def _output(function: str, arguments: Mapping[str, Any], columns: int) -> Tensor:
    """Return what a kernel writes: bfloat16, in the buffer's columns if it is given one.

    Args:
        columns: Those that are not padding.
    """
    into = buffer_of(arguments)
    width = _columns(function, arguments) if into is None else into.shape[-1]
    output = torch.full((TOKENS, width), _IN_PADDING, dtype=torch.bfloat16)
    width = min(width, columns)
    output[:, :width] = marked.hidden_states(TOKENS, columns).flip(0)[:, :width]
    return output


def _misread(function: str, arguments: Mapping[str, Any], hidden: Tensor) -> list[str]:
    """Return what is wrong with the activations of a call; nothing if they are right."""
    activations, scales = _names(function)
    given, scale = arguments[activations], arguments.get(scales)
    try:
        if scale is None and given.dtype == torch.float8_e4m3fn:
            read = given.float()  # One scale for all of them, which is 1 here.
        else:
            # Some entry points take scales with one more dimension, of 1.
            flat = scale.flatten() if scale is not None and scale.ndim > given.ndim else scale
            read = marked.activations(given, flat, names=(activations, scales))
    except UnusableArgumentError as error:
        return [error.name, error.wanted, error.got]
    columns = hidden.shape[1]
    if not torch.equal(read[:, :columns], hidden.float()):
        return [activations, "its own values", "other values"]
    if bool((read[:, columns:].abs() > _NOTHING).any()):
        return [activations, "zeros after its columns", "other values after its columns"]
    return []


def _miscut(got: Tensor, output: Tensor, columns: int) -> list[str]:
    """Return what is wrong with a layer's output; nothing if it is the kernel's, but for a factor.

    Args:
        output: What the kernel wrote, without padding.
        columns: Those of the layer.
    """
    if got.shape[-1] != columns:
        return ["output", f"{columns} columns", f"{got.shape[-1]} columns"]
    known = output.float()
    inner = known.shape[1]
    ratio = got[:, :inner].float() / known
    is_same = torch.allclose(ratio, ratio[:1, :1].expand_as(ratio), rtol=_TOLERANCE, atol=0)
    if not is_same or not bool((ratio > 0).all()) or bool(got[:, inner:].any()):
        return ["output", "the kernel's columns", "other columns"]
    return []
