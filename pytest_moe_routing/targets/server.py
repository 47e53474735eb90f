"""The child's side of a probe: runs the code that is judged, and answers questions about it.

Everything that answering needs is bound before a framework is imported, so that what a framework
patches, prints, closes or leaves running reaches no answer.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import select
import shutil
import signal
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from json import JSONDecoder, JSONEncoder
from pathlib import Path
from queue import SimpleQueue
from traceback import format_exception, walk_tb
from typing import Any

from pytest_moe_routing.errors import Unsupported, place_of
from pytest_moe_routing.escape import excerpt, shorten

#: Before each message: a mark, its number, and the bytes that follow.
HEADER = struct.Struct(">4sIQ")
MARK = b"MoE\n"
#: In the folder of a child: its standard error, where it was at the deadline, and its home.
LOG, STACK, HOME = "log", "stack", "home"
#: Lines of an exception's text and characters of each that are told.
_LINES, _WIDTH = 30, 500
#: The largest file that judged code may write: its log is one.
_FILE_BYTES = 64_000_000
#: Processes and threads that judged code may add to those of the user.
_TASKS = 4096
#: Bytes by which a process may grow until objects that refer to each other are looked for. Python
#: does so by their number, and a layer of a few objects has hundreds of megabytes of weights.
_GROWTH = 2**29
#: Bytes of a page of memory; 0 where the system does not tell.
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
#: What reads how much there is in use, with every question: a file object takes ten times as long.
#: A framework may patch these later.
_OPEN, _READ, _CLOSE = os.open, os.read, os.close

#: The one channel of this process. It is opened before a framework's module, which calls `serve`,
#: is imported.
_channel: _Channel | None = None


class _Channel:
    """Requests from the parent and answers to it, on descriptors that no other process gets.

    Args:
        seconds: After which a question's stack is written, if it is not answered by then.
        stack: Where.
    """

    def __init__(self, seconds: float, stack: Path) -> None:
        self._requests, self._answers = os.dup(0), os.dup(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        # What a framework prints goes to the log.
        os.dup2(2, 1)
        self._seconds = seconds
        self._stack = stack.open("wb")
        self._waiting: SimpleQueue[tuple[int, bytes]] = SimpleQueue()
        self._read, self._write, self._exit = os.read, os.write, os._exit
        self._later, self._cancel = (
            faulthandler.dump_traceback_later,
            faulthandler.cancel_dump_traceback_later,
        )
        # Now, as code that holds the interpreter's lock would keep `_listen` from doing it.
        self._later(seconds, file=self._stack)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._close)
        threading.Thread(target=self._listen, name="moe-routing", daemon=True).start()

    def _close(self) -> None:
        for descriptor in (self._requests, self._answers):
            os.close(descriptor)

    def _listen(self) -> None:
        """Take requests, whatever the main thread does."""
        while (message := self._message()) is not None:
            self._later(self._seconds, file=self._stack)
            self._waiting.put(message)
        # The parent is gone.
        self._exit(0)

    def _message(self) -> tuple[int, bytes] | None:
        header = self._bytes(HEADER.size)
        if header is None:
            return None
        _, number, size = HEADER.unpack(header)
        data = self._bytes(size)
        return None if data is None else (number, data)

    def _bytes(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            more = self._read(self._requests, size - len(data))
            if not more:
                return None
            data += more
        return data

    def next(self) -> tuple[int, bytes]:
        """Wait for a request."""
        return self._waiting.get()

    def answer(self, number: int, data: bytes) -> None:
        """Send an answer."""
        self._cancel()
        message = memoryview(HEADER.pack(MARK, number, len(data)) + data)
        while message:
            message = message[self._write(self._answers, message) :]


def main(*, guards: bool = False) -> None:
    """Open the channel, take on the limits, and run the module that serves.

    The command line is a mapping of settings as JSON, the module and the module's own arguments.

    Args:
        guards: Whether this process itself sees to it that it ends with its parent.
    """
    global _channel
    settings = JSONDecoder().decode(sys.argv[1])
    module, sys.argv = sys.argv[2], sys.argv[2:]
    folder = Path(settings["folder"])
    if guards:
        _guard(folder)
    # While the framework is imported there is nothing to free, and much to look at.
    gc.disable()
    faulthandler.enable(all_threads=False)
    _channel = _Channel(settings["seconds"], folder / STACK)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _limit(settings["memory"])
    warnings.simplefilter("ignore")
    # What a module leaves to run at the end, or in threads, must not keep the parent waiting.
    try:
        served = import_module(module)
        # What is judged stays as it is; this package may keep what it compiles.
        sys.dont_write_bytecode = True
        served.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        sys.stderr.write("".join(format_exception(error, limit=-3)))
        code = 1
    else:
        code = 0
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _guard(folder: Path) -> None:
    """Leave a process behind that ends this group of processes when the parent is gone.

    Not a thread, as this process may be stopped, or hold the interpreter's lock for ever.
    """
    if not hasattr(os, "fork") or os.getpgrp() != os.getpid() or os.fork():
        return
    os.close(1)
    requests = select.poll()
    # Nothing to read is of interest, only that there is nobody to write.
    requests.register(0, 0)
    requests.poll()
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _limit(memory: int) -> None:
    """Take on the limits that the system has."""
    try:
        import resource
    except ImportError:
        return
    wanted = {"DATA": memory, "CORE": 0, "FSIZE": _FILE_BYTES}
    # The limit counts all processes of a user, and does not hold for root.
    if hasattr(os, "getuid") and os.getuid() and (tasks := _tasks(os.getuid())):
        wanted["NPROC"] = tasks + _TASKS
    for name, value in wanted.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _tasks(user: int) -> int:
    """Count the processes and threads of a user; 0 where the system does not tell."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == user:
                count += len(os.listdir(process / "task"))  # noqa: PTH208
        except OSError:
            continue
    return count


