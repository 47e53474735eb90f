"""A layer that vLLM's own code makes, loads and prepares, for a checkpoint of marked weights.

Unlike `factory.Made`, whose quantization method is given the probe's tensors, the method is vLLM's
own from beginning to end. Only what quantizes on a GPU and what FlashInfer computes is ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import cache, partial
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import marked, marked_weights, scales, stubs
from pytest_moe_routing.targets.marked_checkpoint import MarkedCheckpoint
from pytest_moe_routing.targets.recorder import Reached
from pytest_moe_routing.targets.shares import whole_blocks
from pytest_moe_routing.targets.vllm.probe import factory, release
from pytest_moe_routing.targets.vllm.probe.config import layer_arguments, told_dtype
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES
from pytest_moe_routing.targets.vllm.probe.forms import Form, named
from pytest_moe_routing.targets.vllm.probe.layer import ChosenExperts
from pytest_moe_routing.targets.vllm.probe.own_loader import load_split
from pytest_moe_routing.targets.vllm.probe.ranks import Ranks, Surroundings
from pytest_moe_routing.targets.vllm.probe.release import names

#: vLLM's modules of functions that load and prepare weights, by key of the contract.
_TOOLS = (
    *("weight-tools", "weight-parameters", "weight-fp8", "weight-mxfp8", "weight-w8a8"),
    *("weight-wna16", "weight-nvfp4"),
)
#: What a server is asked for, so that gates alone decide.
_BACKENDS = {"mxfp4": "flashinfer_trtllm_afp8"}
_BACKEND = "flashinfer_trtllm"
#: Parameters whose scales of gate and up rows vLLM assumes to be equal: `modelopt.py` and
#: `compressed_tensors_moe_w4a4_nvfp4.py` take those of gate rows, and warn that "accuracy may be
#: affected" if others differ.
_TIED = ("w13_weight_scale_2", "w13_weight_global_scale")
#: In the place of a value that a module does not have.
_NONE = object()
#: Scales of activations that nobody replaced yet.
_EXACT_SCALES = marked.block_scales
#: Formats of scales of activations, by how many elements share one; others are float32.
_FORMATS = {16: torch.float8_e4m3fn, 32: torch.float8_e8m0fnu}


class Quantization(Surroundings):
    """What vLLM's methods read of a checkpoint's quantization config.

    Args:
        scheme: That of the checkpoint.
        method: The class of the layer's method.
        are_whole: The checkpoint has the weights of all experts in one tensor.
    """

    def __init__(self, scheme: str, method: Any, *, are_whole: bool) -> None:
        block = list(SCHEMES[scheme].quantization[2] or ())
        is_square = block == [128, 128]
        super().__init__(
            # Of Fp8Config.
            is_checkpoint_fp8_serialized=True,
            activation_scheme="dynamic" if is_square else "static",
            weight_block_size=block if is_square else None,
            # Of ModelOpt's.
            is_checkpoint_nvfp4_serialized=True,
            is_checkpoint_mxfp8_serialized=True,
            quant_method=scheme.upper(),
            group_size=16,
            moe_activation_override=None,
        )
        self._method, self._are_whole = method, are_whole
        strategy = "block" if is_square else "group" if block else "tensor"
        self._weights = SimpleNamespace(
            strategy=strategy,
            block_structure=block or None,
            dynamic=False,
            symmetric=True,
            num_bits=4,
            group_size=block[1] if block else None,
            actorder=None,
        )
        self._activations = SimpleNamespace(
            strategy="group" if block else "tensor", dynamic=bool(block)
        )

    def get_name(self) -> str:
        return "gpt_oss_mxfp4" if self._are_whole else "other"

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Make the layer's method with what it asks for."""
        return self._method(
            **release.accepted(
                self._method,
                {
                    "quant_config": self,
                    "layer": layer,
                    "moe": layer.moe_config,
                    "moe_config": layer.moe_config,
                    "weight_quant": self._weights,
                    "input_quant": self._activations,
                    "layer_name": prefix,
                },
            )
        )


@contextmanager
def surroundings() -> Iterator[None]:
    """Have vLLM's code find its own tools for weights, and what quantizes exactly."""
    fp8 = names().spelling("quantizers.scaled_fp8_quant")
    with ExitStack() as stack:
        stack.enter_context(_replaced(_tools(len(sys.modules))))
        stack.enter_context(patch.object(import_module(fp8.module), fp8.path, _to_fp8))
        for member in names().contract.members("weight-ranks"):
            ranks = names().spelling(member.key)
            value = factory.stand_ins()[ranks.path]
            stack.enter_context(patch.object(import_module(ranks.module), ranks.path, value))
        stack.enter_context(patch.object(marked, "block_scales", _block_scales))
        # Some tools reject tensors that are not on a GPU, and need none.
        stack.enter_context(patch.object(torch.Tensor, "is_cuda", True))
        stack.enter_context(patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self))
        yield


