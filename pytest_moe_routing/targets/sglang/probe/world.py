"""The world that SGLang's routing code sees: a GPU, the TRT-LLM runner, two ranks.

SGLang's models, MoE layers, quantization methods and runners are its own; what lies around them
(its runtime, its linear layers, GPU libraries, FlashInfer) are stand-ins, so that a model's MoE
block is built and run on a CPU, up to the call of FlashInfer's entry point.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pytest_moe_routing.flashinfer import FlashInfer, preparation
from pytest_moe_routing.flashinfer.given import given_experts
from pytest_moe_routing.targets import layers, recorder, stubs
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe import captured, compressed, device
from pytest_moe_routing.targets.sglang.probe.calls import Call
from pytest_moe_routing.targets.sglang.probe.options import Groups, Options
from pytest_moe_routing.targets.sglang.probe.quantizers import quantizers
from pytest_moe_routing.targets.sglang.probe.ranks import RANKS
from pytest_moe_routing.targets.sglang.probe.requests import (
    CALLERS,
    COMPILED,
    DEVICE,
    EXPERTS,
    OWN,
    by_request,
    requested,
)

#: The runner that is named on the command line of a server, by its name there.
TRTLLM = "flashinfer_trtllm"
_chosen = [TRTLLM]
#: Options of a server that others may be requested for.
_DEFAULTS = {"flashinfer_mxfp4_moe_precision": "default"}


def packed(ids: Tensor, weights: Tensor) -> Tensor:
    """Return ids and weights in one int32 each, as SGLang's `PackTopkIds.vanilla` packs them."""
    bits = weights.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    return (ids.to(torch.int32) << 16) | bits


def choose_runner(runner: str) -> None:
    """Have SGLang told from now on that this runner was chosen."""
    _chosen[0] = runner


class RoutedOutside(Exception):
    """SGLang chooses the experts itself; no fused kernel routes.

    Attributes:
        told: Names of what SGLang's own router is told besides hidden states and logits.
    """

    def __init__(self, told: frozenset[str]) -> None:
        super().__init__()
        self.told = told


def select_experts(*_: Any, **options: Any) -> Any:
    """Replace SGLang's own router, which is not run, by one that is requested."""
    if (router := requested("router")) is not None:
        return router(**options)
    raise RoutedOutside(frozenset(name for name, given in options.items() if given is not None))


def enter(
    names: Names,
    root: str,
    flashinfer: FlashInfer,
    calls: list[Call],
    defaults: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """From now on import SGLang from `root`, in this world; entry points append to `calls`.

    Args:
        defaults: Returns the defaults of a server's options.

    Raises:
        Unsupported: The release does not have what tells it that the TRT-LLM runner is chosen.
    """
    # torch's compiler would look for a GPU's, and the operators of sgl_kernel are not here.
    torch.compile = lambda f=None, *_, **__: f or (lambda g: g)  # type: ignore[assignment]
    torch.library.register_fake = lambda *_, **__: lambda f: f
    mm = torch.mm

    def mm_on_a_cpu(a: Tensor, b: Tensor, out_dtype: Any = None, **options: Any) -> Tensor:
        return mm(a, b, **options) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype))

    torch.mm = mm_on_a_cpu  # type: ignore[assignment]
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_capability = lambda *_: (10, 0)
    captured.enter()
    # A torch built for CUDA has CUDA's streams, which nothing runs in without a GPU.
    torch.get_device_module = lambda *_: torch.cpu  # type: ignore[assignment]
    for level in ("info", "warning"):
        # SGLang's server adds these.
        setattr(logging.Logger, f"{level}_once", getattr(logging.Logger, level))
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    stubs.install(names.contract, root, stand_ins(names, defaults))

    def answer(function: str, arguments: Mapping[str, Any]) -> Any:
        """Return a kernel's output: ones, in the shape of the function's result."""
        calls.append(Call.of(function, arguments))
        if (note := requested(CALLERS)) is not None:
            note(function)
        replay = arguments.get("routing_replay_out")
        if replay is not None:
            replay.copy_(torch.arange(replay.numel()).reshape(replay.shape))
        entry, output = given_experts(function), arguments.get("output")
        states = arguments[entry.hidden if entry else "hidden_states"]
        if output is None:
            width = states.shape[1] * (2 if states.dtype == torch.uint8 else 1)
            output = torch.empty(len(states), width, dtype=torch.bfloat16)
        output.fill_(1)
        if arguments.get("do_finalize") is False:
            return captured.unsummed(output, arguments)
        return recorder.returned(function, {}, output)

    recorder.install(flashinfer, answer)
    _choose_runner(names)


def stand_ins(names: Names, defaults: Callable[[], Mapping[str, Any]] = dict) -> dict[str, Any]:
    """Return replacements of SGLang's own functions, and of GPU libraries', by bare name.

    By bare name, as such things are imported from different modules in different releases.
    """
    replaced = {
        **_utilities(),
        **_parallel(),
        **_options(names, defaults),
        **_modules(),
        **quantizers(),
        **compressed.stand_ins(),
        **captured.stand_ins(),
    }
    # By SGLang's own code or as its kernels take them only where that is what is asked.
    exact = {**preparation.FUNCTIONS, **dict.fromkeys(OWN)}
    # Experts that are loaded lie in order.
    exact["get_global_expert_location_metadata"] = lambda *_: None
    return replaced | {name: by_request(name, replaced.get(name), f) for name, f in exact.items()}


