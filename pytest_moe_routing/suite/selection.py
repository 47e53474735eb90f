"""Which tests of the suite a run asks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_moe_routing.session import SUITE_IDS

if TYPE_CHECKING:
    from pytest_moe_routing.session import MoESession

SUITE = Path(__file__).resolve().parent
#: The order of the suite's tests. The config sweep judges the answers of one child for most of a
#: run. What is before it is judged while the child works for it; what is after it needs answers of
#: other children, which have them by then.
_FILES = (
    *("test_verdicts", "test_downcasts", "test_model_code", "test_router"),
    "test_config_sweep",
)
_LAST = ("test_other_experts", "test_around_call", "test_layouts", "test_quantization_methods")


def suite_files() -> list[Path]:
    """Return the suite's files in the order of a run.

    They are given to pytest one by one, as the host's `python_files` must not decide what is
    collected. Goldens come last: a copy of the process computes what they are compared with.
    """
    files = SUITE.glob("test_*.py")
    return sorted(files, key=lambda path: (path.stem == "test_goldens", path.name))


def module_id(path: Path) -> str:
    """Return the id of a module of the suite: the same in a checkout and in site-packages."""
    return f"{SUITE_IDS}{path.name}"


def resolve(argument: str) -> tuple[str, bool]:
    """Return an argument of the command line with its real path, and whether it is the suite's.

    Ids of the suite's tests name a path that need not exist; pasted, they mean the suite.
    """
    path, colons, test = argument.partition("::")
    before, prefix, name = path.replace("\\", "/").rpartition(SUITE_IDS)
    is_pasted = bool(prefix) and not Path(path).exists() and (SUITE / name).is_file()
    # What stands before it leads from the working directory to pytest's root directory.
    if is_pasted and not before.strip("./"):
        return f"{SUITE / name}{colons}{test}", True
    return argument, Path(path).exists() and Path(path).resolve().is_relative_to(SUITE)


def in_order(items: list[pytest.Item]) -> None:
    """Put the suite's tests in order, and leave all others where they are."""
    places = [place for place, item in enumerate(items) if item.path.parent == SUITE]
    for place, item in zip(places, sorted((items[n] for n in places), key=_rank), strict=True):
        items[place] = item


def _rank(item: pytest.Item) -> tuple[int, int]:
    name = item.name.partition("[")[0]
    last = _LAST.index(name) + 1 if name in _LAST else 0
    return last, _FILES.index(item.path.stem) if item.path.stem in _FILES else len(_FILES)


def left_out(
    item: pytest.Item, config: pytest.Config, session: MoESession, *, gpu: bool, full_scale: bool
) -> str:
    """Return the kind of a test of the suite that a run does not ask; empty if it asks the test.

    Goldens are the builtin target's decisions: another target is judged, not compared. Only a
    framework has model code. GPU tests, and the config sweep of a run about some models, must be
    asked for, by an option, by their marker or by name.

    Args:
        gpu: Whether an option asks for GPU tests.
        full_scale: Whether layers have their model's own sizes.
    """
    fixtures = getattr(item, "fixturenames", ())
    if session.is_builtin and "_moe_framework" in fixtures:
        return "framework tests (--moe-target)"
    if not session.is_builtin and "_moe_golden" in fixtures:
        return "golden tests of the builtin target"
    if not full_scale and "_moe_full_scale" in fixtures:
        return "full-scale tests (--moe-scale full)"
    if item.path.parent != SUITE:
        return ""
    name = item.name.partition("[")[0]
    answered = session.located.cls.tests
    if answered and name not in answered:
        return "tests of fused kernels, which the target does not call"
    if name == "test_transformers_backend" and (why := session.located.cls.without_backend()):
        return why
    asked = f"{config.option.markexpr} {config.option.keyword}"
    by_name = name in asked or any(name in str(arg) for arg in config.invocation_params.args)
    if item.get_closest_marker("gpu"):
        return "" if gpu or by_name or "gpu" in asked else "GPU tests (-m gpu)"
    about_some = bool(session.model_patterns or session.configs)
    sweeps = item.get_closest_marker("sweep") is not None
    if sweeps and about_some and not (by_name or "sweep" in asked):
        return "config sweep tests (-m sweep)"
    return ""


def skip_without_driver(item: pytest.Item, kernels: str | None) -> None:
    """Skip a test of kernels that need a GPU where there is no driver; `kernels` is the option."""
    if not {"moe_gpu", "moe_kernels", "router_kernels"}.intersection(
        getattr(item, "fixturenames", ())
    ):
        return
    from pytest_moe_routing.kernels import gpu, library

    if (kernels or library.FLASHINFER) != library.FLASHINFER or gpu.has_driver():
        return
    missing = gpu.find_gpu().missing
    if missing:
        item.user_properties.append(("moe_gpu", {"missing": missing}))
        pytest.skip(missing)
