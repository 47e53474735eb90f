"""The fused MoE, in torch: from hidden states, quantized weights and a routing to the output.

Numbers are rounded exactly where the kernels store them, and nowhere else: the input, the first
GEMM's result where a kernel writes it out before the activation (DeepSeek FP8), the intermediate,
the second GEMM's rows (bfloat16), the output. Sources: FlashInfer 0.7.2.post1,
`csrc/trtllm_fused_moe_runner.cu` (dtypes of each buffer) and `trtllm_fused_moe_dev_kernel.cu`.

Shared experts are outside: add their output to this one's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_moe_routing.errors import LayerError
from pytest_moe_routing.reference.activation import Activation, activation
from pytest_moe_routing.reference.quantization import (
    Quantized,
    dequantize,
    fake_quantize,
    find_format,
    quantize,
)
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.reference.slots import FEW, SortedSlots
from pytest_moe_routing.reference.weights import Expert, Experts
from pytest_moe_routing.schemes import Storage, storage_of


@dataclass(frozen=True)
class MoELayer:
    """What a fused MoE computes, apart from its weights.

    Attributes:
        scheme: Name of the quantization scheme.
        activation: What stands between the GEMMs.
        weight_on: What a router weight multiplies: the expert's `output`, or its `input`, which
            kernels do on the first GEMM's result (Llama4).
    """

    scheme: str
    activation: Activation
    weight_on: str = "output"

    @classmethod
    def of(cls, scheme: str, activated: str = "silu", weight_on: str = "output") -> MoELayer:
        """Return a layer by names.

        Raises:
            MoERoutingError: There is no such scheme or activation.
        """
        storage_of(scheme)
        return cls(scheme, activation(activated), weight_on)

    @property
    def storage(self) -> Storage:
        """The formats of everything."""
        return storage_of(self.scheme)


@dataclass(frozen=True)
class Stages:
    """One expert's numbers for its tokens, before and after each rounding.

    Attributes:
        gemm1: Exact result of the first GEMM, weighted if on the input, with bias.
        stored1: The same as the activation reads it.
        activated: Exact result of the activation, `[tokens, intermediate]`.
        intermediate: The same as the second GEMM reads it.
        gemm2: Exact result of the second GEMM with bias, `[tokens, hidden]`.
        output: The same as it is stored.
    """

    gemm1: Tensor
    stored1: Tensor
    activated: Tensor
    intermediate: Tensor
    gemm2: Tensor
    output: Tensor


#: Elements of a weight that are real numbers at one time: 4 MiB in float32 stay in a cache, which
#: is four times faster than to write out the whole matrix and read it again.
_CHUNK = 1 << 20

#: Elements of the widest matrix that experts which are run together on a GPU may make.
_BATCH = 1 << 24

#: Elements of the weights that one product on a GPU may multiply by, where there are few slots:
#: fewer launches save more than the copy of the weights costs.
_STACKED = 1 << 27


def real_rows(weight: Quantized, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield a weight `[rows, columns]` as real numbers, some rows at a time."""
    if weight.data.dtype == dtype:
        yield weight.data
        return
    rows, columns = weight.shape
    unit = weight.format.block[0] or 1
    step = max(1, _CHUNK // columns // unit) * unit
    for start in range(0, rows, step):
        yield dequantize(weight.rows(start, min(start + step, rows)), dtype)


def linear(x: Tensor, weight: Quantized) -> Tensor:
    """Return `x @ weight.T` in the dtype of `x`: `[tokens, columns]` to `[tokens, rows]`."""
    parts = [x @ rows.T for rows in real_rows(weight, x.dtype)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def run_expert(x: Tensor, expert: Expert, layer: MoELayer, weight: Tensor | None = None) -> Stages:
    """Run one expert on its tokens; arguments as for `run_experts`."""
    return run_experts(x, [(expert, len(x))], layer, weight)


def run_experts(
    x: Tensor,
    experts: Sequence[tuple[Expert, int]],
    layer: MoELayer,
    weight: Tensor | None = None,
) -> Stages:
    """Run some experts, each on its own tokens.

    Args:
        x: Real hidden states `[tokens, hidden]`, in the computing dtype: those of the first
            expert's tokens, then of the second's, and so on.
        experts: Each expert and how many tokens it has; all have the same `intermediate_scale`.
        layer: Formats and activation.
        weight: Router weights `[tokens]`, where they go on the input.
    """
    storage, scale = layer.storage, experts[0][0].intermediate_scale
    counts = [count for _, count in experts]
    gemm1 = _linears(x, [expert.gemm1 for expert, _ in experts], counts)
    if weight is not None:
        gemm1 *= weight.unsqueeze(1)
    _add_biases(gemm1, [expert.bias1 for expert, _ in experts], counts)
    stored1 = stored(gemm1, storage.gemm1)
    activated = layer.activation(stored1)
    intermediate = stored(stored(activated, storage.activated), storage.intermediate, scale)
    gemm2 = _linears(intermediate, [expert.gemm2 for expert, _ in experts], counts)
    _add_biases(gemm2, [expert.bias2 for expert, _ in experts], counts)
    return Stages(gemm1, stored1, activated, intermediate, gemm2, stored(gemm2, storage.gemm2))


def _launches_cost(x: Tensor) -> bool:
    """Whether the number of operations takes the time, not their size: on a GPU."""
    return x.is_cuda


def _linears(x: Tensor, weights: Sequence[Quantized], counts: Sequence[int]) -> Tensor:
    """Multiply the rows of each expert by its weight."""
    if len(weights) == 1:
        return linear(x, weights[0])
    if len(x) <= FEW and len(set(counts)) == 1 and _stackable(weights, x):
        real = torch.stack([dequantize(weight, x.dtype) for weight in weights])
        return torch.bmm(x.unflatten(0, (len(weights), -1)), real.mT).flatten(0, 1)
    rows = x.split(counts)
    return torch.cat([linear(mine, weight) for mine, weight in zip(rows, weights, strict=True)])


def _stackable(weights: Sequence[Quantized], x: Tensor) -> bool:
    rows, columns = weights[0].shape
    return _launches_cost(x) and len(weights) * rows * columns <= _STACKED


def _add_biases(x: Tensor, biases: Sequence[Tensor | None], counts: Sequence[int]) -> None:
    """Add the bias of each expert to its rows."""
    if biases[0] is None:
        return
    for rows, bias in zip(x.split(counts), biases, strict=True):
        assert bias is not None
        rows += bias.to(x.dtype)


def stored(x: Tensor, format: str, scale: float | None = None) -> Tensor:
    """Store `x` in a format, with this static scale if it has one, and read it back."""
    if format == "float32":
        return x
    if format == "bf16":
        return x.to(torch.bfloat16).to(x.dtype)
    options = static(format, scale)
    return fake_quantize(x, format, **{name: v.to(x.device) for name, v in options.items()})


def static(format: str, scale: float | None) -> dict[str, Tensor]:
    """Return the keywords of `quantize` that make it use a static scale."""
    fmt = find_format(format)
    if scale is None or not fmt.is_static:
        return {}
    if fmt.scale == "e4m3":
        return {"global_scale": torch.tensor(scale)}
    return {"scales": torch.tensor([[scale]])}


def real_input(hidden: Tensor | Quantized, layer: MoELayer, dtype: torch.dtype) -> Tensor:
    """Return the numbers that the first GEMM reads: hidden states quantized as in the scheme."""
    if isinstance(hidden, Quantized):
        return dequantize(hidden, dtype)
    return dequantize(quantize(hidden, layer.storage.input), dtype)


def moe(
    hidden: Tensor | Quantized,
    experts: Experts,
    routing: Routing,
    layer: MoELayer,
    *,
    shard: Shard | None = None,
    dtype: torch.dtype = torch.float32,
    output_dtype: torch.dtype = torch.bfloat16,
    progress: bool | None = None,
) -> Tensor:
    """Compute the output of a fused MoE, `[tokens, hidden]`.

    Weights become real numbers a few rows at a time, so memory is that of one stored expert and of
    the tokens, whatever the layer's size.

    Args:
        hidden: Hidden states `[tokens, hidden]`, floating, or already in the scheme's input format
            (with the static scale that the kernel is given).
        experts: The weights, of all experts.
        routing: Chosen experts and their weights, by global id.
        layer: What to compute.
        shard: The experts of this rank; slots of other experts add nothing. Default: all.
        dtype: Accumulate in float32, or in float64 for the exact result.
        output_dtype: What the sum over experts is rounded to.
        progress: Report progress on stderr; default: on a terminal, if it takes long.

    Raises:
        LayerError: Shapes, formats or ids do not fit together.
    """
    shard = shard or Shard.whole(len(experts))
    check_inputs(hidden, experts, routing, shard)
    if not hidden.shape[0]:
        return torch.zeros(hidden.shape, dtype=output_dtype)
    with torch.no_grad():
        x = real_input(hidden, layer, dtype)
        slots = SortedSlots.of(routing, len(experts), dtype)
        # Sums of a GPU have no certain order, so there rows are kept until they are summed.
        by_slot = _launches_cost(x)
        total = x.new_zeros(len(slots.order) if by_slot else len(x), x.shape[1])
        local = slots.counts(shard)
        counts = _with_progress(local, shard.local_num_experts, progress)
        start = slots.bounds[shard.local_expert_offset]
        for batch in _batches(counts, experts, _launches_cost(x)):
            stop = start + sum(count for _, count in batch)
            mine, weight = slots.tokens[start:stop], slots.weights[start:stop]
            rows = _outputs(x.index_select(0, mine), batch, layer, weight)
            if by_slot:
                total.index_copy_(0, slots.order[start:stop], rows)
            else:
                total.index_add_(0, mine, rows)
            start = stop
        if by_slot:
            total = total.view(*routing.topk_ids.shape, -1).sum(1)
        return total.to(output_dtype)


def _outputs(
    x: Tensor, batch: Sequence[tuple[Expert, int]], layer: MoELayer, weight: Tensor
) -> Tensor:
    """Run some experts, each on its own tokens, and weight what they return."""
    if layer.weight_on != "input":
        return _run_together(x, batch, layer, None) * weight.unsqueeze(1)
    return _run_together(x, batch, layer, weight)


def _run_together(
    x: Tensor, batch: Sequence[tuple[Expert, int]], layer: MoELayer, weight: Tensor | None
) -> Tensor:
    """Run experts with as many rows each, where one product for all of them is faster."""
    counts = [count for _, count in batch]
    most = max(counts)
    weights = [expert.gemm1 for expert, _ in batch]
    few = most * len(batch) <= FEW and _stackable(weights, x)
    if not few or min(counts) == most:
        return run_experts(x, batch, layer, weight).output
    places = [expert * most + row for expert, count in enumerate(counts) for row in range(count)]
    place = torch.tensor(places, device=x.device)
    padded = x.new_zeros(len(batch) * most, x.shape[1]).index_copy_(0, place, x)
    if weight is not None:
        weight = weight.new_zeros(len(padded)).index_copy_(0, place, weight)
    evened = [(expert, most) for expert, _ in batch]
    return run_experts(padded, evened, layer, weight).output.index_select(0, place)


def _batches(
    counts: Iterable[tuple[int, int]], experts: Experts, together: bool
) -> Iterator[list[tuple[Expert, int]]]:
    """Join experts that are run together: on a GPU many, on a CPU each is a batch of its own.

    Between its products an expert needs a dozen launches, which cost a GPU more than their work.
    """
    batch: list[tuple[Expert, int]] = []
    size = most = 0
    for number, count in counts:
        expert = experts[number]
        if batch and (
            not together
            or size + count > most
            or expert.intermediate_scale != batch[0][0].intermediate_scale
        ):
            yield batch
            batch, size = [], 0
        if not batch:
            most = _BATCH // max(expert.gemm1.shape)
        batch.append((expert, count))
        size += count
    if batch:
        yield batch


def check_inputs(
    hidden: Tensor | Quantized, experts: Experts, routing: Routing, shard: Shard
) -> None:
    """Raise `LayerError` unless these belong together."""
    ids, weights = routing.topk_ids, routing.topk_weights
    if len(hidden.shape) != 2 or ids.ndim != 2 or ids.shape != weights.shape:
        raise LayerError(
            f"moe: found hidden states {list(hidden.shape)}, ids {list(ids.shape)} and weights "
            f"{list(weights.shape)}, expected [tokens, hidden] and twice [tokens, top_k]"
        )
    if len(ids) != hidden.shape[0]:
        raise LayerError(
            f"moe: found {hidden.shape[0]} hidden states, but {len(ids)} tokens are routed"
        )
    if not shard.lies_within(len(experts)):
        raise LayerError(f"shard: found {shard}, expected experts within 0..{len(experts) - 1}")


def _with_progress(
    steps: Iterable[tuple[int, int]], count: int, show: bool | None
) -> Iterator[tuple[int, int]]:
    """Pass steps on; after two seconds, show on the terminal how far they are."""
    started = time.monotonic()
    show = sys.stderr.isatty() if show is None else show
    shown = False
    for step in steps:
        if show and time.monotonic() - started > 2:
            shown = True
            print(f"\rexpert {step[0] + 1} of {count}", end="", file=sys.stderr, flush=True)
        yield step
    if shown:
        print(file=sys.stderr)