class _Server(Options):
    """The options of a server to which nothing was said but the runner, and what is requested."""

    def __getattr__(self, name: str) -> Any:
        super().__getattr__(name)
        if name == "disable_shared_experts_fusion":
            return RANKS.apart
        return _DEFAULTS.get(name) if requested(name) is None else requested(name)

    @property
    def moe_runner_backend(self) -> str:
        return _chosen[0]


def _utilities() -> dict[str, Any]:
    return {
        "attn_dp_enabled_of": lambda config: config.attn_dp_size > 1,
        "add_prefix": lambda name, prefix: f"{prefix}.{name}" if prefix else name,
        "PackTopkIds": stubs.known("pack", execute=packed),
        "copy_or_rebind_param": _keep,
        "ceil_div": lambda x, to: -(-x // to),
        "get_bool_env_var": lambda _, default="false": default.lower() in ("1", "true"),
        "get_quantization_config": lambda c: (c.quantization_config or {}).get("quant_method"),
        "has_fp8_weights_in_checkpoint": lambda *_: False,
        "get_device_capability": lambda *_: _capability(),
        "get_device_sm": lambda *_: _sm(),
        # Of models, which are none of a runner's.
        "model_supports_deepep_v2": lambda _: True,
        "get_platform": _platform,
        "is_blackwell_supported": lambda *_: _capability() >= (10, 0),
        "is_cuda": lambda: True,
        "is_cuda_alike": lambda: True,
        "is_flashinfer_available": lambda: True,
        "is_layer_skipped": lambda *_, **__: False,
        "is_sm90_supported": lambda *_: _capability()[0] == 9,
        "is_sm100_supported": lambda *_: _capability()[0] == 10,
        "is_sm120_supported": lambda *_: _capability()[0] == 12,
        "next_power_of_2": lambda n: 1 << max(n - 1, 0).bit_length(),
        "round_up": lambda x, to: -(-x // to) * to,
        "set_weight_attrs": _set_attributes,
        "narrow_padded_param_and_loaded_weight": _narrowed,
        "use_symmetric_memory": lambda *_, **__: nullcontext(),
    }


def _capability() -> tuple[int, int]:
    """Return the compute capability of the GPU: one of the Blackwell family, or a requested one."""
    found: tuple[int, int] = requested(DEVICE) or device.capability()
    return found


def _sm() -> int:
    major, minor = _capability()
    return 10 * major + minor


def _platform() -> Any:
    major, _ = _capability()
    facts = {f"is_sm{family}": major == family // 10 for family in (90, 100, 110, 120)}
    facts |= {"is_cuda": True, "is_blackwell": major >= 10}
    return stubs.known("platform", device_sm=_sm(), device_capability=_capability(), **facts)


def _keep(module: nn.Module, name: str, value: Tensor) -> None:
    """Keep a value that a layer is prepared with, not as a parameter: those are zeroed."""
    module._parameters.pop(name, None)
    setattr(module, name, value)


def _set_attributes(weight: Tensor, attributes: Mapping[str, Any] | None) -> None:
    for name, value in (attributes or {}).items():
        setattr(weight, name, value)


def _narrowed(
    parameter: Tensor,
    loaded: Tensor,
    parameter_start: int,
    start: int,
    dim: int,
    size: int,
    narrows: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the part of a parameter that is loaded, and its source; zero what it does not fill."""
    part = parameter.narrow(dim, parameter_start, size)
    size = max(0, min(size, loaded.shape[dim] - start))
    part.narrow(dim, size, part.shape[dim] - size).zero_()
    loaded = loaded.narrow(dim, min(start, loaded.shape[dim]), size) if narrows else loaded
    return parameter.narrow(dim, parameter_start, size), loaded


def _parallel() -> dict[str, Any]:
    """Two ranks of expert parallelism, or one; or ranks that split experts, see `RANKS`."""
    sizes = {
        "moe_dp_size": 1,
        "dp_size": 1,
        "num_dp_ranks": 1,
        "attn_tp_size": 1,
        "attn_tp_rank": 0,
        "dwdp_size": 1,
        "pp_size": 1,
        "shared_experts_tp_size": None,
        "enable_shared_experts_attn_tp": False,
    }
    functions: dict[str, Callable[[], int]] = {
        "moe_expert_parallel_world_size": lambda: RANKS.count,
        "moe_expert_parallel_rank": lambda: RANKS.count - 1,
        "moe_tensor_parallel_world_size": lambda: RANKS.parts,
        "moe_tensor_parallel_rank": lambda: RANKS.part,
        # Those of experts are the only ones.
        "tensor_model_parallel_world_size": lambda: RANKS.count * RANKS.parts,
        "tensor_model_parallel_rank": lambda: RANKS.count - 1 + RANKS.part,
        "moe_data_parallel_world_size": lambda: 1,
        "attention_tp_size": lambda: 1,
        "attention_tp_rank": lambda: 0,
    }
    reductions = ("tensor_model_parallel", "moe_tensor_model_parallel", "moe_expert_parallel")

    def parallel() -> Any:
        return stubs.known(
            "parallel",
            tp_size=functions["tensor_model_parallel_world_size"](),
            tp_rank=functions["tensor_model_parallel_rank"](),
            moe_ep_size=functions["moe_expert_parallel_world_size"](),
            moe_ep_rank=functions["moe_expert_parallel_rank"](),
            moe_tp_size=functions["moe_tensor_parallel_world_size"](),
            moe_tp_rank=functions["moe_tensor_parallel_rank"](),
            **sizes,
        )

    return {
        "get_parallel": parallel,
        **{f"get_{name}": function for name, function in functions.items()},
        **{f"{name}_all_reduce": lambda x, *_, **__: x for name in reductions},
    }


def _options(names: Names, defaults: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Make a server with the runner as its only argument, and what follows from it."""
    options = _Server(ep_num_redundant_experts=0)

    groups = Groups(defaults)
    vars(groups).update(moe=options, features=options)

    def flags() -> Any:
        moe = RANKS.kept.setdefault("flags", Options())
        return stubs.known("flags", moe=moe, disable_shared_experts_fusion=RANKS.apart)

    def model() -> Any:
        shared = names.get("shared-experts")() if RANKS.shared is None else RANKS.shared
        return stubs.known("model", shared_experts=shared)

    return {
        # Experts lie in order unless a placement is requested.
        "ExpertLocationDispatchInfo": stubs.known(
            "placement", init_new=lambda *_, **__: requested("placement")
        ),
        "get_global_experts_capturer": lambda: requested("capturer"),
        "probe_routed_expert_weight_dtype": lambda _: requested(EXPERTS),
        # How many tokens a tuner tries.
        "deployment_attn_dp_size": lambda: 1,
        "get_disagg": lambda: stubs.known("disagg", disaggregation_mode="null"),
        "get_schedule": lambda: stubs.known("schedule", max_prefill_tokens=8192),
        "max_prefill_buffer_tokens": lambda: None,
        # What a wrapper of FlashInfer's kernels has buffers for.
        "cutedsl_moe_max_num_tokens": lambda: 8192,
        "get_exec": lambda: groups,
        "get_flags": flags,
        "get_forward": lambda: stubs.known("forward", moe_output_buffer=None),
        "get_global_server_args": lambda: options,
        "get_model": model,
        "get_server_args": lambda: options,
    }


class _Linear(layers.ZeroLinear):
    """A linear layer of SGLang."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_bias_add, self.reduce_results, self.tp_group = False, False, None
        self.output_size_per_partition = self.output_size
        self.input_size_per_partition = self.input_size

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        # SGLang's casts nothing: hidden states of another dtype are an error.
        return functional.linear(x, self.weight, self.bias), None


class _FusedOp(nn.Module):
    """The base of SGLang's layers that have one implementation per device: CUDA's is run.

    Under torch.compile, as SGLang's own base does it, a layer runs the implementation that it has
    for one token there.
    """

    forward_cuda: Callable[..., Any]
    forward_native: Callable[..., Any]

    def _torch_compile_forward(self, num_tokens: int) -> Callable[..., Any] | None:
        return self.forward_native

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        compiled = self._torch_compile_forward(num_tokens=1) if requested(COMPILED) else None
        return (compiled or self.forward_cuda)(*args, **kwargs)


def _product(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return a gate's product in float32."""
    return functional.linear(x.float(), weight.float())


def _modules() -> dict[str, Any]:
    return {
        "LinearBase": _Linear,
        **{f"{name}Linear": _Linear for name in layers.KINDS_OF_LINEAR},
        "BaseFusedOp": _FusedOp,
        "CustomOp": _FusedOp,
        "MultiPlatformOp": _FusedOp,
        **dict.fromkeys(("SiluAndMul", "GeluAndMul", "SituAndMul"), layers.GatedActivation),
        "ReLU2": layers.Activation,
        "RMSNorm": layers.Activation,
        "silu_and_mul_clamp": lambda _, output, *__: output.zero_(),
        **dict.fromkeys(("linear_bf16_fp32", "router_gemm_bf16x3_cublas", "router_gemv"), _product),
    }


def _choose_runner(names: Names) -> None:
    """SGLang's own MoE package, told that a runner was chosen, and nothing else."""
    runners = names.get("runners")
    communication = names.get("communications.NONE")

    for key, function in (
        ("runner", lambda: runners(_chosen[0])),
        ("communication", lambda: communication),
        ("select-experts", select_experts),
    ):
        spelling = names.spelling(key)
        module = import_module(spelling.module)
        # A package may have imported it from its own module by now.
        for place in (module, import_module(spelling.module.rpartition(".")[0])):
            if spelling.path in vars(place):
                setattr(place, spelling.path, function)
