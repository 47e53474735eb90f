"""Where a fault can change what a simulated kernel does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.shard import Shard


class Stage(Enum):
    """A place in the simulator, by the value that a fault changes there."""

    #: `Inputs`: logits, recipe and bias, before they are routed.
    INPUTS = auto()
    #: `Inputs`, to a `Routing`; None stands for the right one.
    ROUTE = auto()
    #: bool: whether a kernel is launched that writes the routing.
    LAUNCHED = auto()
    #: `Routing` with the slots of fused shared experts.
    SHARED = auto()
    #: `Shard` that the permutation is made for.
    SHARD = auto()
    #: What the standalone routing operator returns, a namespace.
    RESULT = auto()
    #: The entry point's arguments by name.
    ARGUMENTS = auto()
    #: `Memory`: how weights lie in memory.
    MEMORY = auto()
    #: Real block scales of the hidden states.
    INPUT_SCALES = auto()
    #: int32 `topk_ids` with packed weights.
    PACKED = auto()
    #: Index of each slot's expert within the shard.
    LOCAL = auto()
    #: Each slot's expert output, `[tokens, top_k, hidden]`.
    ROWS = auto()
    #: Router weights returned without finalization.
    LABEL = auto()
    #: Router weights that rows are multiplied by.
    FINALIZE = auto()
    #: The layer's output, `[tokens, hidden]`.
    OUTPUT = auto()


@dataclass
class Context:
    """The call that a fault happens in.

    Attributes:
        given: The entry point's arguments.
        scheme: The quantization, or `routing` for the standalone operator.
        tuning: Whether tactics are being tried out.
        routing: Where the tokens went, once known.
        routed: Whether the caller chose the experts.
        shared: How many fused shared experts follow the routed ones; the shard holds them too.
    """

    given: dict[str, Any]
    scheme: str
    method: str
    num_experts: int
    top_k: int
    shard: Shard
    tuning: bool = False
    routing: Routing | None = None
    routed: bool = False
    shared: int = 0


@dataclass(frozen=True)
class Fault:
    """One way in which kernels have been wrong.

    Attributes:
        name: Its key in `FAULTS`.
        stage: Where in the simulator the change is made.
        change: From what is right there, and the call, to what is wrong.
        what: In words, for tables and diagnoses.
        imitates: The public report.
        test: The suite's test that is known to catch it.
    """

    name: str
    stage: Stage
    change: Callable[[Any, Context], Any]
    what: str
    imitates: str
    test: str
