"""What a kernel is given of the activations is read once for each number of tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pytest_moe_routing.targets import marked
from pytest_moe_routing.targets.vllm.probe import prepared

ROW = SimpleNamespace(quantized=("bfloat16", None, 1, None))


@pytest.fixture
def reads(monkeypatch):
    """The number of tokens of each reading."""
    noted = []
    monkeypatch.setattr(prepared, "_RIGHT", {})
    read = marked.activations
    monkeypatch.setattr(
        marked, "activations", lambda got, scale: noted.append(len(got)) or read(got, scale)
    )
    return noted


def misread(hidden, got):
    return prepared.misread({"hidden_states": got, "hidden_states_scale": None}, ROW, hidden)


def test_numbers_of_tokens_in_turn_are_read_once(reads):
    for _ in range(3):
        for tokens in (4, 1, 5):
            hidden = torch.ones(tokens, 8, dtype=torch.bfloat16)
            assert misread(hidden, hidden.clone()) == ()
    assert reads == [4, 1, 5]


def test_other_values_are_read_again_and_are_wrong(reads):
    hidden = torch.ones(4, 8, dtype=torch.bfloat16)
    assert misread(hidden, hidden.clone()) == ()
    for got in (hidden * 2, hidden[:, :4]):
        assert misread(hidden, got) == ("hidden_states", "the layer's values", "other values")
    assert reads == [4, 4, 4]
    # What the layer has may change as well.
    assert misread(hidden * 2, hidden * 2) == ()
    assert reads == [4, 4, 4, 4]
