"""FlashInfer's fused MoE module, simulated in torch: the same names, signatures, checks, layouts.

It stands for `flashinfer.fused_moe` where there is no GPU, so that the bodies of GPU tests run; and
with one fault at a time (`faults.py`), so that it is known which of them fail. It rejects what the
FlashInfer rejects (`checks.yaml`, `flashinfer/releases.yaml`) and what it does not model, reads
weights from the bits that it is given (`memory.py`), rounds where the kernels round, and knows
nothing of how arguments were made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.compare.mistakes import Inputs
from pytest_moe_routing.errors import NotSimulated
from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
from pytest_moe_routing.reference.quantization import find_format
from pytest_moe_routing.reference.routing import Routing, route
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.schemes import kernel_of, storage_of
from pytest_moe_routing.simulator.checks import Names, check_call
from pytest_moe_routing.simulator.dispatch import layout_of, scheme_of
from pytest_moe_routing.simulator.epilogue import Epilogue
from pytest_moe_routing.simulator.memory import (
    Memory,
    check_memory,
    decode,
    decode_scale,
    memory_of,
    raw,
    read_weight,
)
from pytest_moe_routing.simulator.placement import permute, unwritten
from pytest_moe_routing.simulator.stages import Context, Fault, Stage

_TILE = 8
#: Numbers of an expert whose opened weights are kept; those of a model's own size are not.
KEPT = 1 << 20


class Simulator:
    """What stands for the module `flashinfer.fused_moe` of a release.

    Attributes:
        RoutingMethodType: The release's enum.
        simulated: What tells the simulator from FlashInfer's module.
    """

    simulated = True

    def __init__(self, flashinfer: FlashInfer, fault: Fault | None = None) -> None:
        self.flashinfer = flashinfer
        self.fault = fault
        self.tuning = False
        members = {name: number for number, name in enumerate(flashinfer.methods)}
        self.RoutingMethodType = IntEnum("RoutingMethodType", members)  # type: ignore[misc]
        self._opened: tuple[Any, dict[int, tuple[Tensor, Tensor]]] = (None, {})

    def __getattr__(self, name: str) -> Callable[..., Any]:
        signature = self.flashinfer.signature(name) if name.startswith("trtllm_") else None
        if signature is None:
            raise AttributeError(f"simulated FlashInfer {self.flashinfer.release} has no {name}")

        def entry(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            run = self._routing if name == "trtllm_gen_routing" else self._fused
            return run(name, dict(bound.arguments))

        entry.__name__ = name
        entry.__signature__ = signature  # type: ignore[attr-defined]
        return entry

    @contextmanager
    def autotune(self, on: bool = True) -> Iterator[None]:
        """As `flashinfer.autotune`: no tactics here, but a fault may depend on them."""
        self.tuning, before = on, self.tuning
        try:
            yield
        finally:
            self.tuning = before

    def _at(self, stage: Stage, value: Any, context: Context) -> Any:
        """Apply the injected fault to a value, if the fault belongs to this stage."""
        if self.fault is None or self.fault.stage != stage:
            return value
        return self.fault.change(value, context)

    # -- routing ------------------------------------------------------------------------------

    def _routing(self, name: str, given: dict[str, Any]) -> Any:
        names = Names(name, given, self.flashinfer)
        check_call(names)
        experts, tile = names["num_experts"], given["tile_tokens_dim"]
        shared = names["shared"]
        shard = Shard(given["local_expert_offset"], names["local_num_experts"] + shared)
        method, top_k = names["method"], given["top_k"]
        context = Context(given, "routing", method, experts, top_k, shard, shared=shared)
        routing = self._choose(context)
        shard = self._at(Stage.SHARD, shard, context)
        place = permute(routing.topk_ids, shard, tile)
        ids = torch.full_like(place.expanded, -1)
        used = place.expanded >= 0
        tiles = place.expanded[used] // tile
        ids[used] = place.expert_of_tile[tiles] + shard.local_expert_offset
        result = SimpleNamespace(
            topk_ids=ids.to(torch.int32),
            topk_weights=routing.topk_weights,
            total_num_padded_tokens=torch.tensor([len(place.tokens)], dtype=torch.int32),
            expanded_idx_to_permuted_idx=place.expanded.to(torch.int32),
            permuted_idx_to_token_idx=place.tokens.to(torch.int32),
            cta_idx_xy_to_batch_idx=place.expert_of_tile.to(torch.int32),
            num_non_exiting_ctas=torch.tensor([len(place.expert_of_tile)], dtype=torch.int32),
        )
        return self._at(Stage.RESULT, result, context)

    def _choose(self, context: Context) -> Routing:
        """From logits to experts and bfloat16 weights."""
        given = context.given
        logits, bias = given["routing_logits"], given["routing_bias"]
        experts, top_k = context.num_experts, context.top_k
        scale = given["routed_scaling_factor"]
        call = KernelCall(
            scheme=context.scheme,
            method=context.method,
            num_experts=experts,
            top_k=top_k,
            logits_dtype=str(logits.dtype).removeprefix("torch."),
            n_group=given["n_group"] or 0,
            topk_group=given["topk_group"] or 0,
            bias="none" if bias is None else "router",
            bias_dtype="float32" if bias is None else str(bias.dtype).removeprefix("torch."),
            routed_scaling_factor=1.0 if scale is None else scale,
            weight_on="input" if given.get("use_routing_scales_on_input") else "output",
        )
        violations = self.flashinfer.violations(call)
        for violation in violations:
            if violation.is_error:
                raise RuntimeError(f"{violation} (FlashInfer {self.flashinfer.judged_as})")
        recipe = self.flashinfer.recipe(call)
        if context.method == "SigmoidRenorm" and not given.get("norm_topk_prob", True):
            recipe = replace(recipe, normalize="none", epsilon=0.0)
        bias = raw(bias) if bias is not None and recipe.bias else None
        inputs = self._at(Stage.INPUTS, Inputs(raw(logits), recipe, bias), context)
        if violations or self._at(Stage.LAUNCHED, True, context) is False:
            return unwritten(len(logits), top_k)
        # A fault may concern other calls than this one: then it leaves the inputs as they are.
        faulty = self._at(Stage.ROUTE, inputs, context)
        if isinstance(faulty, Routing):
            routing = faulty
        else:
            routing = route(inputs.logits, inputs.recipe, inputs.bias)
        routing = Routing(routing.topk_ids, routing.topk_weights.to(torch.bfloat16))
        if not context.shared:
            return routing
        return self._at(Stage.SHARED, routing.with_shared(experts, context.shared), context)

    # -- the fused MoE ------------------------------------------------------------------------

    def _fused(self, name: str, given: dict[str, Any]) -> Any:
        names = Names(name, given, self.flashinfer)
        check_call(names)
        scheme = scheme_of(names)
        experts, top_k = given["num_experts"], given["top_k"]
        shared = names["shared"]
        shard = Shard(given["local_expert_offset"], given["local_num_experts"] + shared)
        context = Context(
            given,
            scheme,
            names["method"],
            experts,
            top_k,
            shard,
            tuning=self.tuning,
            shared=shared,
        )
        given = context.given = self._at(Stage.ARGUMENTS, given, context)
        memory = memory_of(scheme, layout_of(scheme, given))
        check_memory(names, memory, kernel_of(scheme).scale_argument)
        memory = self._at(Stage.MEMORY, memory, context)
        layer = Epilogue(storage_of(scheme), names["activation"], given)
        routing, is_routed = self._given_or_chosen(context)
        hidden = self._hidden(given, scheme, context)
        replay = given.get("routing_replay_out")
        if replay is not None:
            replay[: len(hidden)] = routing.topk_ids[:, :top_k]
        rows = self._rows(hidden, routing, memory, layer, context)
        rows = self._at(Stage.ROWS, rows, context)
        if not given["do_finalize"]:
            place = permute(routing.topk_ids, shard, _TILE)
            permuted = torch.full((len(place.tokens), rows.shape[-1]), torch.nan).bfloat16()
            local = place.expanded >= 0
            permuted[place.expanded[local]] = rows[local]
            weights = self._at(Stage.LABEL, routing.topk_weights, context)
            return [permuted, weights, place.expanded.flatten().to(torch.int32)]
        weights = routing.topk_weights.to(torch.float32)
        if given.get("use_routing_scales_on_input"):
            weights = torch.ones_like(weights)
        weights = self._at(
            Stage.FINALIZE, weights, replace(context, routing=routing, routed=is_routed)
        )
        total = torch.zeros(len(hidden), rows.shape[-1])
        for slot in range(rows.shape[1]):
            total += weights[:, slot : slot + 1] * rows[:, slot].to(torch.float32)
        output = self._at(Stage.OUTPUT, total.to(torch.bfloat16), context)
        if given.get("output") is not None:
            # Without valid dimensions a narrower output gets the first columns.
            output = given["output"].copy_(output[:, : given["output"].shape[1]])
        return [output] if "fp4" in name or "mxint4" in name else output

    def _given_or_chosen(self, context: Context) -> tuple[Routing, bool]:
        topk = context.given.get("topk_ids")
        if topk is None:
            return self._choose(context), False
        if isinstance(topk, tuple):
            ids, weights = topk
            return Routing(ids.to(torch.int64), weights), True
        topk = self._at(Stage.PACKED, topk, context)
        weights = (topk & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.bfloat16)
        return Routing((topk >> 16).to(torch.int64), weights), True

    def _hidden(self, given: dict[str, Any], scheme: str, context: Context) -> Tensor:
        """Hidden states times their block scales, float32 `[tokens, hidden]`."""
        hidden = raw(given["hidden_states"])
        element = {torch.bfloat16: "bf16", torch.uint8: "e2m1"}.get(hidden.dtype, "e4m3")
        values = decode(hidden, element)
        scales = given.get("hidden_states_scale")
        if scales is None:
            return values
        tokens, size = values.shape
        kernel, stored = kernel_of(scheme), find_format(storage_of(scheme).input)
        block = stored.block[1] or size
        transposed = kernel.input_scales == "block"
        shape = (size // block, tokens) if transposed else (tokens, size // block)
        if scales.numel() != shape[0] * shape[1]:
            raise NotSimulated(
                f"hidden_states_scale: found {list(scales.shape)}, expected the {list(shape)} "
                "scales that the kernel reads; the launcher does not check it"
            )
        scales = scales.reshape(shape) if scales.ndim == 1 else scales
        real = decode_scale(raw(scales), stored.scale)
        if transposed:
            real = real.T
        if kernel.token_argument:
            real = real * raw(given[kernel.token_argument]).unsqueeze(1)
        real = self._at(Stage.INPUT_SCALES, real, context)
        return (values.view(tokens, -1, block) * real.unsqueeze(2)).view(tokens, size)

    def _rows(
        self, hidden: Tensor, routing: Routing, memory: Memory, layer: Epilogue, context: Context
    ) -> Tensor:
        """Each slot's expert output as it is stored: bfloat16 `[tokens, top_k, hidden]`."""
        local = routing.topk_ids - context.shard.local_expert_offset
        local = self._at(Stage.LOCAL, local, context)
        rows = torch.zeros(*local.shape, hidden.shape[1], dtype=torch.bfloat16)
        on_input = bool(context.given.get("use_routing_scales_on_input"))
        for expert in local.unique().tolist():
            if not 0 <= expert < context.shard.local_num_experts:
                continue
            token, slot = (local == expert).nonzero(as_tuple=True)
            weight = routing.topk_weights[token, slot].to(torch.float32) if on_input else None
            gemm1, gemm2 = self._open(context, expert, memory, layer)
            rows[token, slot] = layer.run(hidden[token], gemm1, gemm2, expert, memory, weight)
        return rows

    def _open(
        self, context: Context, expert: int, memory: Memory, layer: Epilogue
    ) -> tuple[Tensor, Tensor]:
        """Return an expert's weights; small ones are kept, as tests use the same many times."""
        given, scales = context.given, kernel_of(context.scheme).scale_argument
        key = (id(given["gemm1_weights"]), id(given["gemm2_weights"]), memory)
        if self._opened[0] is None or self._opened[0][0] != key:
            # The tensors are kept too, so that no other one takes their identity.
            keep = (key, given["gemm1_weights"], given["gemm2_weights"])
            self._opened = (keep, {})
        opened = self._opened[1]
        if expert not in opened:
            one, two = (
                read_weight(
                    given[f"{gemm}_weights"][expert],
                    None if (s := given.get(f"{gemm}_{scales}")) is None else s[expert],
                    gated,
                    memory,
                )
                for gemm, gated in (("gemm1", layer.gated), ("gemm2", False))
            )
            if one.numel() + two.numel() > KEPT:
                return one, two
            opened[expert] = one, two
        return opened[expert]