@contextmanager
def _replaced(values: Iterable[tuple[ModuleType, str, Any]]) -> Iterator[None]:
    """Have modules other values meanwhile: `patch` takes 30 times as long."""
    before = [(vars(module), name, vars(module).get(name, _NONE)) for module, name, _ in values]
    for module, name, value in values:
        vars(module)[name] = value
    try:
        yield
    finally:
        for module, name, value in reversed(before):
            if value is _NONE:
                del module[name]
            else:
                module[name] = value


@contextmanager
def exact_quantizers() -> Iterator[None]:
    """Have activations quantized so that marked ones keep their values, inside `surroundings`."""
    fp8 = names().spelling("quantizers.scaled_fp8_quant")
    unscaled = patch.object(import_module(fp8.module), fp8.path, _unscaled_fp8)
    with unscaled, patch.object(marked, "block_scales", _EXACT_SCALES):
        yield


def _unscaled_fp8(
    x: Tensor, scale: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor | None]:
    return x.to(torch.float8_e4m3fn), scale


def _to_fp8(
    x: Tensor, scale: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor | None]:
    scales.note(scale)
    quotient = x.float() if scale is None else x.float() / scale
    return quotient.to(torch.float8_e4m3fn), scale


def _block_scales(x: Tensor, width: int) -> Tensor:
    """Return scales of activations that are known by their place, float32."""
    kind = _FORMATS.get(width)
    dtype = torch.float32 if kind is None else torch.uint8
    made = marked_weights.activation_scales(len(x), x.shape[1] // width, dtype, is_tiled=False)
    return made if kind is None else made.view(kind).float()


@cache
def _tools(_modules: int) -> list[tuple[ModuleType, str, Any]]:
    """Return the stubs of vLLM's tools: module, name, and what vLLM has under that name.

    Cached, but looked for again when modules were imported.
    """
    found: list[tuple[ModuleType, str, Any]] = []
    for key in filter(names().has, _TOOLS):
        name = names().spelling(key).module
        own = vars(_own(name))
        importing = [m for n, m in list(sys.modules.items()) if n.startswith("vllm.")]
        for module in (*importing, *_apart()):
            names_in = [n for n, value in vars(module).items() if isinstance(value, stubs.Stub)]
            for each in names_in:
                if vars(module)[each].__name__ == f"{name}.{each}" and each in own:
                    found.append((module, each, own[each]))
        # Functions import others when they are called.
        stub = import_module(name)
        there = vars(stub)
        found += [
            (stub, each, value)
            for each, value in own.items()
            if not each.startswith("__") and each not in there
        ]
    return found


def _apart() -> list[ModuleType]:
    return [_own(names().spelling(key).module) for key in _TOOLS if names().has(key)]


# A release does not change.
@cache
def _own(name: str) -> ModuleType:
    """Import a module of which everybody else has a stub."""
    module = stubs.run_apart(name)
    known = vars(module)
    known.update({each: v for each, v in factory.stand_ins().items() if each in known})
    return module


def is_whole(model: Mapping[str, Any], scheme: str) -> bool:
    """Return whether a checkpoint has the weights of all experts in one tensor."""
    return bool(model["architecture"].startswith("GptOss")) and scheme == "mxfp4"


class LoadedLayer:
    """A layer with a few experts, with the weights and scales of a checkpoint.

    Args:
        model: The model, with a few experts.
        method: The class of the layer's quantization method.
        sizes: The hidden and the intermediate size of its checkpoint.
        ranks: Where it runs.
        backend: What `--moe-backend` says; None for what takes TRT-LLM's experts.
        form: What the tensors of its checkpoint hold.

    Attributes:
        checkpoint: What it is loaded from.

    Raises:
        Unsupported: vLLM's code makes no such layer here, or has parameters that are not known.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        scheme: str,
        method: Any,
        sizes: tuple[int, int],
        ranks: Ranks,
        *,
        backend: str | None = None,
        form: Form = Form.MATRIX,
    ) -> None:
        factory.enter()
        self.checkpoint, self._ranks, self._form = MarkedCheckpoint(), ranks, form
        self._model, self._is_gated, self._sizes = model, model["experts"]["gated"], sizes
        self._are_whole, self._wholes = is_whole(model, scheme), dict[str, Tensor]()
        experts = model["router"]["num_experts"]
        bias = None
        if model["router"]["correction_bias"] is not None:
            bias = torch.zeros(experts, dtype=getattr(torch, model["router"]["correction_bias"]))
        arguments = {**layer_arguments(model, sizes, bias), **form.arguments}
        self._arguments, self._backend = arguments, backend or _BACKENDS.get(scheme, _BACKEND)
        self._quantization = Quantization(scheme, method, are_whole=self._are_whole)
        self._config, self._runner = self._made({})
        self._experts = self._runner.routed_experts
        self.method = self._experts.quant_method
        if not hasattr(self.method, "forward"):
            # vLLM's base class of operators for several devices is a stub.
            self.method.forward = getattr(self.method, "forward_cuda", None)

    @property
    def hidden_size(self) -> int:
        """That of the checkpoint."""
        return self._sizes[0]

    def _made(self, parts: Mapping[str, Any]) -> tuple[Surroundings, Any]:
        """Make a layer with some parts around its experts: the server's config, and the runner."""
        config = self._ranks.config(self._arguments["params_dtype"])
        config.kernel_config.moe_backend = self._backend
        making = self._ranks, config, self._quantization
        return config, factory.make_layer(self._arguments, *making, parts=parts)

    def load(self) -> None:
        """Load and prepare the weights."""
        with factory.around(self._ranks, self._config):
            parameters = [*self._experts.named_parameters()]
            for name, parameter in parameters:
                self._load(name, parameter)
            if self._wholes:
                load_split(self._wholes, parameters, self._sizes[1], self._ranks)
            self.method.process_weights_after_loading(self._experts)

    def call(self) -> Reached:
        """Return the call of the kernel when the layer is run.

        Raises:
            Unsupported: It calls none.
        """
        hidden = torch.zeros(
            marked_weights.TOKENS, self._sizes[0], dtype=getattr(torch, self._model["dtype"])
        )
        scales.quantized_by.clear()
        try:
            self._run(self._config, self._runner, hidden)
        except Reached as reached:
            return reached
        raise Unsupported("the layer calls no kernel")

    def run_with(self, parts: Mapping[str, Any], hidden: Tensor) -> Tensor:
        """Return the output of a layer that has the same experts, with other parts around them.

        Args:
            parts: Arguments of the factory; without any, the layer itself is run.
        """
        config, runner = self._config, self._runner
        if parts:
            config, runner = self._made(parts)
            runner.routed_experts, runner.moe_config = self._experts, self._runner.moe_config
        return self._run(config, runner, hidden)

    def _run(self, config: Surroundings, runner: Any, hidden: Tensor) -> Tensor:
        router, tokens = self._model["router"], len(hidden)
        dtype = told_dtype(self._model) or getattr(torch, self._model["dtype"])
        logits = torch.zeros(tokens, router["num_experts"], dtype=dtype)
        if not self.method.is_monolithic:
            ids = torch.zeros(tokens, router["top_k"], dtype=torch.int32)
            runner.router = ChosenExperts(torch.ones_like(ids, dtype=torch.float32), ids)
        with factory.around(self._ranks, config):
            output: Tensor = runner.forward(hidden, logits)
        return output

    def _load(self, name: str, parameter: Any) -> None:
        data = parameter.data
        if "weight_shape" in name:
            data.fill_(1)
            return
        is_factor = "scale" in name and data.ndim < 3
        if not is_factor and data.ndim < 3 and "bias" not in name:
            raise Unsupported(f"not judged: the probe does not know the parameter {name}")
        parts = ("w1", "w3") if name.startswith("w13") and self._is_gated else ("w1",)
        parts = parts if name.startswith("w13") else ("w2",)
        make = self._factors(name, data) if is_factor else self._marked(name, data)
        made = {part: make(name, part, len(data)) for part in parts}
        if self._are_whole:
            # Gate and up rows alternate in gpt-oss' checkpoints.
            whole = torch.stack([torch.stack(each) for each in made.values()], 2).flatten(1, 2)
            if self._ranks.split:
                self._wholes[name] = whole
                return
            parameter.weight_loader(parameter, whole, name, shard_id=None, expert_id=None)
            return
        # Experts lie in order, and each rank has as many.
        first = self._ranks.rank * len(data) if self._ranks.shards > 1 else 0
        if len(data) == self._model["router"]["num_experts"]:
            first = 0  # Of inputs, ranks may have the scales of all experts.
        # What it returns are names of parameters, one by one.
        for _ in self._experts.load_weights([*named(name, made, first, self._form)]):
            pass

    def _marked(self, name: str, data: Tensor) -> Callable[..., list[Tensor]]:
        hidden, inner = self._sizes
        # Some methods make parameters of the sizes that a kernel needs, or round them down to
        # blocks. The other parameter of its kind has the same blocks along the hidden size.
        padded = self._experts.hidden_size
        is_first = name.startswith("w13")
        other = name.replace(*("w13", "w2") if is_first else ("w2", "w13"))
        blocks = Fraction(getattr(self._experts, other).shape[1 if is_first else -1], padded)
        of_hidden = [n * hidden / padded for n in data.shape[2 if is_first else 1 :][:1]]
        of_inner = [whole_blocks(inner * blocks)] if is_first or data.ndim > 2 else []
        shape = [round(n) for n in (*of_inner, *of_hidden)[:: 1 if is_first else -1]]
        like = data.new_empty(shape)
        return lambda name, part, experts: self.checkpoint.make(name, part, experts, like)

    def _factors(self, name: str, data: Tensor) -> Callable[..., list[Tensor]]:
        # `RoutedExperts.weight_loader` raises for two scales of an input with room for one.
        are_apart = data.ndim == 2 and data.shape[1] == 2 and name not in _TIED
        return partial(self.checkpoint.make_factors, are_apart=are_apart)
