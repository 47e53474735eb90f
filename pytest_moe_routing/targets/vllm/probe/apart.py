"""What the code of vLLM's models sees where vLLM's dependencies are not installed.

The MoE blocks of models are vLLM's own; what lies around them (linear layers, groups of processes,
configs) are stand-ins, so that a block is built and run on a CPU as on one of the Blackwell family.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.vllm.probe.world import World


class Config:
    """A model's config object: what is not in it, it does not have."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"vLLM's code reads {name!r} of the model's config")


class Apart(World):
    """vLLM's models apart from its dependencies: nothing is parallel, and no option is set.

    Args:
        root: The directory or wheel file that holds vLLM.
        modules: Those with the MoE blocks of models, which run for real.
    """

    def __init__(self, names: Names, root: str, modules: Iterable[str]) -> None:
        self.names, self._root = names, root
        stubs.extend(real=[*modules])
        stubs.extend(absent=["transformers", "triton"])
        values = {**_stand_ins(), "get_current_vllm_config": lambda: self.vllm_config}
        stubs.stand_in(values)
        if names.is_there("ep-group"):
            # Other questions put two ranks there.
            spelling = names.spelling("ep-group")
            setattr(import_module(spelling.module), spelling.path, values[spelling.path])

    @cached_property
    def vllm_config(self) -> Any:
        sizes = ("tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size")
        placement = stubs.known("eplb_config", num_redundant_experts=0)
        parallel = stubs.known("parallel_config", eplb_config=placement, **dict.fromkeys(sizes, 1))
        return stubs.known("vllm_config", quant_config=None, parallel_config=parallel)

    def current(self, vllm_config: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def module(self, name: str) -> ModuleType:
        if not stubs.module_exists(self._root, name):
            raise Unsupported(f"this release has no {name}")
        return stubs.real_module(name)

    def config(self, kind: str | None, values: Mapping[str, Any]) -> Any:
        return Config(values)

    def linear_layers(self, block: type) -> AbstractContextManager[Any]:
        module = sys.modules[block.__module__]
        if hasattr(module, "GateLinear"):
            return patch.object(module, "GateLinear", Linear)
        return nullcontext()


def _stand_ins() -> dict[str, Any]:
    """Return what replaces vLLM's own, by bare name: such things move between releases."""
    group = stubs.known(
        "group",
        device_group=stubs.known("device_group", size=lambda: 1, rank=lambda: 0),
        world_size=1,
        rank_in_group=0,
        rank=0,
    )
    linear = ("Replicated", "ColumnParallel", "MergedColumnParallel", "RowParallel")
    groups = ("ep", "tp", "dp", "pcp", "pp")
    sizes = ("tensor_model_parallel", "data_parallel", "expert_parallel", "pipeline_parallel")
    same: Callable[..., Any] = lambda x, *_, **__: x  # noqa: E731
    return {
        # A model's code may insist on its own class.
        "Step3p5Config": Config,
        "PreTrainedConfig": Config,
        "LinearBase": Linear,
        **{f"{name}Linear": Linear for name in linear},
        **{f"get_{name}_group": lambda: group for name in groups},
        **{f"get_{name}_world_size": lambda: 1 for name in sizes},
        **{f"get_{name}_rank": lambda: 0 for name in sizes},
        "tensor_model_parallel_all_reduce": same,
        "tensor_model_parallel_all_gather": same,
        "SiluAndMul": _GatedActivation,
        "SiluAndMulWithClamp": _GatedActivation,
        "SwigluStepAndMul": _GatedActivation,
        "SituAndMul": _GatedActivation,
        "GeluAndMul": _GatedActivation,
        "ReLUSquaredActivation": _Activation,
        "RMSNorm": _Activation,
        "extract_layer_index": lambda prefix: int(prefix.split(".")[2]),
        "fast_topk": torch.topk,
        "str_dtype_to_torch_dtype": lambda name: getattr(torch, name),
        "get_quark_ocp_mx_group_size": lambda *_: None,
        "maybe_execute_in_parallel": lambda first, second, *_: (first(), second()),
        "get_act_fn": lambda *_, **__: _Activation(),
        "init_logger": lambda *_: stubs.Stub("logger"),
        "cdiv": lambda x, to: -(-x // to),
        "support_torch_compile": lambda f=None, **_: f or (lambda decorated: decorated),
    }


class Linear(nn.Module):
    """A linear layer or a gate: zeros of the right shape, in the dtype that was asked for."""

    def __init__(
        self,
        input_size: int,
        output_size: int = 0,
        bias: bool = False,
        *_: Any,
        output_sizes: Any = None,
        params_dtype: torch.dtype | None = None,
        out_dtype: torch.dtype | None = None,
        force_fp32_compute: bool = False,
        return_bias: bool = True,
        **__: Any,
    ) -> None:
        super().__init__()
        sizes = output_sizes or output_size
        size = sizes if isinstance(sizes, int) else sum(sizes)
        dtype = params_dtype or torch.get_default_dtype()
        self.weight = nn.Parameter(torch.zeros(size, input_size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype)) if bias else None
        self.quant_method = stubs.Stub("quant_method")
        self.input_size, self.output_size = input_size, size
        self.params_dtype, self.out_dtype = dtype, out_dtype
        self.return_bias = return_bias

    def set_out_dtype(self, dtype: torch.dtype) -> None:
        """Give logits in this dtype from now on, unless one was asked for."""
        self.out_dtype = self.out_dtype or dtype

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        output = functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        output = output if self.out_dtype is None else output.to(self.out_dtype)
        return (output, None) if self.return_bias else output


class _Activation(nn.Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


class _GatedActivation(_Activation):
    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x[..., : x.shape[-1] // 2]
