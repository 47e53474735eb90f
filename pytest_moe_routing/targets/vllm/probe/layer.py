"""One layer of a model in vLLM, with small widths: vLLM's own, or what stands for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import scales
from pytest_moe_routing.targets.marked import Marked, hidden_states, in_reverse
from pytest_moe_routing.targets.recorder import Reached, returned
from pytest_moe_routing.targets.vllm.probe import factory, release, server_defaults
from pytest_moe_routing.targets.vllm.probe.config import (
    layer_arguments,
    method_named,
    moe_config,
    told_dtype,
)
from pytest_moe_routing.targets.vllm.probe.experts import ServedScheme
from pytest_moe_routing.targets.vllm.probe.factory import Made
from pytest_moe_routing.targets.vllm.probe.method import Caller, experts_made, loaded
from pytest_moe_routing.targets.vllm.probe.prepared import misread, prepare_finalize
from pytest_moe_routing.targets.vllm.probe.ranks import TOKENS, Ranks
from pytest_moe_routing.targets.vllm.probe.release import names

#: What a kernel does with its arguments.
_Write = Callable[[Mapping[str, Any]], None]
#: So that gate and up rows together are not as many as columns.
HIDDEN, INTERMEDIATE = 768, 256
#: The same of layers with hundreds of tokens, whose time goes into their values.
_NARROW, _MANY_TOKENS = (256, 512), 256


def sizes_of(model: Mapping[str, Any], tokens: int = TOKENS) -> tuple[int, int]:
    """Return the hidden and intermediate size of a layer that is given so many tokens.

    They differ where they do in the model: code may take one for the other.
    """
    experts = model["experts"]
    hidden, intermediate = (HIDDEN, INTERMEDIATE) if tokens < _MANY_TOKENS else _NARROW
    are_equal = experts["intermediate_size"] == (experts["latent_size"] or experts["hidden_size"])
    return hidden, hidden if are_equal else intermediate


def _kernel(experts: Any, method: Any, layer: Layer) -> Any:
    """Return the kernel object around the experts, with vLLM's own steps before and after them.

    None if the method has none.
    """
    made = layer.made(experts, method)
    if made is None:
        return None
    kernel = object.__new__(names().get("kernel"))
    prepare = prepare_finalize(layer.config, made, is_monolithic=True)
    kernel.impl = names().get("kernel-impl")(prepare, made)
    return kernel


# Every weight lies in it: a layer is garbage only when somebody collects it.
_weights = torch.empty(0, dtype=torch.uint8)


def _memory(size: int) -> Tensor:
    """Return so many bytes that nobody reads."""
    global _weights
    if len(_weights) < size:
        _weights = torch.empty(size, dtype=torch.uint8)
    return _weights[:size]


@lru_cache(16)
def _logits(tokens: int, experts: int, dtype: torch.dtype) -> Tensor:
    """Return logits of so many tokens; to make them takes ten times as long as to copy them."""
    return torch.linspace(-3.3, 3.1, tokens * experts).reshape(-1, experts).to(dtype)


class Layer:
    """A layer, and the tensors that the probe gives it.

    Attributes:
        config: vLLM's config of the layer.
        asked: What the methods of the layer are given.
        bias: What the model's code gives to the layer as its correction bias.
        hidden: What the layer is given, of marked tokens: bfloat16, [tokens, columns].
        ranks: Where the layer runs.
        sizes: Its hidden and intermediate size.
        backend: What vLLM's selector has chosen for the layer; None if that is TRT-LLM's.
    """

    config: Any
    asked: Any
    backend: Any = None

    def __init__(self, model: Mapping[str, Any], row: ServedScheme, ranks: Ranks) -> None:
        router = model["router"]
        experts = router["num_experts"]
        self.model, self.row, self.ranks, self.tokens = model, row, ranks, ranks.tokens
        dtype = told_dtype(model) or getattr(torch, model["dtype"])
        # vLLM's code may change them in place.
        self.logits = _logits(self.tokens, experts, dtype).clone()
        self.bias = None
        if router["correction_bias"] is not None:
            # Most values have no bfloat16 of their own.
            bias = torch.linspace(0.101, 0.907, experts)
            self.bias = bias.to(getattr(torch, router["correction_bias"]))
        self.global_num_experts, self.local_num_experts = experts, experts // ranks.shards
        self.ep_rank, self.top_k = ranks.shards - 1, router["top_k"]
        stated = release.router_arguments(model)
        self.num_expert_group, self.topk_group = stated["num_expert_group"], stated["topk_group"]
        self.routed_scaling_factor = release.router_factor(model)
        self.apply_router_weight_on_input = router["weight_on"] == "input"
        self.sizes = sizes_of(model, self.tokens)
        self.intermediate_size_per_partition = self.sizes[1] // ranks.parts
        self.hidden = hidden_states(self.tokens, self.sizes[0])

    def at_kernel(self, x: Tensor) -> Tensor:
        """Return the rows that a kernel is given of a tensor with one for each of our tokens."""
        return in_reverse(x) if self.ranks.dispatched else x

    def give(self, layer: Any) -> None:
        """Give weights, whose values nobody reads, and scales to what methods read."""
        local, inner = self.local_num_experts, self.intermediate_size_per_partition
        columns = self.sizes[0]
        rows = inner * (2 if self.model["experts"]["gated"] else 1)
        dtype, per = getattr(torch, self.row.quantized[0]), 1
        if self.row.packed:
            dtype, per = torch.uint8, 2
        # Past the checks of modules, which take longer than all else.
        given = vars(layer)
        for name, shape in (("w13", (rows, columns // per)), ("w2", (columns, inner // per))):
            weight = _memory(local * shape[0] * shape[1] * dtype.itemsize)
            weight = weight.view(dtype).view(local, *shape)
            given[f"{name}_weight"] = given[f"{name}_weight_packed"] = weight
        given.update(self._loaded())

    def _loaded(self) -> dict[str, Tensor | None]:
        """Return scales and biases as methods have them when weights are loaded."""
        kept = loaded(self.row, self.local_num_experts, self.model["experts"]["bias"])
        # vLLM's code changes scales of whole tensors in place.
        return {
            n: t.clone() if n.endswith("scale_2") and t is not None else t for n, t in kept.items()
        }

    def named(self) -> dict[str, Tensor | None]:
        """Return the tensors that a kernel may be given, by the names that answers use."""
        logits = self.at_kernel(self.logits)
        return {"router logits": logits, "bias": self.bias, **self.named_of_experts()}

    def named_of_experts(self) -> dict[str, Tensor | None]:
        """Return those of them that are the experts'."""
        given = loaded(self.row, self.local_num_experts, self.model["experts"]["bias"])
        found = {}
        for gemm, name in (("gemm1", "w13"), ("gemm2", "w2")):
            if self.row.block_scales:
                found[f"{gemm} scales"] = given[f"{name}_weight_scale"]
            found[f"{gemm} bias"] = given.get(f"{name}_bias")
        return found

    def made(self, experts: Any, method: Any) -> Any:
        """Return the layer's experts, of a class of vLLM, as a method has them; see `method`."""
        vars(self.asked).update(self._loaded())
        return experts_made(experts, method, self.caller(None), self.asked)

    def caller(self, kernel: Any, *, is_monolithic: bool = True) -> Caller:
        """Return what a method of the layer is a method of; see `method.Caller`."""
        return Caller(
            kernel, self.row, self.config, is_monolithic=is_monolithic, backend=self.backend
        )

    def run(self, experts: Any, method: Any, write: _Write | None = None) -> None:
        """Run a method that calls monolithic experts, down to the kernel and back if possible.

        Args:
            write: What the kernel writes into its arguments, where it comes back.

        Raises:
            Reached: The kernel was called. Its `output` says what came of it, see
                `factory.Made.read`; where that is not run, only who is to apply the factor.
        """
        raise NotImplementedError

    def bind(self, experts: Any, method: Any, capture: Callable[[Tensor], None]) -> None:
        """Have vLLM bind a consumer of the ids that a kernel writes; see `factory.Made.bind`.

        Raises:
            Unsupported: The layer is not vLLM's own.
        """
        raise Unsupported("not judged: no layer of vLLM is run, so no consumer of ids is bound")

    def hand_on(self, kernel: Any, method: Any, marked: Marked) -> tuple[Tensor, dict[str, Any]]:
        """Run a method that hands ids and weights to modular experts.

        Args:
            kernel: vLLM's modular kernel.
            method: The method, as a function.

        Returns:
            What the method returns; and what the layer makes of that, see `factory.Made.read`,
            which is nothing where it is not run.
        """
        raise NotImplementedError


