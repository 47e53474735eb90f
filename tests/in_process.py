"""Asks what a child process answers in this one, where a test has changed a framework's code."""

from __future__ import annotations

import json


class InProcess:
    """Takes the place of a target's probe, and checks answers as that does.

    Questions and answers go through JSON, as those of a process of its own do.
    """

    def __init__(self, probe, handlers):
        self._probe = probe
        self._handlers = handlers

    def ask(self, question, **given):
        answer = _as_json(self._handlers[question](**_as_json(given)))
        problem = self._probe._problem(question, "answer", answer)
        assert problem is None, f"{question}: {problem}"
        return answer

    def prepare(self, *_):
        """Nothing is asked ahead."""


def _as_json(value):
    return json.loads(json.dumps(value))
