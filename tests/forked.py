"""Runs command lines one after the other, each in a fork with limits, and tells what became of them.

`python forked.py < cases.json`: a list of `[program, *arguments]`, where the program is `moe-routing`
or `pytest`. Prints a list of `{"code", "out", "err", "megabytes"}`; a code is negative if a limit ended it.
A fork has imported everything already, so that hundreds of command lines take seconds.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile

import pytest

from pytest_moe_routing import plugin  # noqa: F401
from pytest_moe_routing.cli import main
from pytest_moe_routing.flashinfer import drift  # noqa: F401
from pytest_moe_routing.models import load_models  # noqa: F401
from pytest_moe_routing.report import files, history  # noqa: F401

CPU_SECONDS, WAITED_SECONDS, ADDRESS_BYTES = 5, 60, 2 << 30


def run(program, *arguments):
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
    signal.alarm(WAITED_SECONDS)
    if program == "pytest":
        return int(pytest.main(["-p", "no:cacheprovider", "-p", "no:faulthandler", *arguments]))
    with contextlib.suppress(SystemExit):
        return main(arguments)
    return 99


def forked(case):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if not pid:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = 98
            try:
                code = run(*case)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        _, status, usage = os.wait4(pid, 0)
        out.seek(0)
        err.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "out": out.read(),
            "err": err.read(),
            "megabytes": usage.ru_maxrss // 1000,
        }


if __name__ == "__main__":
    print(json.dumps([forked(case) for case in json.load(sys.stdin)]))
