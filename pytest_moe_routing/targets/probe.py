"""Asks a framework's own code, in a process of its own.

Any release, from any place, without importing it here: nothing that it patches, warns, logs or
crashes touches the tests' process, and several releases can be asked side by side. A question has a
deadline, an answer a type, and the child limits; see SECURITY.md for what this does not do.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple, TypedDict

from pytest_moe_routing.errors import TargetError, Unsupported
from pytest_moe_routing.targets.answers import problem
from pytest_moe_routing.targets.child import (
    Child,
    Failure,
    Limits,
    Request,
    environment_of,
)
from pytest_moe_routing.targets.kept import Kept, Store, key_of_child

#: Those of every child. Questions take seconds; a deadline is for code that never answers.
LIMITS = Limits()


class _Error(TypedDict):
    """An exception of the code that is judged, see `targets.server.serve`."""

    type: str
    line: str
    text: str


#: The kind of a reply, `answer`, `unsupported` or `error`, and what it says.
_Reply = tuple[str, Any]
#: Questions of one exchange: few enough that another thread waits no second for its turn.
_BATCH = 50
#: Set from the first child of this process on: before, all answers were known.
CHILD_STARTED = Event()


class _Ahead(threading.local):
    """What ends the questions that a thread asks ahead; None if it does not."""

    stop: Event | None = None


_AHEAD = _Ahead()


@contextmanager
def asking_ahead(stop: Event) -> Iterator[None]:
    """Let this thread ask what others will ask later, until `stop` is set.

    After a child that fails, another one is started for the next question, and a question that has
    no answer then is asked again. So what `Probe.ask` raises elsewhere does not depend on which
    thread was first.
    """
    before, _AHEAD.stop = _AHEAD.stop, stop
    try:
        yield
    finally:
        _AHEAD.stop = before


class Questions(NamedTuple):
    """One question that will be asked of a child, with each of many arguments."""

    probe: Probe
    name: str
    many: Iterable[Mapping[str, Any]]


class Probe:
    """A child process, started on the first question.

    Args:
        target: Name of the target, for messages.
        module: What the child runs, by its full name; its `main` calls `targets.server.serve`.
        arguments: Its command line.
        answers: The type of each question's answer, as `targets.answers` reads it.
        switches: Names of further environment variables that the child sees.
        variables: Environment variables that are set for the child alone.
    """

    def __init__(
        self,
        target: str,
        module: str,
        *arguments: str,
        answers: Mapping[str, Any] | None = None,
        switches: tuple[str, ...] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._target = target
        self._command = (module, *arguments)
        self._answers = answers or {}
        self._switches = switches
        self._variables = variables or {}
        self._limits = LIMITS
        self._child: Child | None = None
        self._number = 0
        self._replies: dict[Request, _Reply] = {}
        self._kept: Kept | None = None
        #: Replies of earlier runs, which are checked when they are asked for.
        self._earlier: dict[Request, _Reply] = {}
        #: By question, kind and identity of the value: many of them have one value in common.
        self._is_valid: dict[tuple[str, str, int], bool] = {}
        #: Why there will be no more answers, in the words of the first question without one.
        self._ended = ""
        #: Held by the thread whose question is answered, and by the one whose turn is next.
        self._now, self._next = Lock(), Lock()

    def keep(self, store: Store, sources: str, root: Path) -> int:
        """Take over the answers of earlier runs, and keep those of this one; return how many.

        Args:
            sources: What the answers depend on besides the child's command line and environment.
            root: Where the sources are, which makes no difference.
        """
        command = [part for part in self._command if part != str(root)]
        environment = {**environment_of(Path(), self._switches), **self._variables}
        key = key_of_child(sources, command, environment)
        self._kept = Kept(store, key, os.environ.get("PYTEST_XDIST_WORKER", "main"))
        for question, arguments, kind, value in self._kept.rows():
            self._earlier[Request(question, arguments)] = kind, value
        return len(self._earlier)

    def _is_known(self, request: Request) -> bool:
        """Whether there is a reply, in this run or from an earlier one."""
        if request in self._replies:
            return True
        if request not in self._earlier:
            return False
        reply = kind, value = self._earlier[request]
        key = request.question, kind, id(value)
        if key not in self._is_valid:
            self._is_valid[key] = self._problem(request.question, kind, value) is None
        if self._is_valid[key]:
            self._replies[request] = reply
        return self._is_valid[key]

    def ask(self, question: str, **arguments: Any) -> Any:
        """Return the child's answer to one question, which is asked once.

        Raises:
            Unsupported: It has none, with the reason.
            TargetError: Its code failed; or the child died, did not answer in time or answered
                with something else than an answer. Then it is asked nothing more, and every
                further question has the same error.
        """
        request = Request.of(question, arguments)
        if request not in self._replies:
            with self._turn():
                if not self._is_known(request):
                    if self._ended:
                        raise TargetError(self._ended, "no answers")
                    self._exchange([request])
        kind, value = self._replies[request]
        if kind == "unsupported":
            raise Unsupported(f"{self._target}: {value}")
        if kind == "error":
            summary = f"target {self._target} failed at {question}: {value['line']}"
            message = f"{summary}\n{value['text']}"
            raise TargetError(message, f"{question} {value['type']}", summary)
        return value

    def prepare(self, question: str, many: Iterable[Mapping[str, Any]]) -> None:
        """Ask one question with each of many arguments, in a few exchanges.

        `ask` then has the answers. A child that ends is no error before it is asked.
        """
        rest = _requests(question, many)
        with suppress(TargetError):
            while self._exchange_some(rest):
                pass

    def ask_ahead(self, question: str, many: Iterable[Mapping[str, Any]]) -> bool:
        """Do what `prepare` does in another thread, and return whether that went well.

        A child that fails is ended, and `ask` starts another one; see `asking_ahead`.
        """
        rest = _requests(question, many)
        with asking_ahead(_AHEAD.stop or Event()):
            try:
                while self._exchange_some(rest):
                    pass
            except TargetError:
                return False
        return not self._ended

    def _exchange_some(self, rest: Iterator[Request]) -> bool:
        """Have the child reply to the next few requests without a reply; return if any are."""
        with self._turn():
            if self._ended:
                return False
            new = list(islice((each for each in rest if not self._is_known(each)), _BATCH))
            if new:
                self._exchange(new)
        return bool(new)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other thread is answered. Threads take turns: none overtakes another."""
        with self._next:
            self._now.acquire()
        try:
            yield
        finally:
            self._now.release()

    def _exchange(self, requests: Sequence[Request]) -> None:
        """Have the child reply to requests."""
        if _AHEAD.stop is not None and _AHEAD.stop.is_set():
            raise TargetError("nobody waits for an answer", "no answers")
        child = self._started()
        self._number += 1
        question = requests[0].question
        try:
            data = child.exchange(self._number, requests)
            self._replies.update(zip(requests, self._checked(requests, data), strict=True))
        except Failure as failure:
            ended = f"target {self._target}: {question}: {failure}"
            self._ended = "" if _AHEAD.stop is not None else ended
            self._end_child()
            raise TargetError(ended, "no answers") from None
        except BaseException:
            # An interrupt: nobody will read the answer.
            self._ended = f"target {self._target}: interrupted at {question}"
            self._end_child()
            raise

    def start(self) -> None:
        """Start the child before it is asked, unless it may not be asked at all.

        It may not where there are answers of an earlier run.
        """
        with self._turn():
            if not (self._earlier or self._ended):
                self._started()

    def _started(self) -> Child:
        CHILD_STARTED.set()
        self._child = self._child or Child(
            self._command, self._switches, self._limits, self._variables
        )
        return self._child

    def _checked(self, requests: Sequence[Request], data: bytes) -> list[_Reply]:
        try:
            replies = json.loads(data)
        except (ValueError, RecursionError):
            raise Failure("its answer is not JSON; its process was ended") from None
        if not isinstance(replies, list) or len(replies) != len(requests):
            raise Failure("its answer is of an unknown kind; its process was ended")
        pairs = zip(requests, replies, strict=True)
        return [self._checked_one(request.question, reply) for request, reply in pairs]

    def _checked_one(self, question: str, reply: object) -> _Reply:
        if not isinstance(reply, dict) or len(reply) != 1:
            raise Failure("its answer is of an unknown kind; its process was ended")
        [(kind, value)] = reply.items()
        if (found := self._problem(question, kind, value)) is not None:
            raise Failure(f"{found}; its process was ended")
        return kind, value

    def _problem(self, question: str, kind: str, value: Any) -> str | None:
        hints = {"answer": self._answers.get(question, Any), "unsupported": str, "error": _Error}
        if kind not in hints:
            return "its answer is of an unknown kind"
        return problem(hints[kind], value)

    def close(self) -> None:
        """End the child, and whatever it started; keep what it said."""
        # First, so that no thread goes on waiting for an answer.
        self._end_child()
        with self._turn():
            new = [request for request in self._replies if request not in self._earlier]
            if self._kept is not None and new and not self._ended:
                replies = {**self._earlier, **self._replies}
                self._kept.write((*request, *reply) for request, reply in replies.items())
                self._earlier = replies

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


def _requests(question: str, many: Iterable[Mapping[str, Any]]) -> Iterator[Request]:
    """Yield each request once, as soon as its arguments are known."""
    seen = set()
    for each in many:
        request = Request.of(question, each)
        if request not in seen:
            seen.add(request)
            yield request