class StandIn(Layer):
    """The attributes of vLLM's layer that its methods read, and no others.

    For releases whose factory the probe does not run, and for the thousands of swept models.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        row: ServedScheme,
        method: str,
        ranks: Ranks,
        is_class: bool,
    ) -> None:
        super().__init__(model, row, ranks)
        dispatched, parts = ranks.dispatched, ranks.parts
        self.asked = self
        self.config = moe_config(
            model, method, ranks.shards, self.sizes, dispatched=dispatched, parts=parts
        )
        for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta"):
            setattr(self, name, getattr(self.config, name, None))
        self.e_score_correction_bias = self.bias
        self.activation = self.config.activation
        self.routing_method_type = self.config.routing_method
        self.enable_eplb, self.eplb_state = False, None
        self.hash_indices_table = self.routing_sink = None
        self.expert_map = None
        if ranks.shards > 1:
            experts, local = self.global_num_experts, self.local_num_experts
            self.expert_map = torch.full((experts,), -1, dtype=torch.int32)
            default = server_defaults.parallel(server_defaults.PLACEMENT)
            if ranks.placement is None and default != "linear":
                raise Unsupported(
                    "not judged: by default, experts of this release do not lie in order, and the "
                    "code that places them is not run"
                )
            is_every = ranks.placement == "round_robin"
            here = slice(self.ep_rank, None, ranks.shards) if is_every else slice(-local, None)
            self.expert_map[here] = torch.arange(local, dtype=torch.int32)
        self.give(self)
        if not is_class:
            self._before_classes(model)

    def _before_classes(self, model: Mapping[str, Any]) -> None:
        """Provide what the layer's methods read and quantize themselves, without experts."""
        self.renormalize = model["router"]["renormalize"]
        self.custom_routing_function = release.routing_function_of(model)
        w1, a1, w2, a2 = (scales.per_expert(n, self.local_num_experts) for n in scales.GIVEN)
        self.output1_scales_gate_scalar = self.g1_alphas = w1 * a1
        self.output1_scales_scalar = self.g1_scale_c = w1 * a1 / a2
        self.output2_scales_scalar = self.g2_alphas = w2 * a2
        self.a1_gscale = 1 / a1

    def register_parameter(self, name: str, value: Tensor) -> None:
        """Keep a tensor, as a module does."""
        setattr(self, name, value)

    def run(self, experts: Any, method: Any, write: _Write | None = None) -> None:
        kernel = _kernel(experts, method, self) if isinstance(experts, type) else None
        factor = self.model["router"]["routed_scaling_factor"]
        try:
            method(self.caller(kernel), self, self.hidden.clone(), self.logits)
        except Reached as reached:
            # What is done with the output is not run: the model's code says who applies the factor.
            reached.output = {"scale_after": factor / self.routed_scaling_factor}
            if kernel is not None:
                given = misread(reached.arguments, self.row, self.at_kernel(self.hidden))
                reached.output["misread"] = list(given)
            raise

    def hand_on(self, kernel: Any, method: Any, marked: Marked) -> tuple[Tensor, dict[str, Any]]:
        arguments = {
            "self": self.caller(kernel, is_monolithic=False),
            "layer": self,
            "x": marked.hidden.clone(),
            "topk_weights": marked.weights.clone(),
            "topk_ids": marked.ids.clone(),
            "shared_experts": None,
            "shared_experts_input": None,
        }
        return method(**release.accepted(method, arguments)), {}


