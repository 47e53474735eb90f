"""The process of a probe: started, asked with a deadline, and ended with all that it started."""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pytest_moe_routing.escape import excerpt
from pytest_moe_routing.targets.forked import Forked, can_fork, forked
from pytest_moe_routing.targets.server import HEADER, HOME, LOG, MARK, STACK

#: What the child sees of the environment, besides the switches that its target names. Nothing of
#: a CI job's secrets.
_PASSED = (
    *("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG", "LANGUAGE", "TZ"),
    "PYTHONHOME",
)
_PASSED_PREFIXES = ("LC_", "CUDA_", "MOE_")
#: Its tensors are small: waiting for further threads took as long as computing.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
#: Seconds for a child to end, or to write its stack after the deadline; and at most, where the
#: machine is so busy that there is no stack yet.
_GRACE, _LONG_GRACE = 1.0, 10.0
#: Milliseconds after which it is looked whether the child is alive.
_PAUSE = 200
_READ_BYTES = 1 << 20
_NO_ANSWER = "its output holds something other than answers; its process was ended"
_LOG_BYTES, _LOG_LINES, _STACK_LINES, _WIDTH = 20_000, 15, 25, 500


#: This package's own folder.
_PACKAGE = Path(__file__).resolve().parents[1]
ENCODER = json.JSONEncoder(separators=(",", ":"))


class Encoded(dict[str, Any]):
    """An argument of many questions, which is encoded once."""

    @cached_property
    def text(self) -> str:
        return ENCODER.encode(self)


@dataclass(frozen=True)
class Limits:
    """What a child may use.

    Attributes:
        seconds: For one question; the first includes the import of the framework.
        memory: Bytes of data, where the system limits them.
        answer: Bytes of one answer.
    """

    seconds: float = 300.0
    memory: int = 16 << 30
    answer: int = 16_000_000


class Failure(Exception):
    """Why there is no answer, and never will be another one."""


class Request(NamedTuple):
    """A question, and its arguments as JSON."""

    question: str
    arguments: str

    @classmethod
    def of(cls, question: str, arguments: Mapping[str, Any]) -> Request:
        texts = (
            f'"{name}":{value.text if isinstance(value, Encoded) else ENCODER.encode(value)}'
            for name, value in arguments.items()
        )
        return cls(question, f"{{{','.join(texts)}}}")


