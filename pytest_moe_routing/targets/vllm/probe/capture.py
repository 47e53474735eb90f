"""Runs vLLM's experts on a layer of a model, down to the kernel, and says what arrived there.

Everything between the layer and the kernel is vLLM's own: the layer's quantization method, the
fused kernel object, the experts; and from 0.30 on the layer itself, which vLLM's factory makes and
vLLM's runner runs. Only the quantization of activations, a GPU's business, is ours. The layer has
the model's experts, top-k, groups and factors, and small widths.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import islice
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pytest_moe_routing.errors import TargetError, Unsupported
from pytest_moe_routing.targets.limits import DoesNotBind, is_missing
from pytest_moe_routing.targets.recorder import Reached, plain
from pytest_moe_routing.targets.stubs import Stub
from pytest_moe_routing.targets.unwritten import is_unwritten, raised_in
from pytest_moe_routing.targets.vllm.probe import release as release
from pytest_moe_routing.targets.vllm.probe.config import parallel_config
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES
from pytest_moe_routing.targets.vllm.probe.gates import experts_of
from pytest_moe_routing.targets.vllm.probe.layer import Layer, layer_of
from pytest_moe_routing.targets.vllm.probe.method import Caller, methods_of
from pytest_moe_routing.targets.vllm.probe.ranks import Ranks, shared_out_to
from pytest_moe_routing.targets.vllm.probe.release import names

#: What vLLM's own code raises when it will not go on.
_REFUSALS = (
    *(AssertionError, ImportError, KeyError, NotImplementedError, ValueError),
    DoesNotBind,
)


#: Tokens of further calls, as in decoding and in a prefill: code often branches on their number.
_TOKENS = (1, 1025)


def capture(
    model: Mapping[str, Any], scheme: str, method: str, thorough: bool = True
) -> dict[str, Any]:
    """Record what reaches the kernel through each of the layer's methods, alone and as the last one
    of several ranks.

    Where the experts take that, it is also recorded as rank 1 of 2 whose tokens are gathered first,
    through the first method whose kernel gathers: methods hand over the same, and do not gather.

    Each of the `calls` is `by` whom, in how many `shards`, whether tokens were `dispatched`, with
    how many `tokens` if it is one more call for that, the `intermediate_size` of the experts, and
    either the `function` and its `arguments` or the exception that is `raised`; and what came of
    the kernel's output, see `layer.Layer.run`.

    Args:
        thorough: Take every way to the kernel, and not only the first one.

    Raises:
        Unsupported: The release has no such experts, or none that a layer calls.
    """
    names().require("verdicts", scheme)
    row = SCHEMES[scheme]
    experts = experts_of(row)
    methods = methods_of(row.methods, model)
    if not methods:
        raise Unsupported(f"no layer of this release calls {experts.__name__}")
    shards = counts_of_ranks(model)
    if not thorough:
        methods, shards = methods[:1], shards[:1]
    is_class = isinstance(experts, type)

    def layer_on(ranks: Ranks) -> Layer:
        return layer_of(model, row, method, ranks, is_class=is_class)

    def called(caller: Any, ranks: Ranks) -> dict[str, Any]:
        # One for each call, as one that fails on the way leaves things behind.
        layer = layer_on(ranks)
        by = caller.__qualname__.split(".")[0]
        where = {"by": by, "shards": ranks.count, "dispatched": ranks.dispatched}
        where["intermediate_size"] = layer.sizes[1]
        record = run_layer(experts, caller, layer)
        if "function" in record and not record.get("misread"):
            record["misread"] = misplaced(layer.asked.expert_map, record["arguments"])
        return where | record

    ways = [(caller, Ranks(count)) for caller in methods for count in shards]
    calls = [called(*way) for way in ways]
    if is_class and thorough and len(shards) > 1 and _takes_gathered(experts):
        ranks = Ranks(2, dispatched=True)
        # One that does not get as far alone raises the same again.
        reaching = [way[0] for way, call in zip(ways, calls, strict=True) if "function" in call]
        gathering = (m for m in reaching if _gathers(experts, m, layer_on(ranks)))
        calls += [called(caller, ranks) for caller in islice(gathering, 1)]
    if thorough:
        for tokens in _TOKENS:
            calls.append({**called(methods[0], Ranks(tokens=tokens)), "tokens": tokens})
    return {"calls": calls}


def misplaced(placed: Tensor | None, arguments: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the range of experts that a kernel is given; see `misread`.

    Args:
        placed: The place of each expert on the layer's rank, -1 for those of other ranks; None if
            it has all of them.
        arguments: Those of the kernel.
    """
    if placed is None:
        return []
    first, local = arguments["local_expert_offset"], arguments["local_num_experts"]
    here = torch.nonzero(placed >= 0).flatten().tolist()
    if here == [*range(first, first + local)]:
        return []
    few = ", ".join(map(str, here[:3]))
    got = f"{first}, for experts {first} to {first + local - 1}"
    return ["local_expert_offset", f"experts {few} and so on, up to {here[-1]}", got]