class OwnLayer(Layer):
    """A layer that vLLM's factory makes and vLLM's runner runs."""

    def __init__(
        self, model: Mapping[str, Any], row: ServedScheme, method: str, ranks: Ranks
    ) -> None:
        super().__init__(model, row, ranks)
        self._method = method
        self.layer = Made(layer_arguments(model, self.sizes, self.bias), ranks, self.give)
        self.config, self.asked = self.layer.config, self.layer.experts
        if self.layer.runner.router.routing_method_type.name != method:
            # As if the router were for another method.
            self.config.routing_method = method_named(method)

    def told_otherwise(self) -> dict[str, list[str]]:
        """Return the fields of the layer's config that gates are asked about with other values.

        By name, what the gates are told and what the factory made of it.
        """
        model, ranks = self.model, self.layer.ranks
        dispatched, parts = ranks.dispatched, ranks.parts
        told = moe_config(
            model, self._method, ranks.shards, self.sizes, dispatched=dispatched, parts=parts
        )
        stated = release.sources().stated(release.architecture_of(model))
        got, found = vars(self.config), {}
        for name, value in vars(told).items():
            # A layer that is told no dtype takes that of the hidden states.
            is_left_out = name == "router_logits_dtype" and name not in (stated or ())
            # Most are the same object: to put them in words takes longer than all else.
            is_same = value is got[name] or _said(value) == _said(got[name])
            if not is_same and not is_left_out:
                found[name] = [_said(value), _said(got[name])]
        return found

    def run(self, experts: Any, method: Any, write: _Write | None = None) -> None:
        asked = self.caller(_kernel(experts, method, self))
        reached: list[Reached] = []
        written = factory.kernel_output(self.tokens, self.sizes[0])

        def kernel(function: str, arguments: Mapping[str, Any]) -> Any:
            reached.append(Reached(function, arguments, release.line_of_call()))
            if write is not None:
                write(arguments)
            wrong.append(misread(arguments, self.row, self.at_kernel(self.hidden)))
            return returned(function, arguments, self.at_kernel(written).clone())

        wrong: list[tuple[str, ...]] = []
        with patch.object(release, "answer", kernel):
            _, output = self.layer.run(method, asked, self.logits, self.hidden.clone())
        if reached:
            of_layer = {"told_otherwise": self.told_otherwise(), "misread": list(wrong[0])}
            reached[0].output = {**self._read(output, written), **of_layer}
            raise reached[0]

    def bind(self, experts: Any, method: Any, capture: Callable[[Tensor], None]) -> None:
        self.layer.bind(_kernel(experts, method, self), capture)

    def hand_on(self, kernel: Any, method: Any, marked: Marked) -> tuple[Tensor, dict[str, Any]]:
        router = ChosenExperts(marked.weights.clone(), marked.ids.clone())
        asked = self.caller(kernel, is_monolithic=False)
        hidden = marked.hidden.clone()
        finalized, output = self.layer.run(method, asked, self.logits, hidden, router)
        return finalized, self._read(output, finalized)

    def _read(self, output: Tensor, routed: Tensor) -> dict[str, Any]:
        found = self.layer.read(output, routed)
        if found["scale_after"] is not None and release.scaled_by(self.model) == "model":
            # The model's own code scales what the layer returns.
            found["scale_after"] *= self.model["router"]["routed_scaling_factor"]
        return found


def _said(value: Any) -> str:
    """Return a field's value as a reader knows it."""
    if value is None:
        return "none"
    return str(value.value if isinstance(value, Enum) else value).removeprefix("torch.")


class ChosenExperts:
    """A router that has chosen already."""

    def __init__(self, weights: Tensor, ids: Tensor) -> None:
        self._chosen = weights, ids

    def select_experts(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._chosen


def layer_of(
    model: Mapping[str, Any],
    row: ServedScheme,
    method: str,
    ranks: Ranks,
    *,
    is_class: bool = True,
) -> Layer:
    """Return a layer of a model: vLLM's own, where the probe runs its factory.

    Args:
        method: The routing method that the layer has.
        is_class: Whether the release has classes of experts.
    """
    if factory.is_run(model):
        return OwnLayer(model, row, method, ranks)
    return StandIn(model, row, method, ranks, is_class)
