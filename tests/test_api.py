"""The public API: documented on one page, with arguments and errors; fixtures that `--fixtures` shows."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import pytest_moe_routing

PAGE = (Path(__file__).parents[1] / "docs/api.md").read_text("utf-8")
NAMES = set(pytest_moe_routing.__all__) - {"__version__"}
#: Functions that an author of a kernel calls.
FUNCTIONS = (
    "assert_routing",
    "compare_routing",
    "assert_moe",
    "compare_moe",
    "make_case",
    "route",
    "moe",
    "quantize",
)


def test_the_page_has_every_public_name():
    assert set(re.findall(r"^        - (\w+)$", PAGE, re.M)) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_names_are_described(name):
    value = getattr(pytest_moe_routing, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        # Not what a dataclass or an enum writes by itself.
        text = inspect.getdoc(value)
        assert text
        assert not text.startswith(f"{name}(")


@pytest.mark.parametrize("name", [*FUNCTIONS, "MoEProblem.of"])
def test_functions_describe_arguments_and_errors(name):
    value = pytest_moe_routing
    for part in name.split("."):
        value = getattr(value, part)
    text = inspect.getdoc(value)
    for parameter in inspect.signature(value).parameters:
        assert re.search(rf"^    {parameter}: ", text, re.M), parameter
    assert "\nRaises:\n" in text


def test_fixtures_shown_are_the_public_ones(pytester):
    result = pytester.runpytest_inprocess("--fixtures", "-p", "no:cacheprovider")
    shown = re.findall(r"^(\w*moe_\w+)(?: \[.*\])? -- ", result.stdout.str(), re.M)
    on_page = re.findall(r"^\| `(moe_\w+)` \|", PAGE, re.M)
    assert sorted(shown) == sorted(on_page)
    assert len(shown) == 7


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert pytest_moe_routing.__version__ == version("pytest-moe-routing")
