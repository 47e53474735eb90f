"""What the fixture `_moe_golden` does: compare with a golden, or rewrite it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pytest_moe_routing import goldens
from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.models import ModelSpec


def compare(model: ModelSpec, name: str, data: dict[str, Any]) -> None:
    """Fail the test unless the data is what the model's golden says."""
    __tracebackhide__ = True
    path = goldens.golden_path(model.folder, name)
    try:
        found = list(goldens.differences(goldens.read(path), data))
    except MoERoutingError as error:
        found = [str(error)]
    if found:
        pytest.fail(goldens.disagreement(path, found, str(model)), pytrace=False)


def update(
    request: pytest.FixtureRequest, name: str, data: dict[str, Any], check: Callable[[], None]
) -> None:
    """Write the golden of the test's model, or fail the test with the reason in one line.

    Args:
        check: Raises where goldens must not be written.
    """
    __tracebackhide__ = True
    try:
        check()
        from pytest_moe_routing import snapshot

        snapshot.update(request.getfixturevalue("snapshot"), name, data)
    except MoERoutingError as error:
        message = str(error)
    else:
        return
    pytest.fail(message, pytrace=False)
