"""Asks a framework's own code, in a process of its own.

Any release, from any place, without importing it here: nothing that it patches, warns, logs or
crashes touches the tests' process, and several releases can be asked side by side. A question has a
deadline, an answer a type, and the child limits; see SECURITY.md for what this does not do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypedDict

from pytest_moe_routing.errors import TargetError, Unsupported
from pytest_moe_routing.escape import excerpt
from pytest_moe_routing.targets.answers import problem
from pytest_moe_routing.targets.server import HEADER, HOME, LOG, MARK, STACK

#: What the child sees of the environment, besides the switches that its target names. Nothing of
#: a CI job's secrets.
_PASSED = (
    *("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG", "LANGUAGE", "TZ"),
    *("PYTHONHOME", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
)
_PASSED_PREFIXES = ("LC_", "CUDA_", "MOE_")
#: Seconds for a child to end, or to write its stack after the deadline; and at most, where the
#: machine is so busy that there is no stack yet.
_GRACE, _LONG_GRACE = 1.0, 10.0
_LOG_BYTES, _LOG_LINES, _STACK_LINES, _WIDTH = 20_000, 15, 25, 500


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


#: Those of every child. Questions take seconds; a deadline is for code that never answers.
LIMITS = Limits()


class _Failure(Exception):
    """Why there is no answer, and never will be another one."""


class _Error(TypedDict):
    """An exception of the code that is judged: its type, and the end of its traceback."""

    type: str
    text: str


class _Request(NamedTuple):
    """A question, and its arguments as JSON."""

    question: str
    arguments: str


#: The kind of a reply, `answer`, `unsupported` or `error`, and what it says.
_Reply = tuple[str, Any]
_ENCODER = json.JSONEncoder(separators=(",", ":"))
#: Questions of one exchange: few enough that it takes seconds.
_BATCH = 200


class Probe:
    """A child process, started on the first question.

    Args:
        target: Name of the target, for messages.
        module: What the child runs, by its full name; its `main` calls `targets.server.serve`.
        arguments: Its command line.
        answers: The type of each question's answer, as `targets.answers` reads it.
        switches: Names of further environment variables that the child sees.
    """

    def __init__(
        self,
        target: str,
        module: str,
        *arguments: str,
        answers: Mapping[str, Any] | None = None,
        switches: tuple[str, ...] = (),
    ) -> None:
        self._target = target
        self._command = (module, *arguments)
        self._answers = answers or {}
        self._switches = switches
        self._limits = LIMITS
        self._child: _Child | None = None
        self._number = 0
        self._replies: dict[_Request, _Reply] = {}
        #: Why there will be no more answers, in the words of the first question without one.
        self._ended = ""

    def ask(self, question: str, **arguments: Any) -> Any:
        """Return the child's answer to one question, which is asked once.

        Raises:
            Unsupported: It has none, with the reason.
            TargetError: Its code failed; or the child died, did not answer in time or answered
                with something else than an answer. Then it is asked nothing more, and every
                further question has the same error.
        """
        request = _Request(question, _ENCODER.encode(arguments))
        if request not in self._replies:
            if self._ended:
                raise TargetError(self._ended, "no answers")
            self._exchange([request])
        kind, value = self._replies[request]
        if kind == "unsupported":
            raise Unsupported(f"{self._target}: {value}")
        if kind == "error":
            message = f"target {self._target} failed at {question}:\n{value['text']}"
            raise TargetError(message, f"{question} {value['type']}")
        return value

    def prepare(self, question: str, many: Iterable[Mapping[str, Any]]) -> None:
        """Ask one question with each of many arguments, in a few exchanges.

        `ask` then has the answers. A child that ends is no error before it is asked.
        """
        asked = dict.fromkeys(_Request(question, _ENCODER.encode(each)) for each in many)
        new = [request for request in asked if request not in self._replies]
        for start in range(0, len(new), _BATCH):
            if self._ended:
                return
            with suppress(TargetError):
                self._exchange(new[start : start + _BATCH])

    def _exchange(self, requests: Sequence[_Request]) -> None:
        """Have the child reply to requests."""
        self._child = self._child or _Child(self._command, self._switches, self._limits)
        self._number += 1
        question = requests[0].question
        try:
            data = self._child.exchange(self._number, requests)
            self._replies.update(zip(requests, self._checked(requests, data), strict=True))
        except _Failure as failure:
            self._ended = f"target {self._target}: {question}: {failure}"
            self.close()
            raise TargetError(self._ended, "no answers") from None
        except BaseException:
            # An interrupt: nobody will read the answer.
            self._ended = f"target {self._target}: interrupted at {question}"
            self.close()
            raise

    def _checked(self, requests: Sequence[_Request], data: bytes) -> list[_Reply]:
        try:
            replies = json.loads(data)
        except (ValueError, RecursionError):
            raise _Failure("its answer is no JSON; its process was ended") from None
        if not isinstance(replies, list) or len(replies) != len(requests):
            raise _Failure("its answer is of no known kind; its process was ended")
        pairs = zip(requests, replies, strict=True)
        return [self._checked_one(request.question, reply) for request, reply in pairs]

    def _checked_one(self, question: str, reply: object) -> _Reply:
        if not isinstance(reply, dict) or len(reply) != 1:
            raise _Failure("its answer is of no known kind; its process was ended")
        [(kind, value)] = reply.items()
        hints = {"answer": self._answers.get(question, Any), "unsupported": str, "error": _Error}
        if kind not in hints:
            raise _Failure("its answer is of no known kind; its process was ended")
        if (found := problem(hints[kind], value)) is not None:
            raise _Failure(f"{found}; its process was ended")
        return kind, value

    def close(self) -> None:
        """End the child, and whatever it started."""
        if self._child is not None:
            self._child.end()
            self._child = None


class _Child:
    """A running child process, in a session, a home and an environment of its own."""

    def __init__(self, command: tuple[str, ...], switches: tuple[str, ...], limits: Limits) -> None:
        self._limits = limits
        self._folder = Path(tempfile.mkdtemp(prefix="moe-routing-"))
        home = self._folder / HOME
        home.mkdir()
        settings = {
            "seconds": limits.seconds,
            "memory": limits.memory,
            "folder": str(self._folder),
        }
        with (self._folder / LOG).open("ab") as log:
            self._process = subprocess.Popen(
                # Without the working directory among the places of modules.
                [sys.executable, "-P", "-c", _bootstrap(), json.dumps(settings), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                cwd=home,
                env=_environment(home, switches),
                start_new_session=True,
            )
        #: Ends the child, at the latest when Python ends.
        self.end: Callable[[], object] = weakref.finalize(self, _end, self._process, self._folder)

    def exchange(self, number: int, requests: Sequence[_Request]) -> bytes:
        """Send requests and return the answer to them.

        Raises:
            _Failure: There is none.
        """
        texts = (
            f'{{"question":{_ENCODER.encode(question)},"arguments":{arguments}}}'
            for question, arguments in requests
        )
        data = f"[{','.join(texts)}]".encode()
        message = HEADER.pack(MARK, number, len(data)) + data
        done: SimpleQueue[bytes | _Failure | None] = SimpleQueue()
        # In a thread, as a pipe can be waited for with a deadline in no portable way.
        arguments = (self._process, message, number, self._limits.answer, done)
        threading.Thread(target=_exchange, args=arguments, daemon=True).start()
        deadline = time.monotonic() + self._limits.seconds + _GRACE
        is_over = False
        while True:
            try:
                answer = done.get(timeout=0.2)
            except Empty:
                if is_over:
                    # What it started may hold its end of the pipe open.
                    raise _Failure(self._last_words()) from None
                is_over = self._process.poll() is not None
                late = time.monotonic() - deadline
                if late > _LONG_GRACE or (late > 0 and self._is_explained()):
                    raise _Failure(self._where_it_was()) from None
                continue
            if answer is None:
                raise _Failure(self._last_words())
            if isinstance(answer, _Failure):
                raise answer
            return answer

    def _last_words(self) -> str:
        try:
            code: int | str = self._process.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            code = "no code, and closed its answers"
        log = self._folder / LOG
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_BYTES))
            text = file.read(_LOG_BYTES).decode("utf-8", "replace")
        # A crash of the interpreter is told with its stack after it, anything else comes last.
        _, crash, stack = text.rpartition("Fatal Python error")
        lines = text.splitlines()[-_LOG_LINES:]
        words = excerpt(crash + stack if crash else "\n".join(lines), _LOG_LINES, _WIDTH)
        return f"its process ended with {code}; its last words:\n{words}"

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


def _bootstrap() -> str:
    """Return the child's program, which finds this package and what this process finds.

    The places of modules of this process come last: a module next to the tests takes the place of
    none of the standard library or of an installed one. The working directory is left out.
    """
    here = os.path.realpath(os.curdir)
    package = str(Path(__file__).resolve().parents[2])
    places = [p for p in sys.path if Path(p).is_absolute() and os.path.realpath(p) != here]
    return (
        "import sys\n"
        f"sys.path += [p for p in {[*places, package]!r} if p not in sys.path]\n"
        "from pytest_moe_routing.targets import server\n"
        "server.main()\n"
    )


def _environment(home: Path, switches: tuple[str, ...]) -> dict[str, str]:
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED or name in switches or name.startswith(_PASSED_PREFIXES)
    }
    homes = dict.fromkeys(("HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP"), str(home))
    # The sources that are judged stay as they are, and sets in their messages have one order.
    return {**passed, **homes, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}


def _exchange(
    process: subprocess.Popen[bytes],
    message: bytes,
    number: int,
    limit: int,
    done: SimpleQueue[bytes | _Failure | None],
) -> None:
    """Put the answer to a message, a failure, or None when the child has closed its end."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        rest = memoryview(message)
        while rest:
            rest = rest[os.write(process.stdin.fileno(), rest) :]
        header = _read(process, HEADER.size)
        if header is None:
            return done.put(None)
        mark, answered, size = HEADER.unpack(header)
        if (mark, answered) != (MARK, number):
            return done.put(
                _Failure("found something else among its answers; its process was ended")
            )
        if size > limit:
            text = f"its answer has {size} bytes, expected at most {limit}; its process was ended"
            return done.put(_Failure(text))
        return done.put(_read(process, size))
    except (OSError, ValueError):
        # Its end, or ours, is closed.
        return done.put(None)


def _read(process: subprocess.Popen[bytes], size: int) -> bytes | None:
    assert process.stdout is not None
    data = bytearray()
    while len(data) < size:
        more = os.read(process.stdout.fileno(), min(size - len(data), 1 << 20))
        if not more:
            return None
        data += more
    return bytes(data)


def _is_stopped(pid: int) -> bool:
    if not hasattr(os, "waitid"):
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End a child and all of its process group, and remove its folder."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):
        # There is none left.
        pass
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)
