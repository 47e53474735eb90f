"""Computes in a copy of this process what later tests need, so that two cores work at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")
#: What a test needs, and how it is computed. A key is pickled, and so is what is computed.
Work = Mapping[Hashable, Callable[[], Any]]


class Elsewhere:
    """The results of a copy of this process, which has all that is imported and patched here.

    What the copy has not computed, as it failed or ended, is computed here.

    Args:
        work: What the copy computes, in this order.
    """

    def __init__(self, work: Work) -> None:
        self._pending = set(work)
        self._results: dict[Hashable, Any] = {}
        fork = multiprocessing.get_context("fork")
        self._receiving, sending = fork.Pipe(duplex=False)
        self._copy = fork.Process(
            target=_compute, args=(work, self._receiving, sending), daemon=True
        )
        self._copy.start()
        sending.close()

    def result(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        """Return what the copy has computed, and otherwise compute it."""
        while key in self._pending:
            try:
                found, result = self._receiving.recv()
            except (EOFError, OSError):
                self._pending.clear()
                break
            self._pending.discard(found)
            self._results |= result
        # No test needs it twice.
        return self._results.pop(key) if key in self._results else compute()

    def close(self) -> None:
        """End the copy."""
        self._pending.clear()
        self._copy.terminate()
        self._copy.join()
        self._receiving.close()


def _here(_: Hashable, compute: Callable[[], _T]) -> _T:
    return compute()


@contextmanager
def computing(work: Work) -> Iterator[Callable[[Hashable, Callable[[], Any]], Any]]:
    """Provide `Elsewhere.result`, or where there can be no copy, what computes here."""
    if not (work and can_copy()):
        yield _here
        return
    elsewhere = Elsewhere(work)
    try:
        yield elsewhere.result
    finally:
        elsewhere.close()


def can_copy() -> bool:
    """Return whether a copy of this process can compute what this one can, on a core of its own.

    A fork has none of its parent's other threads. Where torch is imported, its computations could
    wait for such a thread forever.
    """
    if sys.platform != "linux" or "torch" in sys.modules:
        return False
    try:
        threads = [*Path("/proc/self/task").iterdir()]
    except OSError:
        return False
    return len(threads) == 1 and len(os.sched_getaffinity(0)) > 1


def _compute(work: Work, receiving: Connection, results: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Its own end would keep the pipe open: it would wait for a reader after its parent was killed.
    receiving.close()
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        # pytest attributes all output to the test that runs at that moment.
        os.dup2(nothing, stream)
    for key, compute in work.items():
        result = {}
        # What fails, fails again in the test.
        with suppress(Exception):
            result[key] = compute()
        results.send((key, result))
