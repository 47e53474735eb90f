"""What a marked checkpoint has: scales that are numbers of their own differ, and are followed."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from pytest_moe_routing.targets import marked_checkpoint
from pytest_moe_routing.targets.marked_checkpoint import MarkedCheckpoint, Padded
from pytest_moe_routing.targets.marked_weights import orders
from pytest_moe_routing.targets.scales import GIVEN

EXPERTS = 8
LIKE = torch.empty(64, 32)


def loaded(*, are_apart=True, name="w13_weight_scale", **fields):
    """A checkpoint of FP8 weights, and what it has of each expert's scales, by part."""
    checkpoint = MarkedCheckpoint(**fields)
    for part in ("w1", "w3"):
        checkpoint.make("w13_weight", part, EXPERTS, LIKE.to(torch.float8_e4m3fn))
    made = {
        part: checkpoint.make_factors(name, part, EXPERTS, are_apart=are_apart)
        for part in ("w1", "w3")
    }
    return checkpoint, {part: torch.stack(scales).tolist() for part, scales in made.items()}


def test_halves_of_an_expert_have_scales_of_their_own():
    _, made = loaded()
    assert all(one != other for one, other in zip(*made.values(), strict=True))
    assert len({*made["w1"][:4]}) == len({*made["w3"][:4]}) == 4
    # Either half has the larger one, which is the one that kernels are given.
    assert {*map(max, made["w1"], made["w3"])} == {*GIVEN["w1_scale"]}
    assert {one > other for one, other in zip(*made.values(), strict=True)} == {True, False}


@pytest.mark.parametrize("larger", ["w1", "w3"])
def test_the_largest_scale_of_an_input_is_in_either_half(larger):
    _, made = loaded(name="w13_input_scale", larger=larger)
    assert max(max(each) for each in made.values()) == max(made[larger]) == GIVEN["a1_scale"][0]
    assert max(min(each) for each in made.values()) < GIVEN["a1_scale"][0]


@pytest.mark.parametrize("name", ["w13_weight_global_scale", "w13_input_global_scale"])
def test_a_factor_that_values_were_multiplied_by_is_inverse(name):
    _, made = loaded(name=name)
    _, usual = loaded(name=name.replace("global_", ""))
    for part, expert in product(made, range(EXPERTS)):
        assert made[part][expert] == pytest.approx(1 / usual[part][expert])


def test_rows_of_one_scale_have_the_values_of_the_checkpoint():
    checkpoint, made = loaded()
    given = {
        "output1_scales_gate_scalar": torch.tensor(GIVEN["w1_scale"]),
        "output1_scales_scalar": torch.tensor(GIVEN["w1_scale"]) / GIVEN["a2_scale"][0],
    }
    tied = checkpoint.as_given(given)
    assert tied.halves_apart() == {}
    for expert in range(EXPERTS):
        values = checkpoint.matrix("w13_weight", expert, Padded()).float()
        values[:64] *= made["w1"][expert]
        values[64:] *= made["w3"][expert]
        larger = max(made["w1"][expert], made["w3"][expert])
        assert torch.equal(tied.matrix("w13_weight", expert, Padded()).float() * larger, values)


def test_rows_of_two_scales_are_those_of_the_checkpoint():
    checkpoint, made = loaded()
    given = {
        "output1_scale_gate_scalar": torch.tensor(made["w1"]),
        "output1_scale_scalar": torch.tensor(made["w3"]) / GIVEN["a2_scale"][0],
    }
    apart = checkpoint.as_given(given)
    assert apart.halves_apart() == made
    assert torch.equal(
        apart.matrix("w13_weight", 0, Padded()).view(torch.uint8),
        torch.cat([apart.parts["w13_weight"][part][0].view(torch.uint8) for part in made]),
    )


@pytest.mark.parametrize(
    ("dtype", "cast"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.float8_e4m3fn, torch.float8_e5m2),
    ],
)
def test_a_cast_of_block_scales_shows(dtype, cast):
    (scales, *_) = MarkedCheckpoint().make("w2_weight_scale", "w2", 1, LIKE.to(dtype))
    assert (scales.float() != scales.to(cast).float()).float().mean() > 0.4


def test_scales_keep_their_bits_whatever_the_default_dtype():
    """SGLang makes its layers with bfloat16 as torch's default."""
    before = torch.get_default_dtype()
    marked_checkpoint._values.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        scales = marked_checkpoint._values(torch.float32, is_scale=True)
    finally:
        torch.set_default_dtype(before)
        marked_checkpoint._values.cache_clear()
    assert (scales != scales.bfloat16().float()).float().mean() > 0.4


def test_float32_scales_are_as_small_as_those_of_weights():
    (scales, *_) = MarkedCheckpoint().make("w2_weight_scale", "w2", 1, LIKE)
    assert scales.min() < 1e-6 < 1 < scales.max()


def test_a_half_that_keeps_its_own_scale_is_found():
    checkpoint = MarkedCheckpoint()
    made = {
        part: checkpoint.make("w13_weight", part, EXPERTS, LIKE.to(torch.float8_e4m3fn))
        for part in ("w1", "w3")
    }
    checkpoint.make("w2_weight", "w2", EXPERTS, torch.empty(32, 64).to(torch.float8_e4m3fn))
    for part in made:
        checkpoint.make_factors("w13_weight_scale", part, EXPERTS, are_apart=True)
    rows = torch.stack([torch.cat([up, gate]) for gate, up in zip(*made.values(), strict=True)])
    call = {
        "gemm1_weights": rows,
        "gemm2_weights": torch.stack(checkpoint.parts["w2_weight"]["w2"]),
        "use_shuffled_weight": 0,
        "weight_layout": 0,
    }
    assert orders("fp8_per_tensor", call, checkpoint, gated=True) == []
    tied = checkpoint.as_given({})
    (wrong,) = orders("fp8_per_tensor", call, tied, gated=True)
    assert (wrong["name"], wrong["found"]) == ("gemm1_weights", None)
