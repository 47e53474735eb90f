"""The process whose forks are children: it has imported torch, which takes over a second.

A child that starts by itself takes a third of its processor time for that, and a framework has six.
This process runs no code that is judged, asks nothing and answers nothing.
"""

from __future__ import annotations

import gc
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from pytest_moe_routing.targets import server

#: Bytes of a request, and how many descriptors come with it: the child's three, and the end of a
#: pipe on which it is told what becomes of it.
REQUEST_BYTES, DESCRIPTORS = 1 << 17, 4
#: Whether it has ended, and then how; else its id.
TOLD = struct.Struct("=?i")
#: What has been imported before the first fork.
_IMPORTED = ("torch",)


class _Forks:
    """The children of this process, which are ended when the process that asked for them is gone.

    Args:
        gate: Where requests come from.
    """

    def __init__(self, gate: socket.socket) -> None:
        self._gate = gate
        self._waiting = select.poll()
        self._waiting.register(gate, select.POLLIN)
        #: By the descriptor that is ready when a child has ended: its id, and where that is told.
        self._ends: dict[int, tuple[int, int]] = {}
        #: By a child's standard input, which nobody writes to when its parent is gone: its id, and
        #: its folder.
        self._inputs: dict[int, tuple[int, str]] = {}

    def serve(self) -> Mapping[str, Any]:
        """Fork a child for each request; in a child, return what was asked for."""
        while True:
            ready = {descriptor for descriptor, _ in self._waiting.poll()}
            for descriptor in ready:
                if descriptor in self._ends:
                    self._tell(descriptor)
                elif descriptor in self._inputs:
                    self._end(descriptor)
            # Last, as the descriptors of a request may have the numbers of those closed before.
            if self._gate.fileno() in ready and (asked := self._fork()) is not None:
                return asked

    def _fork(self) -> Mapping[str, Any] | None:
        data, descriptors, _, _ = socket.recv_fds(self._gate, REQUEST_BYTES, DESCRIPTORS)
        if not data:
            for descriptor in list(self._inputs):
                self._end(descriptor)
            os._exit(0)
        asked: dict[str, Any] = json.loads(data)
        try:
            child = os.fork()
        except OSError:
            # Then nothing is told of it, and its output has an end.
            for descriptor in descriptors:
                os.close(descriptor)
            return None
        if child == 0:
            self._leave(descriptors)
            return asked
        stdin, stdout, log, status = descriptors
        os.close(stdout)
        os.close(log)
        end = os.pidfd_open(child)
        self._ends[end], self._inputs[stdin] = (child, status), (child, asked["folder"])
        self._waiting.register(end, select.POLLIN)
        # Nothing to read is of interest, only that there is nobody to write.
        self._waiting.register(stdin, 0)
        return None

    def _leave(self, descriptors: Sequence[int]) -> None:
        """In a child: begin a session, and say so; keep only the child's own descriptors."""
        os.setsid()
        os.write(descriptors[3], TOLD.pack(False, os.getpid()))
        self._gate.close()
        for number, descriptor in enumerate(descriptors[:3]):
            os.dup2(descriptor, number)
        told = (status for _, status in self._ends.values())
        for descriptor in (*descriptors, *self._ends, *self._inputs, *told):
            os.close(descriptor)

    def _tell(self, end: int) -> None:
        """Tell how a child ended; its id stays taken, for those that it started."""
        child, status = self._ends.pop(end)
        self._waiting.unregister(end)
        os.close(end)
        found = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert found is not None
        code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        with suppress(BrokenPipeError):
            os.write(status, TOLD.pack(True, code))
        os.close(status)

    def _end(self, stdin: int) -> None:
        """End a child and all that it started: the process that asked for it is gone."""
        child, folder = self._inputs.pop(stdin)
        self._waiting.unregister(stdin)
        os.close(stdin)
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            # It has begun no session yet.
            os.kill(child, signal.SIGKILL)
        for end, (each, _) in list(self._ends.items()):
            if each == child:
                self._tell(end)
        os.waitpid(child, 0)
        shutil.rmtree(folder, ignore_errors=True)


def main(own_places: Sequence[str]) -> None:
    """Import what children need, and fork them.

    The command line is the descriptor where requests come from. A request is a mapping as JSON: the
    `folder` of a child, its `home`, `environment`, `places` of modules and `arguments`, which are
    those of `server.main`; and whether it may `keep_bytecode`.

    Args:
        own_places: Those in which this process looks for modules before any others.
    """
    gc.disable()
    for name in _IMPORTED:
        # A child that needs it tells what is wrong with it.
        with suppress(Exception):
            import_module(name)
    gc.freeze()
    asked = _Forks(socket.socket(fileno=int(sys.argv[1]))).serve()
    os.chdir(asked["home"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    tempfile.tempdir = None
    sys.path[:] = [*own_places, *(p for p in asked["places"] if p not in own_places)]
    sys.dont_write_bytecode = not asked["keep_bytecode"]
    sys.argv = ["-c", *asked["arguments"]]
    # Until now, all have the name of this process.
    with suppress(OSError):
        Path("/proc/self/comm").write_text(asked["arguments"][1].rpartition(".")[2])
    server.main()
