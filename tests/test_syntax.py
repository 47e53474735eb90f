"""Sources are parsed without the collector, which stays as it was."""

from __future__ import annotations

import ast
import gc

import pytest

from pytest_moe_routing.syntax import parse

SOURCE = "x = [1, 2, {3: (4, 5)}]\n" * 1000


@pytest.fixture
def collections():
    """Generations that the collector has looked at."""
    found = []

    def note(phase, info):
        found.append(info["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


def test_the_collector_looks_at_a_syntax_tree_once_and_not_while_it_grows(collections):
    gc.collect()
    collections.clear()
    tree = parse(SOURCE)
    looks = len(collections)
    assert ast.dump(tree) == ast.dump(ast.parse(SOURCE))
    assert looks <= 2
    assert len(collections) > 10 * looks


@pytest.mark.parametrize("source", [SOURCE, "x ="])
@pytest.mark.parametrize("is_on", [True, False])
def test_the_collector_stays_as_it_was(source, is_on):
    before = gc.isenabled()
    (gc.enable if is_on else gc.disable)()
    try:
        parse(source)
    except SyntaxError:
        assert source != SOURCE
    finally:
        after = gc.isenabled()
        (gc.enable if before else gc.disable)()
    assert after == is_on
