"""The permutation of the fused kernels, and the check of one by its invariants."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds

from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.logits import distinct
from pytest_moe_routing.reference.permutation import check_permutation, permute
from pytest_moe_routing.reference.shard import Shard


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
        shard=Shard(offset, local),
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
        (permute(chosen, num_experts=16, shard=Shard(o, 4)).expanded_idx_to_permuted_idx >= 0).int()
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


def slots(wanted, chosen, alike):
    """Two local slots: of one token (`alike` is 0), or of one expert (1) and two tokens."""
    local = (wanted.expanded_idx_to_permuted_idx >= 0).nonzero().tolist()
    for one, other in itertools.combinations(local, 2):
        first, second = ((token, int(chosen[token, slot])) for token, slot in (one, other))
        if first[alike] == second[alike] and first[1 - alike] != second[1 - alike]:
            return tuple(one), tuple(other)
    raise AssertionError("there are no such slots")


def swap(rows, one, other):
    rows[one], rows[other] = rows[other].clone(), rows[one].clone()


def one_shared_row(rows, tokens, counts, one, other):
    rows[one] = rows[other]


def one_row_beyond(rows, tokens, counts, one, other):
    rows[one] = len(tokens) + 5


def one_slot_lost(rows, tokens, counts, one, other):
    rows[one] = -1


def one_token_lost(rows, tokens, counts, one, other):
    tokens[rows[one]] = -1


def swapped(rows, tokens, counts, one, other):
    swap(rows, one, other)


def one_more(rows, tokens, counts, one, other):
    counts[0] += 1


ONE_TOKEN, ONE_EXPERT = 0, 1
SHARED = "two slots share a row of the permuted buffer"
NOT_BACK = "the permuted buffer does not lead back to the slots' own tokens"


@pytest.mark.parametrize(
    ("broken", "alike", "problems"),
    [
        (one_slot_lost, ONE_TOKEN, ["1 slots are local and should not be, or the reverse"]),
        (one_shared_row, ONE_EXPERT, [SHARED, NOT_BACK]),
        (one_shared_row, ONE_TOKEN, [SHARED, "1 slots lie in another expert's segment"]),
        # Both rows lead back to the token, but the experts' weights would meet each other's rows.
        (swapped, ONE_TOKEN, ["2 slots lie in another expert's segment"]),
        (swapped, ONE_EXPERT, [NOT_BACK]),
        (one_token_lost, ONE_TOKEN, [NOT_BACK]),
        (one_more, ONE_TOKEN, ["tokens_per_expert: [0] is 4, not 3"]),
        (
            one_row_beyond,
            ONE_TOKEN,
            [
                "1 slots lie in another expert's segment",
                "1 slots lie beyond the padded size 64",
            ],
        ),
    ],
)
def test_broken_permutations_are_caught(broken, alike, problems):
    chosen = ids()
    wanted = permute(chosen, num_experts=16, shard=Shard(4, 8))
    parts = [
        part.clone()
        for part in (
            wanted.expanded_idx_to_permuted_idx,
            wanted.permuted_idx_to_token_idx,
            wanted.tokens_per_expert,
        )
    ]
    broken(*parts, *slots(wanted, chosen, alike))
    got = replace(
        wanted,
        expanded_idx_to_permuted_idx=parts[0],
        permuted_idx_to_token_idx=parts[1],
        tokens_per_expert=parts[2],
    )
    assert check_permutation(got, chosen, wanted) == problems


@pytest.mark.parametrize(("offset", "local"), [(-1, 4), (13, 4), (0, 17), (0, 0)])
def test_a_shard_outside_the_experts(offset, local):
    with pytest.raises(RecipeError, match=r"expected experts within 0\.\.15"):
        permute(ids(), num_experts=16, shard=Shard(offset, local))


@pytest.mark.parametrize("outside", [-1, 16, 17])
def test_one_id_outside_the_experts(outside):
    chosen = ids()
    chosen[3, 1] = outside
    with pytest.raises(RecipeError, match=r"outside 0\.\.15"):
        permute(chosen, num_experts=16)
