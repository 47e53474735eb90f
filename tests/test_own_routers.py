"""The references of routers that no recipe expresses, against transformers' own."""

from __future__ import annotations

import pytest
import torch

from pytest_moe_routing.reference.own_routers import OWN_ROUTERS

EXPERTS, TOP_K, HIDDEN = 16, 4, 16
LOGITS = torch.randn(32, EXPERTS, generator=torch.Generator().manual_seed(1))
EACH = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(2))


def dense(ids, weights):
    return torch.zeros(len(ids), EXPERTS).scatter_add(1, ids, weights)


def test_scales_of_experts_are_those_of_gemma_4():
    gemma4 = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
    config = gemma4.Gemma4TextConfig(
        hidden_size=HIDDEN, num_experts=EXPERTS, top_k_experts=TOP_K, enable_moe_block=True
    )
    router = gemma4.Gemma4TextRouter(config)
    router.per_expert_scale.data.copy_(EACH)
    router.proj = torch.nn.Identity()
    router.norm = torch.nn.Identity()
    router.scalar_root_size = 1.0
    _, weights, ids = router(LOGITS)
    choice = OWN_ROUTERS["Gemma4ForConditionalGeneration"].route(LOGITS, EACH, EXPERTS, TOP_K)
    torch.testing.assert_close(dense(choice.ids, choice.weights), dense(ids, weights))
    assert not choice.unchanged.any()


def test_zero_experts_are_those_of_longcat_flash():
    longcat = pytest.importorskip("transformers.models.longcat_flash.modeling_longcat_flash")
    config = longcat.LongcatFlashConfig(
        hidden_size=HIDDEN,
        n_routed_experts=10,
        zero_expert_num=EXPERTS - 10,
        moe_topk=TOP_K,
        routed_scaling_factor=1.0,
    )
    router = longcat.LongcatFlashTopkRouter(config)
    router.classifier.weight.data.copy_(torch.eye(EXPERTS))
    router.e_score_correction_bias.copy_(EACH / 8)
    _, weights, ids = router(LOGITS)
    choice = OWN_ROUTERS["LongcatFlashForCausalLM"].route(LOGITS, EACH / 8, 10, TOP_K)
    is_zero = ids >= 10
    wanted = dense(ids, weights.masked_fill(is_zero, 0.0))
    torch.testing.assert_close(dense(choice.ids, choice.weights), wanted)
    torch.testing.assert_close(choice.unchanged, weights.masked_fill(~is_zero, 0.0).sum(-1))
    assert is_zero.any()
