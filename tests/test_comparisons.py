"""Each comparison of the GPU suite, and each stage of the simulator, has a fault of its own.

The suite's test passes on kernels with the fault if one comparison is left out, and that comparison
saw the fault: nothing else did.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from test_faults import run

from pytest_moe_routing.reference.routing import Routing, route
from pytest_moe_routing.simulator.faults import FAULTS
from pytest_moe_routing.simulator.stages import Fault, Stage
from pytest_moe_routing.suite import test_gpu_moe
from pytest_moe_routing.suite.fused import Fused
from pytest_moe_routing.suite.gpu import Compared
from pytest_moe_routing.suite.test_gpu_routing import Routed


def next_token(rows, c):
    """Rows that are not summed are those of the next token."""
    return rows if c.given["do_finalize"] else rows.roll(1, 0)


def as_float32(weights, _):
    return weights.to(torch.float32)


def local_numbers(result, c):
    """Experts are numbered as on their rank."""
    ids = result.topk_ids
    result.topk_ids = ids.where(ids < 0, ids - c.shard.local_expert_offset)
    return result


def other_rows(result, _):
    """Rows are said to hold the tokens of others."""
    result.permuted_idx_to_token_idx = result.permuted_idx_to_token_idx.flip(0)
    return result


def forgotten(x, c):
    """Weights of other ranks' experts are 0."""
    routing = route(x.logits, x.recipe, x.bias)
    local = routing.topk_ids - c.shard.local_expert_offset
    mine = (local >= 0) & (local < c.shard.local_num_experts)
    return Routing(routing.topk_ids, routing.topk_weights * mine)


RANK = "test_gpu_routing.py::test_expert_parallel_shard[qwen3-235b-a22b-8-1]"
SCHEME = "test_gpu_moe.py::test_scheme[bf16-silu]"

#: Faults that no report is known of.
OWN = {
    fault.name: fault
    for fault in (
        Fault("next-token", Stage.ROWS, next_token, "", "", SCHEME),
        Fault("as-float32", Stage.LABEL, as_float32, "", "", SCHEME),
        Fault("other-rows", Stage.RESULT, other_rows, "", "", RANK),
        Fault("local-numbers", Stage.RESULT, local_numbers, "", "", RANK),
        Fault("forgotten", Stage.ROUTE, forgotten, "", "", RANK),
    )
}

#: Faults by the comparison that alone sees them.
ALONE = (
    (Compared.CHOICE, "no-sum"),
    (Compared.LABEL, "as-float32"),
    (Compared.PERMUTATION, "other-rows"),
    (Compared.LOCAL_EXPERTS, "local-numbers"),
    (Compared.LOCAL_WEIGHTS, "forgotten"),
    (Compared.OUTPUT, "shared-scaled"),
    (Compared.OUTPUT, "transposed-input-scales"),
    (Compared.OUTPUT, "unclamped"),
    (Compared.OUTPUT, "global-index"),
    (Compared.OUTPUT, "zeros-off-rank-0"),
    (Compared.SUM, "next-token"),
    (Compared.TWIN, "packed-small-batch"),
    (Compared.TWIN, "scaled-again"),
    (Compared.TACTIC, "tuned-scales"),
)

#: Stages whose faults several comparisons see, and why.
SEVERAL = {
    Stage.LAUNCHED: "without a kernel nothing is written: experts, weights and permutation",
    Stage.SHARD: "the operator's experts are those of the permutation",
}


@dataclass
class LeftOut:
    """One comparison that does not fail, and whether it would have."""

    compared: Compared
    seen: bool = False

    def of_fused(self, expect):
        def left_out(layer, compared, ok, *rest):
            if compared != self.compared:
                expect(layer, compared, ok, *rest)
            else:
                self.seen |= not ok

        return left_out

    def of_routed(self, expect):
        def left_out(routed, num_tokens, problems, *rest, **shard):
            self.seen |= bool(problems.pop(self.compared, ()))
            expect(routed, num_tokens, problems, *rest, **shard)

        return left_out


@pytest.mark.parametrize(("compared", "name"), ALONE, ids=lambda x: getattr(x, "name", x))
def test_only_one_comparison_sees(pytester, monkeypatch, compared, name):
    monkeypatch.setattr("pytest_moe_routing.simulator.faults.FAULTS", {**FAULTS, **OWN})
    # The faults are seen in small batches.
    monkeypatch.setattr(test_gpu_moe, "TOKENS", (1, 5))
    left_out = LeftOut(compared)
    monkeypatch.setattr(Fused, "expect", left_out.of_fused(Fused.expect))
    monkeypatch.setattr(Routed, "expect", left_out.of_routed(Routed.expect))
    fault = {**FAULTS, **OWN}[name]
    run(pytester, f"simulator:{name}", fault.test).assert_outcomes(passed=1)
    assert left_out.seen


def test_every_comparison_and_stage_has_a_fault():
    faults: Mapping[str, Fault] = {**FAULTS, **OWN}
    assert {compared for compared, _ in ALONE} == set(Compared)
    assert {faults[name].stage for _, name in ALONE} | set(SEVERAL) == set(Stage)
