"""What the code of vLLM's models sees where vLLM's dependencies are not installed.

The MoE blocks of models are vLLM's own; what lies around them (linear layers, groups of processes,
configs) are stand-ins, so that a block is built and run on a CPU as on one of the Blackwell family.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import config_classes, layers, stubs
from pytest_moe_routing.targets.config_classes import ConfigClasses
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.vllm.probe.world import World


class Config(layers.Config):
    """The config object of a model of vLLM."""

    reads = "vLLM's code reads {!r} of the model's config"


class Apart(World):
    """vLLM's models apart from its dependencies: nothing is parallel, and no option is set.

    Args:
        root: The directory or wheel file that holds vLLM.
        modules: Those with the MoE blocks of models, which run for real.
        absent: Packages that are stubs, installed or not.
    """

    def __init__(
        self,
        names: Names,
        root: str,
        modules: Iterable[str],
        absent: Iterable[str] = ("huggingface_hub", "transformers", "triton"),
    ) -> None:
        self.names, self.root = names, root
        stubs.extend(real=[*modules], absent=absent)
        self._classes = ConfigClasses(names, "vllm.transformers_utils.configs", "code-configs")
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
        if not stubs.module_exists(self.root, name):
            raise Unsupported(f"this release has no {name}")
        return stubs.real_module(name)

    def config(
        self,
        kind: str | None,
        nested: Sequence[str],
        values: Mapping[str, Any],
        stated: Mapping[str, Any],
        computed: Mapping[str, Any],
    ) -> tuple[Any, str]:
        made = self._classes.make(stated, *nested)
        if made is None and kind is not None:
            # The config of a text model may be read by a class that its whole config has not.
            made = self._classes.make(stated, kind)
        return made or (_object({**values, **computed}), "")

    def linear_layers(self, block: type) -> AbstractContextManager[Any]:
        module = sys.modules[block.__module__]
        if hasattr(module, "GateLinear"):
            return patch.object(module, "GateLinear", Linear)
        return nullcontext()


def _object(value: Any) -> Any:
    """Return a config object of a mapping, whose own mappings are objects as well."""
    if isinstance(value, Mapping):
        return Config({key: _object(each) for key, each in value.items()})
    return [_object(each) for each in value] if isinstance(value, list) else value


def _first_attribute(value: Any, names: Iterable[str], default: Any = None, *_: Any) -> Any:
    """Return the first of several attributes that an object has."""
    return next((getattr(value, name) for name in names if hasattr(value, name)), default)


def _stand_ins() -> dict[str, Any]:
    """Return what replaces vLLM's own, by bare name: such things move between releases."""
    group = stubs.known(
        "group",
        device_group=stubs.known("device_group", size=lambda: 1, rank=lambda: 0),
        world_size=1,
        rank_in_group=0,
        rank=0,
    )
    groups = ("ep", "tp", "dp", "pcp", "pp")
    sizes = ("tensor_model_parallel", "data_parallel", "expert_parallel", "pipeline_parallel")
    same: Callable[..., Any] = lambda x, *_, **__: x  # noqa: E731
    return {
        # A model's code may insist on its own class.
        "Step3p5Config": Config,
        **config_classes.stand_ins(),
        "LinearBase": Linear,
        **{f"{name}Linear": SplitLinear for name in layers.KINDS_OF_LINEAR},
        "ReplicatedLinear": Linear,
        **{f"get_{name}_group": lambda: group for name in groups},
        **{f"get_{name}_world_size": lambda: 1 for name in sizes},
        **{f"get_{name}_rank": lambda: 0 for name in sizes},
        "tensor_model_parallel_all_reduce": same,
        "tensor_model_parallel_all_gather": same,
        "SiluAndMul": layers.GatedActivation,
        "SiluAndMulWithClamp": layers.GatedActivation,
        "SwigluStepAndMul": layers.GatedActivation,
        "SituAndMul": layers.GatedActivation,
        "GeluAndMul": layers.GatedActivation,
        "ReLUSquaredActivation": layers.Activation,
        "RMSNorm": layers.Activation,
        "extract_layer_index": lambda prefix: int(prefix.split(".")[2]),
        "fast_topk": torch.topk,
        "str_dtype_to_torch_dtype": lambda name: getattr(torch, name),
        "get_quark_ocp_mx_group_size": lambda *_: None,
        "maybe_execute_in_parallel": lambda first, second, *_: (first(), second()),
        "get_act_and_mul_fn": lambda *_, **__: layers.GatedActivation(),
        "get_act_fn": lambda *_, **__: layers.Activation(),
        "getattr_iter": _first_attribute,
        "init_logger": lambda *_: stubs.Stub("logger"),
        "cdiv": lambda x, to: -(-x // to),
        "support_torch_compile": lambda f=None, **_: f or (lambda decorated: decorated),
    }


class Linear(layers.ZeroLinear):
    """A linear layer or a gate of vLLM, which may be asked for a dtype of its output."""

    def __init__(
        self,
        input_size: int,
        output_size: int = 0,
        bias: bool = False,
        *_: Any,
        out_dtype: torch.dtype | None = None,
        return_bias: bool = True,
        **more: Any,
    ) -> None:
        super().__init__(input_size, output_size, **more)
        self.params_dtype, self.out_dtype = self.weight.dtype, out_dtype
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.output_size, dtype=self.params_dtype))
        self.return_bias = return_bias

    def set_out_dtype(self, dtype: torch.dtype) -> None:
        """Give logits in this dtype from now on, unless one was asked for."""
        self.out_dtype = self.out_dtype or dtype

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        dtype = self.out_dtype or self.weight.dtype
        # A gate's kernels give what they sum up in, and do not round it first.
        bias = None if self.bias is None else self.bias.to(dtype)
        output = nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)
        return (output, None) if self.return_bias else output


class SplitLinear(Linear):
    """A linear layer whose weight is split over ranks, unless it is told otherwise."""

    def __init__(self, *args: Any, disable_tp: bool = False, **more: Any) -> None:
        super().__init__(*args, **more)
        self.is_split = not disable_tp
