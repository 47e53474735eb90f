"""Runs vLLM's experts on a layer of a model, down to the kernel, and says what arrived there.

Everything between the layer and the kernel is vLLM's own: the layer's quantization method, the
fused kernel object, the experts. Only the activations' quantization, a GPU's business, is ours. The
layer has the model's experts, top-k, groups and factors, and small widths.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pytest_moe_routing.errors import TargetError, Unsupported
from pytest_moe_routing.targets.recorder import DoesNotBind, Reached, plain
from pytest_moe_routing.targets.stubs import Stub
from pytest_moe_routing.targets.vllm.probe import release as release
from pytest_moe_routing.targets.vllm.probe.config import moe_config, quant_config, told_dtype
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES, ServedScheme
from pytest_moe_routing.targets.vllm.probe.gates import experts_of
from pytest_moe_routing.targets.vllm.probe.release import names

TOKENS, HIDDEN, INTERMEDIATE = 8, 512, 256
#: What vLLM's own code raises when it will not go on.
_REFUSALS = (AssertionError, DoesNotBind, ImportError, KeyError, NotImplementedError, ValueError)


def capture(
    model: Mapping[str, Any], scheme: str, method: str, thorough: bool = True
) -> dict[str, Any]:
    """Record what reaches the kernel through each of the layer's methods, alone and as rank 1 of 2.

    Each of the `calls` is `by` whom, in how many `shards`, and either the `function` and its
    `arguments` or the exception that is `raised`. `router_factor` is the scaling factor that the
    layer's router has, `intermediate_size` that of its experts.

    Args:
        thorough: Take every way to the kernel, and not only the first one.

    Raises:
        Unsupported: The release has no such experts, or none that a layer calls.
    """
    names().require("verdicts", scheme)
    row = SCHEMES[scheme]
    experts = experts_of(row)
    methods = methods_of(row.methods)
    if not methods:
        raise Unsupported(f"no layer of this release calls {experts.__name__}")
    shards = counts_of_ranks(model)
    if not thorough:
        methods, shards = methods[:1], shards[:1]
    calls = [
        {
            "by": caller.__qualname__.split(".")[0],
            "shards": count,
            **_one(experts, caller, Layer(model, row, method, count, isinstance(experts, type))),
        }
        for caller in methods
        for count in shards
    ]
    return {
        "calls": calls,
        "router_factor": release.router_factor(model),
        "intermediate_size": intermediate_size(model),
    }


def counts_of_ranks(model: Mapping[str, Any]) -> list[int]:
    """Alone, and as one of two ranks where the experts can be shared out."""
    return [1, 2] if model["router"]["num_experts"] % 2 == 0 else [1]


def intermediate_size(model: Mapping[str, Any]) -> int:
    """Other than the hidden size, where it is in the model: code may take one for the other."""
    experts = model["experts"]
    hidden = experts["latent_size"] or experts["hidden_size"]
    return HIDDEN if experts["intermediate_size"] == hidden else INTERMEDIATE


def methods_of(keys: Iterable[str]) -> list[Any]:
    """Return the methods of layers that call experts, as functions."""
    found = []
    for key in keys:
        for member in names().contract.members(key):
            if names().has(member.key):
                found.append(names().get(member.key))
                break
    return found


class Layer:
    """The attributes of vLLM's layer that its methods read; there are no others."""

    def __init__(
        self,
        model: Mapping[str, Any],
        row: ServedScheme,
        method: str,
        shards: int,
        is_class: bool,
        *,
        dispatched: bool = False,
    ) -> None:
        router = model["router"]
        experts = router["num_experts"]
        sizes = HIDDEN, intermediate_size(model)
        self.config = moe_config(model, method, shards, sizes, dispatched=dispatched)
        self.row = row
        self.model = model
        self.logits = torch.linspace(-3.3, 3.1, TOKENS * experts).reshape(TOKENS, experts)
        dtype = getattr(torch, model["dtype"])
        self.logits = self.logits.to(told_dtype(model) or dtype)
        made = release.make_router(model)
        bias = None
        if router["correction_bias"] is not None:
            # Most values have no bfloat16 of their own.
            bias = torch.linspace(0.101, 0.907, experts)
            bias = bias.to(getattr(torch, router["correction_bias"]))
        if names().has("router.prepare_monolithic_bias"):
            bias = made.prepare_monolithic_bias(bias)
        self.e_score_correction_bias = bias
        self.activation = self.config.activation
        self.global_num_experts = experts
        self.local_num_experts = self.config.num_local_experts
        self.ep_rank = shards - 1
        self.top_k = router["top_k"]
        stated = release.router_arguments(model)
        self.num_expert_group, self.topk_group = stated["num_expert_group"], stated["topk_group"]
        self.routed_scaling_factor = release.router_factor(model)
        self.routing_method_type = self.config.routing_method
        self.apply_router_weight_on_input = router["weight_on"] == "input"
        self.intermediate_size_per_partition = intermediate_size(model)
        self.enable_eplb, self.eplb_state = False, None
        self.routing_sink: Any = None
        self.hash_indices_table = None
        self.expert_map = None
        if shards > 1:
            self.expert_map = torch.full((experts,), -1, dtype=torch.int32)
            local = self.local_num_experts
            self.expert_map[local:] = torch.arange(local, dtype=torch.int32)
        # One value serves as every scale: nobody reads them.
        each = torch.ones(self.local_num_experts)
        for name in ("w13", "w2"):
            setattr(self, f"{name}_weight_scale_inv", each)
            setattr(self, f"{name}_weight_scale", each.to(torch.float8_e4m3fn))
            setattr(self, f"{name}_input_scale", each)
        self._make_tensors(model["experts"]["gated"])
        if not is_class:
            self._before_classes(model)

    def _before_classes(self, model: Mapping[str, Any]) -> None:
        """Provide what the layer's methods read and quantize themselves, without experts."""
        self.hidden = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
        self.renormalize = model["router"]["renormalize"]
        self.custom_routing_function = release.routing_function_of(model)
        each = torch.ones(self.local_num_experts)
        for name in ("scalar", "gate_scalar"):
            setattr(self, f"output1_scales_{name}", each)
        self.output2_scales_scalar = each
        self.g1_scale_c = self.g1_alphas = self.g2_alphas = self.a1_gscale = each

    def _make_tensors(self, gated: bool) -> None:
        """Activations as the scheme has them, and weights that nobody reads."""
        name, a_byte, a_scale, scale_dtype = self.row.quantized
        dtype = getattr(torch, name)
        local, inner = self.local_num_experts, self.intermediate_size_per_partition
        rows = inner * (2 if gated else 1)
        weight_dtype = torch.uint8 if self.row.packed else dtype
        per = 2 if self.row.packed else 1
        self.w13_weight = torch.empty(local, rows, HIDDEN // per, dtype=weight_dtype)
        self.w2_weight = torch.empty(local, HIDDEN, inner // per, dtype=weight_dtype)
        self.w13_weight_packed, self.w2_weight_packed = self.w13_weight, self.w2_weight
        self.hidden = torch.zeros(TOKENS, HIDDEN // a_byte, dtype=dtype)
        self.scale = None
        if a_scale:
            shape = (TOKENS, HIDDEN // a_scale)
            self.scale = torch.zeros(shape, dtype=getattr(torch, scale_dtype))

    def named(self) -> dict[str, Tensor | None]:
        """Return the tensors that a kernel may be given, by the names that answers use."""
        return {"router logits": self.logits, "bias": self.e_score_correction_bias}


def _one(experts: Any, method: Any, layer: Layer) -> dict[str, Any]:
    """Run a layer's method down to the kernel."""
    return recorded(lambda: run_layer(experts, method, layer), layer.named(), method.__qualname__)


def run_layer(experts: Any, method: Any, layer: Layer) -> None:
    """Run a layer's method that calls monolithic experts."""
    kernel = None
    if isinstance(experts, type):
        kernel = _kernel(made(experts, layer), layer)
    method(Caller(kernel, layer.row), layer, layer.hidden, layer.logits)


def made(experts: Any, layer: Layer) -> Any:
    """Return a layer's experts, of a class of vLLM."""
    return experts(layer.config, quant_config(layer.row, layer.local_num_experts, layer.model))


def recorded(
    call: Callable[[], None], named: Mapping[str, Tensor | None], what: str
) -> dict[str, Any]:
    """Return the kernel's `function` and `arguments`, or what vLLM's code `raised`."""
    Stub.asked.clear()
    try:
        with on_one_gpu():
            call()
    except AttributeError as error:
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
        return {"function": reached.function, "arguments": arguments, "at": _place(reached)}
    except _REFUSALS as error:
        if Stub.asked:
            raise TargetError(f"{refusal(error)}, after stubs: {', '.join(Stub.asked)}") from error
        return {"raised": _raised(error)}
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


class Caller:
    """What the layer's method is a method of: whatever the method asks of itself."""

    def __init__(self, kernel: Any, row: ServedScheme, *, is_monolithic: bool = True) -> None:
        self.moe_kernel = kernel
        self.is_monolithic = is_monolithic
        block = row.quantization[2]
        self.block_quant = block is not None
        self.weight_block_size = list(block) if block else None

    @property
    def unquantized_backend(self) -> Any:
        return names().get("chosen-unquantized")

    @property
    def fp8_backend(self) -> Any:
        return names().get("chosen-fp8")

    @property
    def mxfp8_backend(self) -> Any:
        return names().get("chosen-fp8")

    @property
    def nvfp4_backend(self) -> Any:
        return names().get("chosen-nvfp4")


class _Prepared:
    """Stands for the step before the experts: its activations are quantized already."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def prepare(
        self, hidden: Tensor, router_logits: Tensor, *_: Any, defer_input_quant: bool, **__: Any
    ) -> Any:
        if defer_input_quant:
            return torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16), None, router_logits
        return self._layer.hidden, self._layer.scale, router_logits

    def finalize(self, fused_expert_output: Tensor) -> Tensor:
        return fused_expert_output


def _kernel(experts: Any, layer: Layer) -> Any:
    """Return the kernel object around the experts."""
    kernel = object.__new__(names().get("kernel"))
    kernel.impl = names().get("kernel-impl")(_Prepared(layer), experts)
    return kernel


def vllm_path(file: str) -> str:
    """Return the path of a file of vLLM from the package on."""
    return f"vllm/{file.rpartition('/vllm/')[2]}"


def _raised(error: BaseException) -> dict[str, str]:
    """Describe an exception: `type`, `message`, and the line of vLLM that raised it."""
    message = " ".join(str(error).split())[:300]
    if not message:
        lines = traceback.extract_tb(error.__traceback__)
        message = next((f"{frame.line}" for frame in reversed(lines) if _is_of_vllm(frame[0])), "")
    return {"type": type(error).__name__, "message": message, "where": _place(error)}


def _frames(error: BaseException) -> list[tuple[str, int]]:
    """Return file and line of the frames of vLLM's code that an exception came through."""
    walked = traceback.walk_tb(error.__traceback__)
    frames = ((frame.f_code.co_filename, line) for frame, line in walked)
    return [(file, line) for file, line in frames if _is_of_vllm(file)]


def _is_of_vllm(file: str) -> bool:
    # This package has a folder of the same name.
    return "/vllm/" in file and "/pytest_moe_routing/" not in file


def _place(error: BaseException) -> str:
    """Return the last line of vLLM's code that an exception came through, as `vllm/FILE:LINE`."""
    frames = _frames(error)
    if not frames:
        return ""
    if isinstance(error, Reached):
        # Wrappers around FlashInfer's functions make every call.
        frames = [place for place in frames if "/vllm/utils/" not in place[0]] or frames
    file, line = frames[-1]
    return f"{vllm_path(file)}:{line}"


def refusal(error: BaseException) -> str:
    """Return an exception in one line, with the line of vLLM that raised it."""
    raised = _raised(error)
    return f"{raised['where']}: {raised['type']}: {raised['message']}"
