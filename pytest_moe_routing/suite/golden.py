"""What the fixture `_moe_golden` does: compare with a golden, or rewrite it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pytest_moe_routing import goldens
from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.models import ModelSpec


def compare(model: ModelSpec, name: str, data: dict[str, Any], options: Sequence[str]) -> None:
    """Fail the test unless the data is what the model's golden says.

    Args:
        options: The options of the run that choose goldens; the message repeats them.
    """
    __tracebackhide__ = True
    path = goldens.golden_path(model.folder, name)
    words = ("pytest", "--moe-golden", *options, "--moe-models", str(model), "--snapshot-update")
    command = shlex.join(words)
    try:
        found = list(goldens.differences(goldens.read(path), data))
        message = goldens.disagreement(path, found, command) if found else ""
    except MoERoutingError as error:
        message = goldens.unreadable(path, error, command)
    if message:
        pytest.fail(message, pytrace=False)


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