class Collector:
    """Frees what nobody refers to any longer, as often as a process has grown by `_GROWTH`.

    Args:
        size: Returns the bytes that the process has in memory; 0 where the system does not tell.
    """

    def __init__(self, size: Callable[[], int]) -> None:
        # Bound now: judged code may replace it.
        self._size, self._collect, self._last = size, gc.collect, size()

    def look(self) -> None:
        """Free memory if there may be much to free."""
        if self._size() - self._last > _GROWTH:
            self._collect()
            self._last = self._size()


def _resident() -> int:
    """Return the bytes of this process that are in memory; 0 where the system does not tell."""
    try:
        file = _OPEN("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return 0
    try:
        pages = _READ(file, 100).split()[1]
    finally:
        _CLOSE(file)
    return int(pages) * _PAGE


def serve(handlers: Mapping[str, Callable[..., Any]], package: str = "") -> None:
    """Answer lists of `{"question": name, "arguments": {...}}` with `handlers[name](**arguments)`.

    A reply is `{"answer": ...}`, `{"unsupported": reason}` or `{"error": {"type": ..., "line":
    place, type and message in one line, "text": the end of its traceback}}`. Does not return.

    Args:
        package: The package whose code is judged, for the place.
    """
    assert _channel is not None
    decode, encode = JSONDecoder().decode, JSONEncoder().encode
    leave_out_of_collections, collect_automatically = gc.freeze, gc.enable
    collector = Collector(_resident)
    while True:
        number, data = _channel.next()
        replies = []
        for request in decode(data.decode("utf-8")):
            try:
                reply = encode({"answer": handlers[request["question"]](**request["arguments"])})
            except Unsupported as reason:
                reply = encode({"unsupported": excerpt(str(reason), _LINES, _WIDTH)})
            except Exception as error:
                # The framework's failure is an answer too.
                name = type(error).__name__
                line = f"{_place(error, package)}: {_message(error)}"
                reply = encode({"error": {"type": name, "line": line, "text": _told(error)}})
            replies.append(reply)
            collector.look()
        _channel.answer(number, f"[{','.join(replies)}]".encode())
        if number == 1:
            # The framework is imported by now. A fifth of the time went into looking at it again.
            leave_out_of_collections()
            collect_automatically()


def _place(error: Exception, package: str) -> str:
    """Return the innermost line of the package's code, as `PACKAGE/FILE:LINE`.

    If an exception came through none of it, the line is one of this package's code.
    """
    places = (place_of(frame, line) for frame, line in walk_tb(error.__traceback__))
    lines = {place.partition("/")[0]: place for place in places}
    # This module called what raised.
    return lines.get(package) or lines[__name__.partition(".")[0]]


def _message(error: Exception) -> str:
    """Return an exception's type and message, in one line."""
    name = type(error).__name__
    try:
        text = shorten(str(error), _WIDTH)
    except Exception:
        # Its own text may be what fails.
        return name
    return f"{name}: {text}" if text else name


def _told(error: Exception) -> str:
    try:
        lines = "".join(format_exception(error, limit=-3))
    except Exception:
        # Its own text may be what fails.
        return type(error).__name__
    return excerpt(lines, _LINES, _WIDTH)
