"""The types of a child's answers."""

from __future__ import annotations

from typing import Any, NotRequired, Required, TypedDict

import pytest

from pytest_moe_routing.targets.answers import problem


class End(TypedDict, total=False):
    function: str


class Call(End):
    by: str
    shards: int


class Calls(TypedDict):
    calls: list[Call]
    factor: float | None


class Marked(TypedDict, total=False):
    method: Required[str]
    why: str


class Told(TypedDict):
    method: str
    why: NotRequired[str]


GOOD = [
    (Marked, {"method": "a"}),
    (Told, {"method": "a"}),
    (Told, {"method": "a", "why": "b"}),
    (str, "a"),
    (int, 3),
    (float, 3),
    (float, 2.5),
    (bool, True),
    (Any, {"any": ["thing"]}),
    (dict[str, int], {"a": 1}),
    (dict[str, int], {}),
    (list[str | None], ["a", None]),
    (list[str] | None, None),
    (tuple[str, bool], ["a", False]),
    (list[tuple[str, bool] | tuple[str, bool, str]], [["a", True], ["b", False, "why"]]),
    (Calls, {"calls": [{"by": "a", "shards": 1}], "factor": 1, "more": object}),
    (Calls, {"calls": [{"by": "a", "shards": 1, "function": "f"}], "factor": None}),
]
BAD = [
    (Marked, {"why": "b"}, "the answer has no method"),
    (Told, {"why": "b"}, "the answer has no method"),
    (Told, {"method": "a", "why": 1}, "the answer.why is 1, expected text"),
    (str, 1, "the answer is 1, expected text"),
    (int, True, "the answer is True, expected an integer"),
    (int, 1.0, "the answer is 1.0, expected an integer"),
    (float, False, "the answer is False, expected a number"),
    (bool, 1, "the answer is 1, expected true or false"),
    (str | None, [], "the answer is [], expected text or null"),
    (dict[str, int], [["a", 1]], "the answer is [['a', 1]], expected a mapping"),
    (dict[str, int], {"a": "1"}, "the answer.a is '1', expected an integer"),
    (list[str], "text", "the answer is 'text', expected a list"),
    (list[str], ["a", 1], "the answer[1] is 1, expected text"),
    (tuple[str, bool], ["a"], "the answer has 1 items, expected 2"),
    (tuple[str, bool], ["a", "b"], "the answer[1] is 'b', expected true or false"),
    (Calls, {"factor": 1}, "the answer has no calls"),
    (Calls, {"calls": [{}], "factor": 1}, "the answer.calls[0] has no by, shards"),
    (
        Calls,
        {"calls": [{"by": "a", "shards": 1, "function": 2}], "factor": 1},
        "the answer.calls[0].function is 2, expected text",
    ),
    (str, None, "the answer is None, expected text"),
    (int, "x" * 1000, f"the answer is '{'x' * 56}..., expected an integer"),
]


@pytest.mark.parametrize(("hint", "value"), GOOD)
def test_answers_of_their_type(hint, value):
    assert problem(hint, value) is None


@pytest.mark.parametrize(("hint", "value", "message"), BAD)
def test_answers_of_another_type(hint, value, message):
    assert problem(hint, value) == message
