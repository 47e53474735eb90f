"""Which tests of the suite a run asks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_moe_routing.session import MoESession

_SUITE = Path(__file__).resolve().parent


def is_left_out(
    item: pytest.Item, config: pytest.Config, session: MoESession, *, gpu: bool
) -> bool:
    """Whether a run does not ask a test of the suite.

    Goldens are the builtin target's decisions: another target is judged, not compared. Only a
    framework has model code. GPU tests, and the config sweep of a run about some models, must be
    asked for, by an option, by their marker or by name.

    Args:
        gpu: Whether an option asks for GPU tests.
    """
    not_for_this = "moe_framework" if session.is_builtin else "moe_golden"
    if not_for_this in getattr(item, "fixturenames", ()):
        return True
    if item.path.parent != _SUITE:
        return False
    name = item.name.partition("[")[0]
    asked = f"{config.option.markexpr} {config.option.keyword}"
    by_name = name in asked or any(name in str(arg) for arg in config.invocation_params.args)
    if item.get_closest_marker("gpu"):
        return not (gpu or by_name or "gpu" in asked)
    about_some = bool(session.model_patterns or session.configs)
    sweeps = item.get_closest_marker("sweep") is not None
    return sweeps and about_some and not (by_name or "sweep" in asked)