class Child:
    """A running child process, in a session, a home and an environment of its own."""

    def __init__(
        self,
        command: tuple[str, ...],
        switches: tuple[str, ...],
        limits: Limits,
        variables: Mapping[str, str],
    ) -> None:
        self._limits = limits
        self._folder = Path(tempfile.mkdtemp(prefix="moe-routing-"))
        home = self._folder / HOME
        home.mkdir()
        settings = {
            "seconds": limits.seconds,
            "memory": limits.memory,
            "folder": str(self._folder),
        }
        arguments = [json.dumps(settings), *command]
        environment = environment_of(home, switches)
        with (self._folder / LOG).open("ab") as log:
            request = {
                "folder": str(self._folder),
                "home": str(home),
                "environment": environment,
                "places": _places(),
                "keep_bytecode": not sys.dont_write_bytecode,
                "arguments": arguments,
            }
            # Python itself reads variables when it starts.
            fork = None if variables or not can_fork() else _fork(request, log.fileno())
            self._process = fork or subprocess.Popen(
                # Without the working directory among the places of modules.
                [sys.executable, "-P", "-c", _program("server", "main(guards=True)"), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                cwd=home,
                env={**environment, **variables},
                start_new_session=True,
            )
        os.set_blocking(self._pipes()[0], False)
        #: Ends the child, at the latest when Python ends.
        self.end: Callable[[], object] = weakref.finalize(self, _end, self._process, self._folder)

    def exchange(self, number: int, requests: Sequence[Request]) -> bytes:
        """Send requests and return the answer to them.

        Raises:
            Failure: There is none.
        """
        texts = (
            f'{{"question":{ENCODER.encode(question)},"arguments":{arguments}}}'
            for question, arguments in requests
        )
        data = f"[{','.join(texts)}]".encode()
        try:
            return self._answer(HEADER.pack(MARK, number, len(data)) + data, number)
        except (OSError, ValueError):
            # Its end of a pipe, or ours, is closed.
            raise Failure(self._last_words()) from None

    def _answer(self, message: bytes, number: int) -> bytes:
        """Send a message and return the answer to it.

        Pipes are waited for in this thread: where another one computes, each further thread that
        takes part has to wait for the interpreter's lock as well.
        """
        rest, received, size = memoryview(message), bytearray(), HEADER.size
        deadline = time.monotonic() + self._limits.seconds + _GRACE
        is_over, last = False, math.inf
        while len(received) < size:
            ready = self._ready(is_writing=bool(rest))
            late = time.monotonic() - deadline
            if not ready:
                if is_over:
                    # What it started may hold its end of the pipe open.
                    raise Failure(self._last_words())
                is_over = self._process.poll() is not None
                if late > _LONG_GRACE or (late > 0 and self._is_explained()):
                    raise Failure(self._where_it_was())
                continue
            if late > 0:
                # This process may have been stopped: only what has arrived by now is read.
                last = min(last, late + _LONG_GRACE)
                if late > last:
                    raise Failure(self._where_it_was())
            stdin, stdout = self._pipes()
            if stdin in ready:
                rest = rest[os.write(stdin, rest) :]
            if stdout not in ready:
                continue
            more = os.read(stdout, _READ_BYTES)
            if not more:
                raise Failure(self._last_words())
            received += more
            if size == HEADER.size <= len(received):
                size += self._size(received, number)
        if rest or len(received) > size:
            raise Failure(_NO_ANSWER)
        return bytes(received[HEADER.size :])

    def _size(self, received: bytes | bytearray, number: int) -> int:
        """Return the bytes of an answer, by its header."""
        mark, answered, size = HEADER.unpack_from(received)
        if (mark, answered) != (MARK, number):
            raise Failure(_NO_ANSWER)
        limit = self._limits.answer
        if size > limit:
            raise Failure(
                f"its answer has {size} bytes, expected at most {limit}; its process was ended"
            )
        return int(size)

    def _pipes(self) -> tuple[int, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin.fileno(), self._process.stdout.fileno()

    def _ready(self, *, is_writing: bool) -> set[int]:
        """Return which pipes can be used, after a while; both may not be."""
        stdin, stdout = self._pipes()
        waiting = select.poll()
        waiting.register(stdout, select.POLLIN)
        if is_writing:
            waiting.register(stdin, select.POLLOUT)
        return {descriptor for descriptor, _ in waiting.poll(_PAUSE)}

    def _last_words(self) -> str:
        try:
            code: int | str = self._process.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            code = "no exit code, after closing its output"
        log = self._folder / LOG
        try:
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - _LOG_BYTES))
                text = file.read(_LOG_BYTES).decode("utf-8", "replace")
        except FileNotFoundError:
            # Another thread has removed its folder.
            return "its process was ended"
        # A crash of the interpreter is told with its stack after it, anything else comes last.
        _, crash, stack = text.rpartition("Fatal Python error")
        lines = text.splitlines()[-_LOG_LINES:]
        words = excerpt(crash + stack if crash else "\n".join(lines), _LOG_LINES, _WIDTH)
        end = f"its process ended with {code}"
        return f"{end}; its last words:\n{words}" if words else end

    def _is_explained(self) -> bool:
        """Return whether it is known where the child is."""
        return _is_stopped(self._process.pid) or "Timeout (" in self._stack()

    def _stack(self) -> str:
        path = self._folder / STACK
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def _where_it_was(self) -> str:
        late = f"no answer within {self._limits.seconds:g} s; its process was ended"
        if _is_stopped(self._process.pid):
            return f"{late}. It had stopped itself"
        # Of the last dump, all threads but the one that listens to us.
        dump = self._stack().rpartition("Timeout (")[2]
        threads = [text for text in dump.split("\n\n") if "in _listen" not in text]
        lines = [line for text in threads for line in text.splitlines() if line.startswith("  ")]
        # The innermost frame comes first, our own last: as in a traceback, it is shown last.
        ours = next((n for n, line in enumerate(lines) if "/targets/server.py" in line), len(lines))
        shown = excerpt("\n".join(reversed(lines[:ours][:_STACK_LINES])), _STACK_LINES, _WIDTH)
        return f"{late}. It was in:\n{shown}" if shown else f"{late}. Its stack is not known"


def _places() -> list[str]:
    """Return where this process finds modules, without the working directory."""
    here = os.path.realpath(os.curdir)
    found = [p for p in sys.path if Path(p).is_absolute() and os.path.realpath(p) != here]
    return [*found, str(_PACKAGE.parent)]


def _program(module: str, call: str) -> str:
    """Return the program of a process that runs a module of this package's `targets`.

    The places of modules of this process come last: a module next to the tests takes the place of
    none of the standard library or of an installed one. This package is loaded from its file, as
    another copy of it may be installed, and keeps its bytecode where this process keeps any.

    Args:
        call: What is called; `own_places` are the places that come first.
    """
    return (
        "import sys\n"
        f"sys.dont_write_bytecode = {sys.dont_write_bytecode}\n"
        "from importlib import util\n"
        "own_places = list(sys.path)\n"
        f"sys.path += [p for p in {_places()!r} if p not in sys.path]\n"
        "spec = util.spec_from_file_location"
        f"({_PACKAGE.name!r}, {str(_PACKAGE / '__init__.py')!r})\n"
        "sys.modules[spec.name] = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(sys.modules[spec.name])\n"
        f"from {_PACKAGE.name}.targets import {module}\n"
        f"{module}.{call}\n"
    )


def _fork(request: Mapping[str, Any], log: int) -> Forked | None:
    program = _program("fork_server", "main(own_places)")
    return forked(program, lambda home: environment_of(home, ()), request, log)


def environment_of(home: Path, switches: tuple[str, ...]) -> dict[str, str]:
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED or name in switches or name.startswith(_PASSED_PREFIXES)
    }
    homes = dict.fromkeys(("HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP"), str(home))
    # The sources that are judged stay as they are, and sets in their messages have one order.
    python = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    return {**passed, **homes, **_ONE_THREAD, **python}


def _is_stopped(pid: int | None) -> bool:
    try:
        # The state follows the name, which is in brackets and may have any in it.
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def _end(process: Forked | subprocess.Popen[bytes], folder: Path) -> None:
    """End a child and all of its process group, and remove its folder."""
    pid = process.pid
    if pid is not None:
        # There may be none left.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    if pid is not None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LONG_GRACE)
    if isinstance(process, Forked):
        process.told.close()
    shutil.rmtree(folder, ignore_errors=True)
