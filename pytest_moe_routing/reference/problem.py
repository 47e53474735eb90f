"""What determines the output of a fused MoE."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from pytest_moe_routing.errors import LayerError
from pytest_moe_routing.reference.moe import MoELayer
from pytest_moe_routing.reference.quantization import Quantized, quantize
from pytest_moe_routing.reference.routing import Routing, route
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.reference.weights import Experts
from pytest_moe_routing.routing.recipe import Recipe


@dataclass(frozen=True)
class MoEProblem:
    """Everything that determines a fused MoE's output.

    Attributes:
        hidden: `[num_tokens, hidden_size]` in the scheme's input format.
        experts: The weights of all experts, by index.
        layer: Scheme, activation and the side of the router weights.
        routing: Experts and weights of every token, `[num_tokens, top_k]`.
        recipe, logits, bias: Where the routing comes from, if it was not given to the kernel;
            defects of routing are looked for only then.
        shard: The experts of this rank.
    """

    hidden: Quantized
    experts: Experts
    layer: MoELayer
    routing: Routing
    recipe: Recipe | None = None
    logits: Tensor | None = None
    bias: Tensor | None = None
    shard: Shard | None = None

    @classmethod
    def of(
        cls,
        hidden: Tensor | Quantized,
        experts: Experts,
        layer: MoELayer,
        routing: Routing | None = None,
        *,
        recipe: Recipe | None = None,
        logits: Tensor | None = None,
        bias: Tensor | None = None,
        shard: Shard | None = None,
    ) -> MoEProblem:
        """Make a problem from a routing, or from the recipe and the logits that give one.

        Args:
            hidden: Hidden states `[num_tokens, hidden_size]`: floating, to be quantized as the
                scheme does, or already in the scheme's input format.
            experts: The weights of all experts, `[num_experts]` in the checkpoint's order.
            layer: Scheme, activation and the side of the router weights.
            routing: Experts and weights `[num_tokens, top_k]` that the kernel was given.
            recipe: How the kernel routes by itself; it decides the side of the router weights.
            logits: Router logits, floating `[num_tokens, num_experts]`.
            bias: `e_score_correction_bias`, floating `[num_experts]`, if the recipe has a bias.
            shard: The experts of this rank; by default all.

        Raises:
            LayerError: There is neither a routing nor a recipe with logits.
            RecipeError: Logits or bias do not fit the recipe.
        """
        if isinstance(hidden, Tensor):
            hidden = quantize(hidden, layer.storage.input)
        if recipe is not None:
            layer = replace(layer, weight_on=recipe.weight_on)
        if routing is None:
            if recipe is None or logits is None:
                raise LayerError(
                    "found neither a routing nor a recipe with logits, expected one of the two"
                )
            routing = route(logits, recipe, bias)
        return cls(hidden, experts, layer, routing, recipe, logits, bias, shard)

    def take(self, tokens: Tensor) -> MoEProblem:
        """Return the same problem for some of its tokens, integers `[n]`."""
        routing = Routing(self.routing.topk_ids[tokens], self.routing.topk_weights[tokens])
        logits = None if self.logits is None else self.logits[tokens]
        return replace(self, hidden=take_rows(self.hidden, tokens), routing=routing, logits=logits)


def take_rows(hidden: Quantized, tokens: Tensor) -> Quantized:
    """Return some rows of quantized hidden states, whose blocks are one row high or the whole."""
    scales, overall = hidden.scales, hidden.global_scale
    if scales is not None and hidden.format.block[0] == 1:
        scales = scales[tokens]
    if overall is not None and hidden.format.by_row:
        overall = overall[tokens]
    return replace(hidden, data=hidden.data[tokens], scales=scales, global_scale=overall)
