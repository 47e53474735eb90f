"""The child's side of a probe: answers questions on stdin, one JSON object a line.

Whatever the framework prints goes to stderr: the answers have their own copy of stdout.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from pytest_moe_routing.errors import Unsupported


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Answer `{"question": name, ...arguments}` with `handlers[name](**arguments)` until EOF.

    The answer is `{"answer": ...}`, `{"unsupported": reason}` or `{"error": its last lines}`.
    """
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            reply = {"answer": handlers[arguments.pop("question")](**arguments)}
        except Unsupported as reason:
            reply = {"unsupported": str(reason)}
        except Exception:
            # The framework's failure is an answer too.
            reply = {"error": traceback.format_exc(limit=-3)}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
