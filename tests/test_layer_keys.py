"""Counts, widths and lists of layers in a config: each has a range, and one error for the rest."""

from __future__ import annotations

import pytest
from configs import R1, read
from test_layers import QWEN

from pytest_moe_routing.errors import ModelError


@pytest.mark.parametrize("key", ["mlp_only_layers", "moe_layers"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([-1], r"\.0: found -1, expected the index of a layer, an integer >= 0 and <= 5$"),
        ([1, 6], r"\.1: found 6, expected the index of a layer, an integer >= 0 and <= 5$"),
        (["0"], r'\.0: found "0", expected the index of a layer'),
        ([1.0], r"\.0: found 1\.0, expected the index of a layer"),
        ([True], r"\.0: found true, expected the index of a layer"),
        ([[1]], r"\.0: found a list, expected the index of a layer"),
        ([1, 2, 1], r"\.2: found 1, expected each layer once$"),
        ("0", r': found "0", expected a list$'),
        (3, ": found 3, expected a list$"),
    ],
)
def test_lists_of_layers(tmp_path, key, value, message):
    with pytest.raises(ModelError, match=key + message):
        read(tmp_path, {**QWEN, key: value})
    assert read(tmp_path, {**QWEN, key: None}).router


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 1], "moe_layer_freq: found 2 values, expected one for each of 6 layers"),
        ([8] * 6, r"moe_layer_freq\.0: found 8, expected an integer >= 0 and <= 1"),
        ([0, 1, -1, 1, 1, 1], r"moe_layer_freq\.2: found -1, expected an integer"),
        ([0, 1, "1", 1, 1, 1], r'moe_layer_freq\.2: found "1", expected an integer'),
        ([], "moe_layer_freq: found an empty list, expected an integer"),
        ([0] * 6, "the model has no experts: each of its 6 layers is dense"),
    ],
)
def test_frequencies_by_layer(tmp_path, value, message):
    with pytest.raises(ModelError, match=message):
        read(tmp_path, {**QWEN, "moe_layer_freq": value})
    flags = [False, True, True, True, True, True]
    assert [g.layers for g in read(tmp_path, {**QWEN, "moe_layer_freq": flags}).layers] == ["0"]


@pytest.mark.parametrize(
    ("key", "most"),
    [
        *[(key, 4096) for key in ("num_hidden_layers", "decoder_sparse_step", "n_layers")],
        *[(key, 2**20) for key in ("hidden_size", "moe_intermediate_size")],
        *[(key, 2**16) for key in ("n_routed_experts", "num_experts_per_tok", "n_group")],
        ("n_shared_experts", 1024),
    ],
)
def test_absurd_counts(tmp_path, key, most):
    for value in (most + 1, 10**9):
        with pytest.raises(ModelError) as caught:
            read(tmp_path, {**R1, key: value})
        text = str(caught.value)
        assert f"{key}: found {value}, expected an integer >= " in text
        assert f" and <= {most}" in text
    with pytest.raises(ModelError, match=rf"{key}: found a list, expected an integer|no experts"):
        read(tmp_path, {**R1, key: [[6]]})


@pytest.mark.parametrize("value", [0, 8.0, True, {"a": 1}, ["softmax", 1]])
def test_a_key_that_the_class_ignores_has_its_type(tmp_path, value):
    with pytest.raises(ModelError, match=r"scoring_func: found .*, expected one of softmax, sigmo"):
        read(tmp_path, {**R1, "scoring_func": value})


@pytest.mark.parametrize("key", ["moe_layer_start_index", "moe_layer_end_index"])
def test_indices_of_each_kind_of_token(tmp_path, key):
    """ERNIE's vision models list the first and last layer with experts, for text and for images."""
    assert read(tmp_path, {**QWEN, key: [3, 5]}).num_layers == 6
    with pytest.raises(ModelError, match=rf'{key}\.1: found "5", expected an integer'):
        read(tmp_path, {**QWEN, key: [3, "5"]})


def test_an_empty_list_of_layers_states_nothing(tmp_path):
    assert read(tmp_path, {**QWEN, "moe_layers": []}).layers == ()


def test_more_kinds_than_layers(tmp_path):
    """The layers after the model's last one predict further tokens."""
    kinds = ["dense", *["sparse"] * 5, "dense", "sparse"]
    spec = read(tmp_path, {**QWEN, "mlp_layer_types": kinds})
    assert spec.num_layers == 6
    assert [group.as_dict() for group in spec.layers] == [{"layers": "0", "kind": "dense"}]


def test_layers_with_experts_of_an_unknown_number_of_layers(tmp_path):
    config = {key: value for key, value in QWEN.items() if key != "num_hidden_layers"}
    assert read(tmp_path, {**config, "moe_layers": [1, 2]}).num_layers is None
    stepped = read(tmp_path, {**config, "decoder_sparse_step": 2, "moe_layer_end_index": 4})
    assert (stepped.num_layers, stepped.layers) == (None, ())
    assert "one layer in 2 is a mixture of experts (decoder_sparse_step)" in stepped.notes
