"""Asks a framework's own code, in a process of its own.

Any release, from any place, without importing it here: nothing that it patches, warns, logs or
crashes touches the tests' process, and several releases can be asked side by side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from pytest_moe_routing.errors import TargetError, Unsupported


class Probe:
    """A child process, started on the first question.

    Args:
        target: Name of the target, for messages.
        module: What the child runs, by its full name; it serves with `targets.server`.
        arguments: Its command line.
    """

    def __init__(self, target: str, module: str, *arguments: str) -> None:
        self._target = target
        self._command = [sys.executable, "-m", module, *arguments]
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115

    def ask(self, question: str, **arguments: Any) -> Any:
        """The child's answer to one question.

        Raises:
            Unsupported: It has none, with the reason.
            TargetError: Its code failed, or the child died.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"question": question, **arguments}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            process.wait()
            raise TargetError(
                f"target {self._target}: its process ended with {process.returncode}; "
                f"its last words:\n{self._last_words()}"
            )
        reply = json.loads(line)
        if "unsupported" in reply:
            raise Unsupported(f"{self._target}: {reply['unsupported']}")
        if "error" in reply:
            raise TargetError(f"target {self._target} failed at {question}:\n{reply['error']}")
        return reply["answer"]

    def _start(self) -> subprocess.Popen[str]:
        # The child imports this package as this process does, whatever its working directory.
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environ,
        )
        return self._process

    def _last_words(self) -> str:
        self._log.seek(0)
        return "".join(self._log.readlines()[-15:])

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._process = None
        self._log.close()