def _takes_gathered(experts: Any) -> bool:
    """Return whether experts run on tokens that are gathered from ranks with their own."""
    config = parallel_config(2, dispatched=True)
    takes: bool = experts._supports_parallel_config(config)
    return takes


def _gathers(experts: Any, method: Any, layer: Layer) -> bool:
    """Return whether a method has vLLM's kernel; what gathers for another one is not run."""
    with on_one_gpu():
        return layer.made(experts, method) is not None


def counts_of_ranks(model: Mapping[str, Any]) -> list[int]:
    """Alone, and as the last of several ranks where the experts can be shared out."""
    return sorted({1, shared_out_to(model["router"]["num_experts"])})


def run_layer(
    experts: Any, method: Any, layer: Layer, write: Callable[..., None] | None = None
) -> dict[str, Any]:
    """Run a layer's method that calls monolithic experts, and say what reached the kernel.

    Args:
        write: See `Layer.run`.
    """
    call = partial(layer.run, experts, method, write)
    return recorded(call, layer.named(), method.__qualname__)


def recorded(
    call: Callable[[], None], named: Mapping[str, Tensor | None], what: str
) -> dict[str, Any]:
    """Return the kernel's `function` and `arguments`, or what vLLM's code `raised`.

    Raises:
        Unsupported: vLLM's code was run in a way that vLLM would not run it.
    """
    Stub.asked.clear()
    # As they are before vLLM's code may change them in place.
    named = {name: None if value is None else value.clone() for name, value in named.items()}
    try:
        with on_one_gpu():
            call()
    except AttributeError as error:
        if is_missing(error):
            return {"raised": raised(error)}
        # What vLLM reads of the probe's own objects and does not find there.
        if not isinstance(error.obj, (Layer, Caller)):
            raise
        raise Unsupported(
            f"not judged: vLLM {names().version} reads {error.name!r} of its "
            f"{'layer' if isinstance(error.obj, Layer) else 'quantization method'}, "
            f"which the probe does not have ({refusal(error)})"
        ) from error
    except Reached as reached:
        arguments = {name: plain(value, named) for name, value in reached.arguments.items()}
        called = {"function": reached.function, "arguments": arguments, "at": _place(reached)}
        return called | dict(reached.output)
    except _REFUSALS as error:
        if Stub.asked and not is_missing(error):
            raise TargetError(f"{refusal(error)}, after stubs: {', '.join(Stub.asked)}") from error
        if is_unwritten(error, release.is_of_vllm):
            raise Unsupported(
                f"not judged: {what} called code that is not implemented ({refusal(error)})"
            ) from error
        return {"raised": raised(error)}
    raise TargetError(f"{what} called no kernel")


@contextmanager
def on_one_gpu() -> Iterator[None]:
    """Provide what vLLM's experts and selectors need from their surroundings."""
    compilation = SimpleNamespace(max_cudagraph_capture_size=512)
    model = SimpleNamespace(quantization_config=None, hf_text_config=None)
    vllm_config = SimpleNamespace(compilation_config=compilation, model_config=model)
    config = names().spelling("vllm-config")
    with (
        patch.object(torch.accelerator, "current_device_index", lambda: "cpu"),
        patch.object(import_module(config.module), config.path, lambda: vllm_config),
    ):
        yield


def raised(error: BaseException) -> dict[str, str]:
    """Describe an exception: `type`, `message`, the line of vLLM that raised it, and the code."""
    message = " ".join(str(error).split())[:300]
    if not message:
        stack = traceback.extract_tb(error.__traceback__)
        message = next((f"{f.line}" for f in reversed(stack) if release.is_of_vllm(f[0])), "")
    told = {"type": type(error).__name__, "message": message, "where": _place(error)}
    return told | {"code": raised_in(error, release.is_of_vllm)}


def _place(error: BaseException) -> str:
    """Return the last line of vLLM's code that an exception came through, as `vllm/FILE:LINE`."""
    places = release.lines(traceback.walk_tb(error.__traceback__))
    if isinstance(error, Reached):
        return error.at or release.line_of_kernel(places)
    return f"{release.vllm_path(places[-1][0])}:{places[-1][1]}" if places else ""


def refusal(error: BaseException) -> str:
    """Return an exception in one line, with the line of vLLM that raised it."""
    said = raised(error)
    return ": ".join(filter(None, (said["where"], said["type"], said["message"])))
