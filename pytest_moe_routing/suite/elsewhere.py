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
        work: What the copy computes, in this order; nothing where a copy is of no use, see
            `can_copy`.
    """

    def __init__(self, work: Work) -> None:
        self._pending = set(work)
        self._results: dict[Hashable, Any] = {}
        if not work:
            return
        fork = multiprocessing.get_context("fork")
        self._receiving, sending = fork.Pipe(duplex=False)
        self._copy = fork.Process(target=_compute, args=(work, sending), daemon=True)
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
        if hasattr(self, "_copy"):
            self._copy.terminate()
            self._copy.join()
            self._receiving.close()


@contextmanager
def computing(work: Work) -> Iterator[Elsewhere]:
    """Provide the results of a copy of this process, where there can be one."""
    elsewhere = Elsewhere(work if can_copy() else {})
    try:
        yield elsewhere
    finally:
        elsewhere.close()


def can_copy() -> bool:
    """Return whether a copy of this process can compute what this one can, on a core of its own.

    Threads are not copied, be they Python's or a library's. torch's would be missed by what it
    computes.
    """
    if sys.platform != "linux" or "torch" in sys.modules:
        return False
    try:
        threads = [*Path("/proc/self/task").iterdir()]
    except OSError:
        return False
    return len(threads) == 1 and len(os.sched_getaffinity(0)) > 1


def _compute(work: Work, results: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        # Where they lead to belongs to the test that is running by now.
        os.dup2(nothing, stream)
    for key, compute in work.items():
        result = {}
        # What fails, fails again in the test.
        with suppress(Exception):
            result[key] = compute()
        results.send((key, result))
