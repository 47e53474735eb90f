"""Small tensors are computed with one thread, and the threads of whoever asks come back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pytest_moe_routing.compare import equivalence
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_model
from pytest_moe_routing.reference.threads import one_thread
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.suite import routings

MODEL = load_model(packaged_directory() / "mixtral-8x7b")


@pytest.fixture(autouse=True)
def _four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    assert torch.get_num_threads() == 4
    torch.set_num_threads(before)


def test_an_error_ends_it_as_well():
    @one_thread()
    def fail():
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def noting(monkeypatch, module, name):
    """The number of threads of each call of a function."""
    noted, called = [], getattr(module, name)

    def note(*arguments, **named):
        noted.append(torch.get_num_threads())
        return called(*arguments, **named)

    monkeypatch.setattr(module, name, note)
    return noted


def test_goldens_and_counterexamples_are_computed_with_one(monkeypatch):
    noted = noting(monkeypatch, routings, "route")
    routings.routing_payload(MODEL)
    assert set(noted) == {1}
    noted = noting(monkeypatch, equivalence, "_token")
    recipe = recipe_of(MODEL.router)
    assert equivalence.counterexample(recipe, replace(recipe, top_k=1), 8)
    assert set(noted) == {1}
