"""A layer of a fused MoE under test: its weights, its calls, and every comparison of one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest

from pytest_moe_routing.schemes import kernel_of
from pytest_moe_routing.suite.gpu import Compared, dtype, explained
from pytest_moe_routing.suite.skips import unsupported_is_skipped

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
    from pytest_moe_routing.kernels.fused import Rows
    from pytest_moe_routing.kernels.library import Kernels
    from pytest_moe_routing.kernels.reached import ReachedExperts
    from pytest_moe_routing.kernels.weights import Prepared
    from pytest_moe_routing.reference.moe import MoELayer
    from pytest_moe_routing.reference.problem import MoEProblem
    from pytest_moe_routing.reference.quantization import Quantized
    from pytest_moe_routing.reference.shard import Shard
    from pytest_moe_routing.reference.weights import Expert, GeneratedExperts
    from pytest_moe_routing.schemes import KernelSpec

#: Lines that explain a wrong result, made when they are needed.
Explain = Callable[[], list[str]]
#: Experts that are different, where sizes are reduced; a prime, so that no shard repeats another.
DISTINCT = 61


@dataclass(frozen=True)
class Cycled:
    """As many experts as a model has, of which only some are different."""

    few: Sequence[Expert]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, expert: int, /) -> Expert:
        return self.few[expert % len(self.few)]


@dataclass(frozen=True)
class Fused:
    """A layer, and the calls of its kernel."""

    kernels: Kernels
    flashinfer: FlashInfer
    call: KernelCall
    scheme: str
    activated: str = "silu"
    sizes: tuple[int, int] | None = None
    layout: str = ""
    biases: bool = False
    silent: int | None = None
    limit: float | None = None
    shared: int = 0
    even: bool = False  # whether the experts of a token contribute about as much as each other

    @cached_property
    def layer(self) -> MoELayer:
        from pytest_moe_routing.reference.activation import activation
        from pytest_moe_routing.reference.moe import MoELayer

        return MoELayer(
            self.scheme, activation(self.activated, limit=self.limit), self.call.weight_on
        )

    @cached_property
    def kernel(self) -> KernelSpec:
        return kernel_of(self.scheme)

    @cached_property
    def width(self) -> tuple[int, int]:
        """Hidden and intermediate size."""
        if self.sizes:
            return self.sizes
        entry = self.flashinfer.entry_point(self.scheme)
        least = 128 if entry is None else max(128, entry.multiple_of)
        inner = least if self.kernels.simulated else 256
        return (256 if self.kernels.simulated else 512), inner

    @cached_property
    def experts(self) -> GeneratedExperts | Cycled:
        from pytest_moe_routing.reference.weights import GeneratedExperts, static_scale

        count = self.call.num_experts + self.shared
        made = GeneratedExperts(
            count,
            *self.width,
            self.layer.storage.weight,
            self.layer.activation.gated,
            self.biases,
            intermediate_scale=static_scale(self.layer.storage.intermediate),
            even=self.even,
        )
        if self.sizes:
            return made
        few = [made[e] for e in range(min(DISTINCT, count))]
        if self.silent is not None:
            few[self.silent] = silenced(few[self.silent])
        return Cycled(few, count)

    @cached_property
    def _prepared(self) -> Prepared:
        from pytest_moe_routing.kernels.weights import prepare
        from pytest_moe_routing.reference.shard import Shard

        few = self.experts.few if isinstance(self.experts, Cycled) else self.experts
        return prepare(
            few,
            self.kernel,
            gated=self.layer.activation.gated,
            layout=self.layout,
            shard=Shard.whole(len(few)),
            device=self.kernels.device,
        )

    @cached_property
    def reached(self) -> ReachedExperts:
        """The weights of a layer of full size, padded, of the experts that tokens reach."""
        from pytest_moe_routing.kernels.padding import PaddedExperts
        from pytest_moe_routing.kernels.reached import ReachedExperts

        gated = self.layer.activation.gated
        padded = PaddedExperts(self.experts, self.scheme, gated)
        return ReachedExperts(padded, self.kernel, gated, self.kernels.device)

    def prepared(self, shard: Shard) -> Prepared:
        """Return the weights of a shard in the kernel's layout."""
        count = len(self._prepared.gate)
        return self._prepared.take([e % count for e in shard.experts], shard)

    @cached_property
    def whole(self) -> Prepared:
        from pytest_moe_routing.reference.shard import Shard

        if self.sizes:
            return self.reached.prepared
        return self.prepared(Shard.whole(self.call.num_experts + self.shared))

    def problem(self, num_tokens: int, pattern: str = "plain") -> MoEProblem:
        """Return the kernel's problem, routed by the reference."""
        from pytest_moe_routing import logits
        from pytest_moe_routing.reference.problem import MoEProblem

        recipe, spread = self.flashinfer.recipe(self.call), logits.EVEN if self.even else 1
        case = logits.make_case(
            pattern, recipe, num_tokens=num_tokens, num_experts=self.call.num_experts
        )
        bias = None if case.bias is None else case.bias.to(dtype(self.call.bias_dtype))
        return MoEProblem.of(
            logits.loud(num_tokens, self.width[0], seed=num_tokens),
            self.experts,
            self.layer,
            recipe=recipe,
            logits=(case.logits * spread).to(dtype(self.call.logits_dtype)),
            bias=bias,
        )

    def arguments(
        self, problem: MoEProblem, *, prepared: Prepared | None = None, **how: Any
    ) -> dict[str, Any]:
        from pytest_moe_routing.kernels.fused import fused_arguments

        with unsupported_is_skipped():
            return fused_arguments(
                problem,
                self.call,
                prepared or self.whole,
                self.flashinfer,
                shared=self.shared,
                **how,
            )

    def launch(
        self, arguments: dict[str, Any], *, routed: bool = False, tuned: bool = False
    ) -> list[Tensor]:
        from pytest_moe_routing.kernels.fused import launch_fused

        first, *rest = launch_fused(
            self.kernels.fused_moe,
            self.kernel.function(routed),
            arguments,
            self.kernels.autotune(True) if tuned else None,
        )
        # Without the columns of padded weights.
        return [first[..., : self.width[0]], *rest]

    def output(
        self, problem: MoEProblem, *, tuned: bool = False, **how: Any
    ) -> tuple[Tensor, Explain]:
        """Return the output, and what explains it if it is wrong."""
        arguments = self.arguments(problem, **how)
        (output,) = self.launch(arguments, routed=how.get("routed", False), tuned=tuned)
        return output, lambda: self.explained(arguments, output, how.get("routed", False), tuned)

    def explained(
        self, arguments: dict[str, Any], output: Tensor | None, routed: bool, tuned: bool = False
    ) -> list[str]:
        from pytest_moe_routing.kernels.fused import launch_fused

        if self.sizes:
            return ["no diagnosis at full size: simulating the known faults would take hours"]
        given = {name: _on_cpu(value) for name, value in arguments.items()}

        def run(fused_moe: Any) -> Tensor:
            tune = fused_moe.autotune(True) if tuned else None
            return launch_fused(fused_moe, self.kernel.function(routed), dict(given), tune)[0]

        return explained(run, output, self.flashinfer)

    def rows(self, problem: MoEProblem, **how: Any) -> tuple[Tensor, Rows]:
        """Chosen experts, and the rows of them and of shared ones, as the kernel says itself."""
        import torch

        from pytest_moe_routing.kernels.fused import rows_of

        tokens, top_k = problem.hidden.shape[0], self.call.top_k
        if not self.replays:
            result = self.launch(self.arguments(problem, finalize=False, **how))
            return self.located(problem), rows_of(result, tokens, top_k)
        replay = torch.full((tokens, top_k), -1, dtype=torch.int16, device=self.kernels.device)
        result = self.launch(self.arguments(problem, finalize=False, replay=replay, **how))
        return replay.cpu().to(torch.int64), rows_of(result, tokens, top_k + self.shared)

    @cached_property
    def replays(self) -> bool:
        """Whether the entry point says which experts it chose."""
        signature = self.flashinfer.signature(self.kernel.function())
        return signature is not None and "routing_replay_out" in signature.parameters

    def located(
        self,
        problem: MoEProblem,
        launch: Callable[[dict[str, Any]], list[Tensor]] | None = None,
    ) -> Tensor:
        """Chosen experts of an entry point without replay: those whose own shard has the slot.

        A slot that no shard has, or several have, is -1.
        """
        import torch

        from pytest_moe_routing.reference.shard import Shard

        tokens, top_k = problem.hidden.shape[0], self.call.top_k
        ids = torch.full((tokens, top_k), -1)
        owners = torch.zeros(tokens, top_k, dtype=torch.int64)
        for expert in range(self.call.num_experts):
            one = self.whole.take([expert], Shard(expert, 1))
            arguments = self.arguments(problem, prepared=one, finalize=False)
            # Where its row is says whether a slot is the shard's; there may be no rows at all.
            place = (launch or self.launch)(arguments)[-1]
            local = place.view(tokens, top_k) >= 0
            ids[local] = expert
            owners += local
        return ids.masked_fill(owners != 1, -1)

    def check(
        self, num_tokens: int, *, pattern: str = "plain", pairs: Sequence[bool] = (False,)
    ) -> None:
        """Every comparison of one call."""
        from pytest_moe_routing.compare import compare_moe
        from pytest_moe_routing.kernels.fused import without_routing
        from pytest_moe_routing.reference.routing import Routing

        problem = self.problem(num_tokens, pattern)
        if self.sizes:
            self.reached.reach(problem.routing.topk_ids.unique().tolist())
        ids, found = self.rows(problem)
        if self.sizes and self.reached.reach(ids.unique().tolist()):
            # The kernel chose other experts, which is judged next; their rows need their weights.
            ids, found = self.rows(problem)
        self.check_choice(problem, ids, found)
        chosen = Routing(ids, found.weights[:, : self.call.top_k])
        chosen = chosen.with_shared(self.call.num_experts, self.shared)
        problem = replace(problem, routing=chosen)
        output, why = self.output(problem)
        compared = compare_moe(output, problem)
        self.expect(Compared.OUTPUT, compared.ok, num_tokens, compared.message, why)
        self.check_sum(Compared.SUM, output, output_of(found, self.call), found, why)
        # No routed twin takes shared experts.
        for pair in () if self.shared else pairs:
            given = without_routing(problem, problem.routing)
            twin, why = self.output(given, routed=True, pair=pair)
            self.check_sum(Compared.TWIN, twin, output, found, why)

    def check_choice(self, problem: MoEProblem, ids: Tensor, found: Rows) -> None:
        """Experts by margin; weights within what bfloat16 and the kernel's sigmoid allow."""
        import torch

        from pytest_moe_routing.compare import compare_routing
        from pytest_moe_routing.kernels.fused import launch_fused, rows_of
        from pytest_moe_routing.simulator.explain import dense

        tokens, top_k = ids.shape
        assert problem.logits is not None
        assert problem.recipe is not None
        weights = found.weights[:, :top_k]
        compared = compare_routing(
            ids,
            weights,
            problem.logits,
            problem.recipe,
            problem.bias,
            precision=self.kernels.precision,
        )

        def run(fused_moe: Any) -> Tensor:
            def launch(arguments: dict[str, Any]) -> list[Tensor]:
                given = {name: _on_cpu(value) for name, value in arguments.items()}
                return launch_fused(fused_moe, self.kernel.function(), given)

            replay = torch.full((tokens, top_k), -1, dtype=torch.int16) if self.replays else None
            result = launch(self.arguments(problem, finalize=False, replay=replay))
            chosen = self.located(problem, launch) if replay is None else replay
            rows = rows_of(result, tokens, top_k + self.shared)
            return dense(chosen, rows.weights[:, :top_k], self.call.num_experts)

        def why() -> list[str]:
            if self.sizes:
                return self.explained({}, None, routed=False)
            return explained(run, dense(ids, weights, self.call.num_experts), self.flashinfer)

        self.expect(Compared.CHOICE, compared.ok, tokens, compared.message, why)
        label = found.weights.dtype
        ok = label == torch.bfloat16
        self.expect(Compared.LABEL, ok, tokens, lambda: f"topk_weights have dtype {label}", why)

    def check_sum(
        self, other_side: Compared, one: Tensor, other: Tensor, found: Rows, why: Explain
    ) -> None:
        """Two sums of the same rows: each row and the result may be off by a step of bfloat16."""
        size = (found.weights.double().abs().unsqueeze(-1) * found.rows.double().abs()).sum(1)
        if self.call.weight_on == "input":
            size = found.rows.double().abs().sum(1)
        off = (one.double() - other.double()).abs() - 2**-7 * size
        worst = float(off.nan_to_num(1e30).max())

        def message() -> str:
            far = f"by up to {worst:.3g} more than rounding explains"
            return f"the output differs from {other_side.value} {far}"

        self.expect(other_side, worst <= 1e-30, len(one), message, why)

    def expect(
        self,
        compared: Compared,
        ok: bool,
        num_tokens: int,
        message: Callable[[], str],
        why: Explain,
    ) -> None:
        """Fail unless a comparison is right, with what is wrong and what explains it."""
        if not ok:
            case = f"{self.scheme}, {self.activated}, {num_tokens} tokens"
            text = "\n".join([message(), *why()])
            pytest.fail(f"{self.call}\n{case}: {text}", pytrace=False)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_on_cpu(v) for v in value)
    return value.cpu() if hasattr(value, "cpu") else value


def output_of(found: Rows, call: KernelCall) -> Tensor:
    """Return the sum over experts of what a kernel returned without it."""
    weights = found.weights.double().unsqueeze(-1)
    if call.weight_on == "input":
        weights = weights.new_ones(weights.shape)
    return (found.rows.double() * weights).sum(1)


def silenced(expert: Expert) -> Expert:
    """Return an expert whose every number is zero, block scales included."""
    return replace(
        expert,
        gemm1=replace(expert.gemm1, data=expert.gemm1.data.clone().zero_()),
        gemm2=replace(expert.gemm2, data=expert.gemm2.data.clone().zero_()),
    )


def moved(matrix: Quantized, device: str) -> Quantized:
    """Return a matrix in its format, on a device."""
    scales, overall = matrix.scales, matrix.global_scale
    return replace(
        matrix,
        data=matrix.data.to(device),
        scales=None if scales is None else scales.to(device),
        global_scale=None if overall is None else overall.to(device),
    )
