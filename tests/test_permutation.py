"""The permutation of the fused kernels, and the check of one by its invariants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds

from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.logits import distinct
from pytest_moe_routing.reference.permutation import check_permutation, permute


def ids(num_tokens=12, num_experts=16, top_k=4, seed=1):
    return distinct(num_tokens, num_experts, seed=seed)[:, :top_k]


@settings(max_examples=100, deadline=None)
@given(seeds, st.sampled_from([1, 4, 8]), st.integers(1, 4), st.integers(0, 3))
def test_every_slot_leads_to_its_token_within_its_experts_segment(seed, tile, shards, rank):
    chosen, rank = ids(seed=seed), min(rank, shards - 1)
    local = 16 // shards
    offset = rank * local
    got = permute(
        chosen,
        num_experts=16,
        tile_tokens_dim=tile,
        local_expert_offset=offset,
        local_num_experts=local,
    )
    rows_used = set()
    for token, experts in enumerate(chosen.tolist()):
        for slot, expert in enumerate(experts):
            row = int(got.expanded_idx_to_permuted_idx[token, slot])
            if not offset <= expert < offset + local:
                assert row == -1
                continue
            start, end = got.segment_starts[expert - offset : expert - offset + 2].tolist()
            assert start <= row < end
            assert got.permuted_idx_to_token_idx[row] == token
            rows_used.add(row)
    assert len(rows_used) == int(got.tokens_per_expert.sum())
    assert all(start % tile == 0 for start in got.segment_starts.tolist())
    assert int((got.permuted_idx_to_token_idx == -1).sum()) == len(
        got.permuted_idx_to_token_idx
    ) - len(rows_used)


def test_shards_hold_every_slot_exactly_once():
    chosen = ids()
    held = sum(
        (
            permute(
                chosen, num_experts=16, local_expert_offset=o, local_num_experts=4
            ).expanded_idx_to_permuted_idx
            >= 0
        ).int()
        for o in (0, 4, 8, 12)
    )
    assert torch.equal(held, torch.ones_like(held))


def test_another_order_within_a_segment_is_as_good():
    chosen = torch.zeros(3, 1, dtype=torch.int64)
    wanted = permute(chosen, num_experts=2)
    rows = torch.tensor([[2], [0], [1]])
    tokens = wanted.permuted_idx_to_token_idx.clone()
    tokens[rows.flatten()] = torch.arange(3)
    got = replace(wanted, expanded_idx_to_permuted_idx=rows, permuted_idx_to_token_idx=tokens)
    assert check_permutation(got, chosen, wanted) == []


def broken(name):
    chosen = ids()
    wanted = permute(chosen, num_experts=16, local_expert_offset=4, local_num_experts=8)
    rows = wanted.expanded_idx_to_permuted_idx.clone()
    tokens = wanted.permuted_idx_to_token_idx.clone()
    counts = wanted.tokens_per_expert.clone()
    first, second = (rows >= 0).nonzero()[:2].tolist()
    if name == "slot lost":
        rows[tuple(first)] = -1
    elif name == "row shared":
        rows[tuple(first)] = rows[tuple(second)]
    elif name == "other segment":
        rows[tuple(first)], rows[tuple(second)] = (
            rows[tuple(second)].clone(),
            rows[tuple(first)].clone(),
        )
        tokens = torch.full_like(tokens, -1)
    elif name == "token lost":
        tokens[rows[tuple(first)]] = -1
    elif name == "count":
        counts[0] += 1
    elif name == "beyond":
        rows[tuple(first)] = len(tokens) + 5
    got = replace(
        wanted,
        expanded_idx_to_permuted_idx=rows,
        permuted_idx_to_token_idx=tokens,
        tokens_per_expert=counts,
    )
    return check_permutation(got, chosen, wanted)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("slot lost", "slots are local that should not be"),
        ("row shared", "two slots share a row"),
        ("other segment", "do not lead back|another expert's segment|lead back"),
        ("token lost", "lead back"),
        ("count", r"tokens_per_expert: \[\d+\] is (\d+), not \d+"),
        ("beyond", "beyond the padded size"),
    ],
)
def test_broken_permutations_are_caught(name, text):
    import re

    assert re.search(text, "; ".join(broken(name)))


@pytest.mark.parametrize(("offset", "local"), [(-1, 4), (13, 4), (0, 17), (0, 0)])
def test_a_shard_outside_the_experts(offset, local):
    with pytest.raises(RecipeError, match="expected a range within 16 experts"):
        permute(ids(), num_experts=16, local_expert_offset=offset, local_num_experts=local)


def test_ids_outside_the_experts():
    with pytest.raises(RecipeError, match=r"outside 0\.\.7"):
        permute(ids(), num_experts=8)
