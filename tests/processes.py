"""Whether a process is alive, for tests of what ends which process."""

from __future__ import annotations

import os
import time
from pathlib import Path


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until_gone(pid):
    for _ in range(100):
        if not is_alive(pid):
            return True
        time.sleep(0.1)
    return False
