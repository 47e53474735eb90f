"""Children that are forks of one process, see `fork_server`; used like those of `subprocess`."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

from pytest_moe_routing.targets.fork_server import REQUEST_BYTES, TOLD

#: Seconds after which it is looked again whether a process exists.
_PAUSE = 0.05


class Forked:
    """A process that is being forked.

    Attributes:
        stdin, stdout: Our ends of its pipes.
        told: The end of one on which it is told what becomes of it.
        pid: Its id, which is that of its group as well; None as long as it is not forked.
    """

    def __init__(self, stdin: int, stdout: int, told: int) -> None:
        self.stdin: IO[bytes] = os.fdopen(stdin, "wb", buffering=0)
        self.stdout: IO[bytes] = os.fdopen(stdout, "rb", buffering=0)
        os.set_blocking(told, False)
        self.told: IO[bytes] = os.fdopen(told, "rb", buffering=0)
        self._pid: int | None = None
        self._code: int | None = None
        self._is_over = False

    @property
    def pid(self) -> int | None:
        self._listen(0)
        return self._pid

    def poll(self) -> int | None:
        """Return how it ended, as a return code; None if it has not."""
        self._listen(0)
        if self._code is not None:
            return self._code
        # Nobody tells its end if the server is gone: the process may go on.
        is_gone = self._is_over and not (self._pid and _exists(self._pid))
        return -signal.SIGKILL if is_gone else None

    def wait(self, timeout: float) -> int:
        """Wait for its end, and return how it ended.

        Raises:
            subprocess.TimeoutExpired: It did not.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired("a fork", timeout)
            if self._is_over:
                time.sleep(min(left, _PAUSE))
            self._listen(left)
        return code

    def _listen(self, seconds: float) -> None:
        """Note what is told, for so long at most."""
        if self._is_over:
            return
        waiting = select.poll()
        try:
            waiting.register(self.told, select.POLLIN)
            # Nothing is left if another thread has read it.
            data = self.told.read(TOLD.size) if waiting.poll(seconds * 1000) else None
        except ValueError:
            # Another thread has ended it.
            data = b""
        self._is_over = data == b""
        for has_ended, number in TOLD.iter_unpack(data or b""):
            if has_ended:
                self._code = number
            else:
                self._pid = number


def _exists(pid: int) -> bool:
    """Return whether a process has not ended; nobody may have asked yet how it did."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except OSError:
        return False
    # The state follows the name, which is in brackets and may have any in it.
    return stat.rpartition(")")[2].split()[0] not in "ZX"


class _ForkServer:
    """A running fork server.

    Args:
        program: Runs it, given the descriptor where requests come from.
        environment: Returns what it sees of the environment, given its home.
    """

    def __init__(self, program: str, environment: Callable[[Path], Mapping[str, str]]) -> None:
        self._owner = os.getpid()
        home = Path(tempfile.mkdtemp(prefix="moe-routing-"))
        self._gate, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", program, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=home,
                env=dict(environment(home)),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        # It ends when nobody can ask any more.
        weakref.finalize(self, _leave, self._gate, process, home, self._owner)

    def is_ours(self) -> bool:
        """Return whether this process has started it, and not one of which this is a copy."""
        return self._owner == os.getpid()

    def fork(self, request: bytes, log: int) -> Forked:
        """Ask for a child; return it before it is forked.

        Raises:
            OSError: The server is gone.
        """
        (stdin, ours), (out, stdout), (told, tells) = os.pipe(), os.pipe(), os.pipe()
        theirs = [stdin, stdout, log, tells]
        try:
            socket.send_fds(self._gate, [request], theirs)
        except OSError:
            for descriptor in (ours, out, told):
                os.close(descriptor)
            raise
        finally:
            for descriptor in (stdin, stdout, tells):
                os.close(descriptor)
        return Forked(ours, out, told)


def _leave(gate: socket.socket, process: subprocess.Popen[bytes], home: Path, owner: int) -> None:
    gate.close()
    if os.getpid() == owner:
        process.wait()
        shutil.rmtree(home, ignore_errors=True)


_server: _ForkServer | None = None
#: Held by the thread that starts a server: one that nobody keeps ends, and its children with it.
_starting = threading.Lock()


@cache
def can_fork() -> bool:
    """Return whether the system has what a fork server needs, and lets this process have it."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def forked(
    program: str,
    environment: Callable[[Path], Mapping[str, str]],
    request: Mapping[str, Any],
    log: int,
) -> Forked | None:
    """Return a child of the fork server, which is started for the first one.

    None if the server is gone, or if the request is larger than what it reads: the rest would be
    lost.

    Args:
        program, environment: Those of the server.
        request: See `fork_server.main`.
        log: Where the standard error of the child goes.
    """
    global _server
    data = json.dumps(request).encode()
    if len(data) > REQUEST_BYTES:
        return None
    with _starting:
        if _server is None or not _server.is_ours():
            _server = _ForkServer(program, environment)
        server = _server
    try:
        return server.fork(data, log)
    except ConnectionError:
        with _starting:
            # Another thread may have replaced it.
            _server = None if _server is server else _server
        return None
    except OSError:
        # Such as too many open files: the server stays, as it would end its children with itself.
        return None
