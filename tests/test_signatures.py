"""Entry points by release, against facts read off the packages by hand."""

from __future__ import annotations

import inspect

import pytest

from pytest_moe_routing.errors import DataError
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.flashinfer.signatures import _data, edited, enum, functions, parameters


@pytest.mark.parametrize("function", _data()["functions"])
def test_every_release_of_an_entry_point_has_a_valid_signature(function):
    for release in _data()["functions"][function]:
        found = FlashInfer.of(release).signature(function)
        names = [name.split("=")[0] for name in parameters(function, release) if name != "*"]
        assert list(found.parameters) == names


@pytest.mark.parametrize(
    ("release", "count"),
    [
        ("0.2.9", 3),
        ("0.2.10", 4),
        ("0.5.3", 6),
        ("0.6.0", 7),
        ("0.6.12", 12),
        ("0.6.18", 14),
        ("0.7.2", 17),
    ],
)
def test_how_many_entry_points_a_release_has(release, count):
    assert len(functions(release)) == count


def test_no_entry_point_before_its_time():
    assert FlashInfer.of("0.6.18").signature("trtllm_gen_routing") is None
    assert FlashInfer.of("0.7.0").signature("trtllm_gen_routing") is not None
    assert FlashInfer.of("0.7.0").signature("trtllm_nothing_moe") is None


def parameter(release, function, name):
    return FlashInfer.of(release).signature(function).parameters.get(name)


def test_order_and_defaults_move():
    """Positional callers break: inserted in the middle, removed, given another default."""
    block = "trtllm_fp8_block_scale_moe"
    places = {
        release: list(FlashInfer.of(release).signature(block).parameters).index("activation_type")
        for release in ("0.6.14", "0.6.15")
    }
    assert places == {"0.6.14": 23, "0.6.15": 24}
    tile = [
        parameter(r, "trtllm_fp4_block_scale_moe", "tile_tokens_dim")
        for r in ("0.4.0", "0.4.1", "0.5.3")
    ]
    assert [p.default for p in tile] == [8, None, inspect.Parameter.empty]
    assert parameter("0.6.0", "trtllm_fp4_block_scale_moe", "tile_tokens_dim") is None
    assert parameter("0.7.0", block, "gemm1_bias").kind is inspect.Parameter.KEYWORD_ONLY
    assert parameter("0.7.0", block, "gemm1_bias").default is None


def test_defaults_that_are_enum_members_are_their_numbers():
    assert parameter("0.6.5", "trtllm_fp8_block_scale_moe", "fp8_quantization_type").default == 1
    assert parameter("0.5.3", "trtllm_bf16_moe", "weight_layout").default == 2
    assert parameter("0.7.0", "trtllm_bf16_moe", "activation_type").default == 3


def test_enum_numbers_move():
    assert [enum("ActivationType", r).get("Identity") for r in ("0.4.1", "0.6.12", "0.6.13", "0.7.0")] == [
        None, 7, 8, 9,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "edits", [{"drop": "c"}, {"after c": "d"}, {"instead of c": "d"}, {"before a": "d"}, {"c": "d"}]
)
def test_edits_that_cannot_be(edits):
    with pytest.raises(DataError, match=r"signatures.yaml, f at 1\.0: "):
        edited(["a", "b=1"], edits, "f at 1.0")


def test_edits_apply_in_order():
    edits = {"drop": "c", "instead of b": "b=2", "after b": "c, d"}
    assert edited(["a", "b=1", "c=1"], edits, "f") == ["a", "b=2", "c", "d"]
