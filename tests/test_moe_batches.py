"""The MoE reference on a GPU runs experts together; the joining itself needs no GPU."""

from dataclasses import replace

import pytest
import torch

from pytest_moe_routing.logits import bell, distinct
from pytest_moe_routing.reference import moe as reference
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.reference.weights import GeneratedExperts, static_scale
from pytest_moe_routing.schemes import storage_of


@pytest.mark.parametrize("stacked", [0, 1 << 27], ids=["apart", "stacked"])
@pytest.mark.parametrize("scheme", ["nvfp4", "bf16"])
def test_experts_that_are_run_together_give_what_each_gives(scheme, stacked, monkeypatch):
    # A GPU runs as many experts at once as fit; a CPU one at a time. Biases, weights on the input
    # and ranks must stay with their experts, and experts get rows of padding.
    storage = storage_of(scheme)
    experts = GeneratedExperts(
        8,
        128,
        128,
        storage.weight,
        biases=True,
        intermediate_scale=static_scale(storage.intermediate),
    )
    ids = distinct(9, 8, seed=2)[:, :4].contiguous()
    routing = Routing(ids, bell(9, 4, seed=4))
    hidden = bell(9, 128, seed=1)
    joined, run = [], reference.run_experts

    def noted(x, batch, *rest):
        joined.append((len(batch), len({count for _, count in batch})))
        return run(x, batch, *rest)

    monkeypatch.setattr(reference, "_STACKED", stacked)
    for weight_on in ("output", "input"):
        layer = reference.MoELayer.of(scheme, "swigluoai", weight_on)
        for shard in (None, Shard(2, 4)):
            alone = reference.moe(hidden, experts, routing, layer, shard=shard)
            with monkeypatch.context() as gpu:
                gpu.setattr(reference, "_launches_cost", lambda x: True)
                gpu.setattr(reference, "run_experts", noted)
                together = reference.moe(hidden, experts, routing, layer, shard=shard)
            # The sum over experts has another order.
            torch.testing.assert_close(together, alone, rtol=2**-7, atol=1e-3)
            assert (together == alone).float().mean() > 0.95
    assert [count for count, _ in joined] == [8, 4, 8, 4]
    assert all((sizes == 1) == bool(stacked) for _, sizes in joined)


def test_batches_keep_to_their_size_and_to_one_intermediate_scale(monkeypatch):
    made = GeneratedExperts(6, 128, 128, "bf16")
    scales = [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    experts = [replace(made[e], intermediate_scale=scale) for e, scale in enumerate(scales)]
    # gemm1 has 256 rows: three tokens of 256 numbers.
    monkeypatch.setattr(reference, "_BATCH", 3 * 256)
    found = reference._batches([(0, 1), (1, 1), (2, 1), (3, 2), (4, 1), (5, 3)], experts, True)
    assert [[count for _, count in batch] for batch in found] == [[1, 1], [1, 2], [1], [3]]
