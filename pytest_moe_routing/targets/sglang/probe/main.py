"""Builds and runs a model's MoE block as SGLang's own code does, up to FlashInfer's entry point.

It is run by `targets.server` with the arguments ROOT FLASHINFER VERSION; see `world`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.targets import layers, scales, stubs
from pytest_moe_routing.targets.contract import Contract, Names
from pytest_moe_routing.targets.recorder import input_scale, plain
from pytest_moe_routing.targets.server import serve
from pytest_moe_routing.targets.sglang.model_configs import configs, served_as
from pytest_moe_routing.targets.sglang.probe import weights
from pytest_moe_routing.targets.sglang.probe.around import around
from pytest_moe_routing.targets.sglang.probe.calls import Call
from pytest_moe_routing.targets.sglang.probe.checkpoints import checkpoint
from pytest_moe_routing.targets.sglang.probe.configs import ModelConfig, quant_config, rewritten
from pytest_moe_routing.targets.sglang.probe.default_runner import (
    AUTO,
    FIELD,
    TRITON,
    Checkpoint,
    Refusal,
    default_runner,
    keeps_shared_apart,
    layer_runner,
    register_runners,
    server_defaults,
    started,
)
from pytest_moe_routing.targets.sglang.probe.device import OnCpu
from pytest_moe_routing.targets.sglang.probe.hand_overs import hand_overs
from pytest_moe_routing.targets.sglang.probe.handed_over import handed_over
from pytest_moe_routing.targets.sglang.probe.layouts import layouts, other_layouts, split_layouts
from pytest_moe_routing.targets.sglang.probe.other_experts import other_experts
from pytest_moe_routing.targets.sglang.probe.other_ways import defaults_elsewhere
from pytest_moe_routing.targets.sglang.probe.placements import placement_questions
from pytest_moe_routing.targets.sglang.probe.raised import NotBuiltError, raising, verdict_on
from pytest_moe_routing.targets.sglang.probe.ranks import fusing
from pytest_moe_routing.targets.sglang.probe.remade import remade
from pytest_moe_routing.targets.sglang.probe.replaced import Told
from pytest_moe_routing.targets.sglang.probe.requests import (
    CAPTURED,
    INNER,
    TOKENS,
    requested,
    with_tokens,
)
from pytest_moe_routing.targets.sglang.probe.rule import rule, runner_rules
from pytest_moe_routing.targets.sglang.probe.sources import OfConfig, Sources
from pytest_moe_routing.targets.sglang.probe.watching import Seen, replace_function, watching
from pytest_moe_routing.targets.sglang.probe.world import RoutedOutside, choose_runner, enter

#: More than the largest batch of any special gate kernel.
_TOKENS = 64
#: A layer of experts in every model: the first few are dense, or routed by a table.
_LAYER = 5
#: The width of hidden states, and of experts; see `configs.yaml`.
_SIZES: tuple[int, ...] = tuple(map(configs()["sizes"].get, ("hidden_size", "intermediate_size")))
#: Why no kernel routes, in the code of some models.
_CALLED = "the model's code calls SGLang's own Triton kernel, whatever the runner"
_CHOSEN = "the model's own code chooses the experts: the kernel is given experts and weights"


class Blocks:
    """Answers about the MoE blocks of one release's models."""

    def __init__(self, root: str, flashinfer: FlashInfer, version: str) -> None:
        self.calls: list[Call] = []
        #: Tensors of the experts of the layer that ran last, see `named_of_experts`.
        self.experts: dict[str, Tensor | None] = {}
        definitions = stubs.definitions("sglang", root)
        self.names = Names(Contract.of("sglang"), version, definitions, stubs.real_module)
        self.sources = Sources(self.names, root)
        self.defaults = cache(lambda: server_defaults(self.sources))
        self.enter = cache(lambda: self._enter(root, flashinfer))
        torch.set_default_dtype(torch.bfloat16)
        torch.set_grad_enabled(False)

    def _enter(self, root: str, flashinfer: FlashInfer) -> None:
        enter(self.names, root, flashinfer, self.calls, self.defaults)
        replace_function(self.names)

    def method_numbers(self) -> dict[str, int]:
        self.names.require("numbers")
        self.enter()
        return {member.name: int(member) for member in self.names.get("methods")}

    def accepted_quantizations(self) -> list[str | None] | None:
        """Return what `--moe-runner-backend flashinfer_trtllm` may be combined with; None: all."""
        self.names.require("verdicts")
        return self.sources.accepted_quantizations()

    def default_runner(self, **checkpoint: Unpack[Checkpoint]) -> str:
        """Return the runner of a server to which none was named; see `default_runner`."""
        self.names.require("verdicts")
        self.enter()
        return default_runner(self.names, self.defaults(), checkpoint)

    def keeps_shared_apart(self, runner: str, scheme: str, **told: Unpack[Checkpoint]) -> bool:
        """Return whether a server keeps shared experts apart; see `keeps_shared_apart`."""
        self.names.require("verdicts", scheme)
        self.enter()
        # Before, no code of a server is run. It says so of each runner of TRT-LLM's.
        is_asked = self.names.expects("overrides-fusion")
        return not is_asked or keeps_shared_apart(self.names, self.defaults(), told, runner)

    def layer_runner(
        self,
        architecture: str,
        config: dict[str, Any],
        scheme: str,
        quantization: Mapping[str, Any] | None,
        runner: str = AUTO,
    ) -> str:
        """Return the runner that a model's layer takes, by default when that is left to the layer.

        The arguments are those of `capture`.

        Raises:
            Unsupported: No layer is made here, or its runner is not known.
        """
        self.names.require("verdicts", scheme)
        self.enter()
        choose_runner(runner)
        register_runners(self.names)
        runners = set()
        for module, name, given in self.sources.blocks(architecture):
            seen = Seen()
            try:
                with watching(self.names, seen):
                    _build(self.names, module, name, given, config, quantization)
            except Exception as error:
                # What follows the layer does not change its runner.
                if not (seen.made or self.sources.calls_experts(module, name)):
                    _, text, _ = verdict_on(error, is_built=False)
                    raise Unsupported(f"{name} under {runner}: {text}") from error
            if self.sources.calls_experts(module, name):
                runners.add(TRITON)
            runners |= {layer_runner(self.names, layer) for layer in seen.made}
        if len(runners) != 1:
            raise Unsupported(f"layers of {architecture} use {', '.join(sorted(runners))}")
        return runners.pop()

    def capture(
        self,
        architecture: str,
        config: dict[str, Any],
        scheme: str,
        quantization: Mapping[str, Any] | None,
        runner: str,
        deciding: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return what the model's code asks for, and what reaches the kernel.

        This is on the second of two ranks that share out the experts; or on one rank, if only that
        has the model's code put shared experts among the routed ones.

        Args:
            architecture: Name of the model's class.
            config: Attributes of the model's config object.
            scheme: Name of the quantization scheme.
            quantization: `name`, a row of the contract, and `arguments` of the quantization config,
                see `configs.yaml`, or what the checkpoint's config has; None for a model that is
                not quantized.
            runner: What `--moe-runner-backend` says.
            deciding: What else of the config decides about shared experts, if the server leaves
                that to the model's code; None if it keeps them apart from the routed ones.

        Raises:
            Unsupported: The block cannot be found, built or run, or there are several that differ.
        """
        self.names.require("verdicts", scheme)
        self.enter()
        choose_runner(runner)
        if deciding is not None:
            model_code = stubs.real_module(self.sources.place(architecture))
            model = getattr(model_code, served_as(architecture))
            made = quant_config(self.names, quantization)
            with fusing(self.names, model, {**config, **deciding}, made):
                answer = self._captured(architecture, config, quantization)
            if answer["shared"]:
                return answer
        return self._captured(architecture, config, quantization)

    def _captured(
        self, architecture: str, config: dict[str, Any], quantization: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        answers: dict[str, dict[str, Any]] = {}
        for module, name, given in self.sources.blocks(architecture):
            block = f"{module.removeprefix('sglang.srt.')}.{name}"
            try:
                answers[block] = self._run(module, name, given, config, quantization)
            except Unsupported as reason:
                raise type(reason)(f"{block}: {reason}") from reason
        first, *others = answers
        nowhere = {"place": "", "at": ""}
        for block in others:
            if answers[block] | nowhere != answers[first] | nowhere:
                raise Unsupported(f"{architecture} has MoE blocks that differ: {first}, {block}")
        return answers[first]

    def rejection(self, server: Checkpoint, options: Mapping[str, Any]) -> str | None:
        """Return why a server does not start with these arguments; None before 0.5.18."""
        is_asked = self.names.expects("overrides-collect")
        found = is_asked and started(self.names, self.defaults(), server, options)
        return found.text if isinstance(found, Refusal) else None

    def around(self, server: Checkpoint, **question: Any) -> dict[str, dict[str, Any]]:
        """Return what becomes of each request around routing, given the arguments of `capture`."""

        def rejects(options: Mapping[str, Any]) -> str | None:
            return self.rejection(server, {FIELD: question["runner"], **options})

        compiles = question["quantization"] is not None and self.names.expects("router-output")
        run = partial(self.capture, **question)
        experts = question["config"]["num_experts"]
        return around(self.names, run, self.calls, rejects, experts, compiles=compiles)

    def handed_over(self, scale: float, **question: Any) -> dict[str, Any]:
        """Return the call that is given experts and weights; see `handed_over`."""
        self.names.require("modular", question["scheme"])
        return handed_over(self.names, lambda: self.capture(**question), self, scale)

    def other_experts(self, **question: Any) -> dict[str, Any]:
        """Return the call of experts of another kernel; see `other_experts`."""
        self.names.require("modular", question["scheme"])
        return other_experts(self, **question)

    def _run(
        self,
        module: str,
        name: str,
        given: Mapping[str, Any],
        values: Mapping[str, Any],
        quantization: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        seen, self.calls[:] = Seen(), []
        answer: dict[str, Any] = {"refused": None, "failed": None, "by_choice": False}
        output: Any = None
        is_rejected = False
        try:
            with watching(self.names, seen):
                seen.block = _build(self.names, module, name, given, values, quantization)
                weights.fill(seen.block, seen, values, _SIZES[0])
                scales.quantized_by.clear()
                output = layers.first_of(_forward(seen.block, values["num_experts"]))
        except RoutedOutside as outside:
            answer["refused"] = "SGLang's own top-k routes: the kernel is given experts and weights"
            answer |= {"by_choice": True, "told": sorted(outside.told)}
        except Exception as error:
            kind, text, raised_in = verdict_on(error, is_built=seen.block is not None)
            if kind == "unknown":
                raise Unsupported(text) from error
            answer |= {kind: text, "raised_in": raised_in}
            # The model's own code, when a server starts with the runner.
            is_rejected = raising(error)["name"].endswith(f"{name}.__init__")
        self.experts = weights.named_of_experts(seen.made[-1]) if seen.made else {}
        made, routers = seen.layers, len(seen.topks)
        if self.sources.calls_experts(module, name):
            made = [(None, place) for place in seen.places]
            if not answer["failed"]:
                answer |= {"refused": _CALLED, "by_choice": True}
        if self.sources.chooses(module, name):
            routers = len(seen.made)
            if not (self.calls or answer["refused"] or answer["failed"]):
                answer |= {"refused": _CHOSEN, "by_choice": True}
        if not made and answer["refused"] and is_rejected:
            return {**answer, "by_choice": True, "place": "", "declared": None, "shared": 0}
        if len(made) != 1 or routers != 1:
            text = (
                f"the block makes {len(made)} MoE layers and {routers} TopK layers, not one of each"
            )
            refused, why = answer["refused"], answer["failed"] or text
            raise NotBuiltError(refused) if refused else Unsupported(why)
        ((declared, place),) = made
        method = None if declared is None else self.names.get("methods")(declared).name
        answer |= {"place": place, "declared": method, "shared": seen.shared}
        if not (answer["refused"] or answer["failed"]):
            answer |= self._call(output, seen)
        return answer

    def _call(self, output: Any, seen: Seen) -> dict[str, Any]:
        """Return the one call of an entry point that routes, and what follows it."""
        if not self.calls:
            raise Unsupported("neither a fused kernel nor SGLang's own top-k is called")
        if len(self.calls) > 1:
            raise Unsupported(f"the block calls {len(self.calls)} kernels, not one")
        ((function, arguments),) = self.calls
        if "routing_logits" not in arguments:
            refused = f"{function} is given experts and weights"
            after = {"unprepared": seen.unprepared, "scale_after": layers.factor_of(output)}
            return {"refused": refused, "by_choice": True, **after}
        scale_after = layers.factor_of(output)
        if scale_after is None:
            raise Unsupported("the kernel's output cannot be traced through the block")
        if len(seen.logits) != 1 or not isinstance(arguments["routing_logits"], Tensor):
            raise Unsupported("the logits that reach the kernel cannot be traced to the router")
        bias = seen.topks[0].topk_config.correction_bias
        named = {"router logits": seen.logits[0], "bias": bias, **self.experts}
        return {
            "function": function,
            "at": self.calls[0].at,
            **input_scale(),
            "arguments": {name: plain(value, named) for name, value in arguments.items()},
            "logits_dtype": str(seen.logits[0].dtype).removeprefix("torch."),
            "scale_after": scale_after,
            "unprepared": seen.unprepared,
            "bias_is_loaded": bias is None or layers.is_loaded(bias, seen.block, seen.topks[0]),
        }


def _build(
    names: Names,
    module: str,
    name: str,
    given: Mapping[str, Any],
    values: Mapping[str, Any],
    quantization: Mapping[str, Any] | None,
    *,
    config: Any = None,
) -> nn.Module:
    """Make the block as a decoder layer would, from the attributes of a config or the object."""
    known = {
        "config": config or ModelConfig({**values, "dtype": torch.get_default_dtype()}),
        "quant_config": quant_config(names, quantization),
        "prefix": f"model.layers.{_LAYER}.mlp",
        "layer_id": _LAYER,
        "layer_idx": _LAYER,
        "num_experts": values["num_experts"],
        "top_k": values["num_experts_per_tok"],
        "hidden_size": _SIZES[0],
        "intermediate_size": requested(INNER) or _SIZES[1],
        **given,
    }
    if requested(CAPTURED):
        # Shared experts run in it while a graph is captured.
        known["alt_stream"] = torch.cpu.Stream()
    block = getattr(stubs.real_module(module), name)
    told = {n: known[n] for n in inspect.signature(block.__init__).parameters if n in known}
    told |= {n: v.of(known["config"]) for n, v in told.items() if isinstance(v, OfConfig)}
    with OnCpu():
        built: nn.Module = remade(block(**told), known)
    return built


def _forward(block: nn.Module, num_experts: int) -> Any:
    """One pass; a block that gets its logits from outside has ours anyway."""
    tokens = requested(TOKENS) or _TOKENS
    return run(block, torch.zeros(tokens, _SIZES[0]), torch.zeros(tokens, num_experts))


def run(block: nn.Module, hidden: Tensor, logits: Tensor) -> Any:
    """One pass of a block over these hidden states."""
    first, *others = inspect.signature(block.forward).parameters.values()
    known = {
        "router_logits": logits,
        "forward_batch": stubs.Stub("forward_batch"),
        "visual_token_mask": None,
    }
    rest = {p.name: known[p.name] for p in others if p.default is p.empty and p.name in known}
    return block(**{first.name: hidden}, **rest)


def handlers(root: str, flashinfer: str, version: str) -> dict[str, Callable[..., Any]]:
    """Return what answers questions about an SGLang."""
    blocks = Blocks(root, FlashInfer.of(flashinfer), version)
    names, chosen = blocks.names, blocks.default_runner
    own = ("method_numbers", "accepted_quantizations", "default_runner", "keeps_shared_apart")
    of_layers = defaults_elsewhere, layouts, other_layouts, split_layouts
    runs = ("layer_runner", "capture", "around", "handed_over", "other_experts")
    return {
        **{name: getattr(blocks, name) for name in (*own, *runs)},
        **placement_questions(blocks),
        **{ask.__name__: partial(ask, blocks) for ask in (*of_layers, hand_overs)},
        "checkpoint": partial(checkpoint, blocks),
        "rewritten": partial(rewritten, blocks.enter),
        "with_tokens": partial(with_tokens, blocks.capture),
        "replaced_runner": lambda **told: blocks.sources.replaced_runner(Told(**told)),
        "rule": lambda **asked: rule(names, lambda: blocks.capture(**asked)),
        "runner_rules": lambda **asked: runner_rules(names, lambda: chosen(**asked)),
    }


def main() -> None:
    serve(handlers(*sys.argv[1:]), "sglang")
