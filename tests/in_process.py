"""Asks what a child process answers in this one, where a test has changed a framework's code."""

from __future__ import annotations

import json
from pathlib import Path

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.targets.source import Source


def in_process(target_class, child, root, flashinfer, version):
    """Return a target whose questions are answered here, and what answers them."""
    target = target_class(FlashInfer.of(flashinfer), Source(Path(root), version, flashinfer))
    handlers = child.handlers(root, flashinfer, version)
    target._probe = target._aside = _InProcess(target._probe, handlers)
    return target, handlers


class _InProcess:
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
