"""What the golden of a model's routing is compared with."""

from __future__ import annotations

import copy

import pytest

from pytest_moe_routing.data import packaged_directory
from pytest_moe_routing.models import load_named
from pytest_moe_routing.suite import routings

MODEL = load_named("mixtral-8x7b", packaged_directory())


@pytest.fixture
def compared(monkeypatch):
    """Routings that the reference is asked about."""
    noted, compare = [], routings.compare_routing
    monkeypatch.setattr(
        routings,
        "compare_routing",
        lambda ids, *rest, **options: noted.append(ids.tolist()) or compare(ids, *rest, **options),
    )
    return noted


def plain(golden=None):
    """The experts and weights for logits without NaN, which equal nothing."""
    return routings.routing_payload(MODEL, golden)["patterns"]["plain"]


def test_a_golden_with_the_same_experts_is_not_asked_about(compared):
    golden = routings.routing_payload(MODEL)
    assert plain(copy.deepcopy(golden)) == golden["patterns"]["plain"]
    assert compared == []


def test_experts_that_differ_are_taken_only_if_they_are_as_right(compared):
    golden = routings.routing_payload(MODEL)
    other = copy.deepcopy(golden)
    token = other["patterns"]["plain"][0]
    token["experts"] = token["experts"][::-1]
    token["weights"] = token["weights"][::-1]
    assert plain(other) == other["patterns"]["plain"]
    wrong = copy.deepcopy(golden)
    first = wrong["patterns"]["plain"][0]["experts"]
    first[1] = next(e for e in range(8) if e not in first)
    assert plain(wrong) == golden["patterns"]["plain"]
    assert len(compared) == 2
