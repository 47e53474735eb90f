"""A sample of single changes of the package, code and data, each judged by its module's own tests.

    python tests/sampled_mutants.py                    # 40 changes; the seed is the commit
    python tests/sampled_mutants.py --seed 7 --count 100 --jobs 2
    python tests/sampled_mutants.py --only compare/moe.py --count 1000

A change survives if the tests pass with it. `sampled_mutants.yaml` says which tests judge a file, and
which survivors are accepted, each with a reason. Any other survivor makes the run fail.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml
from code_mutants import of_code, of_data

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "pytest_moe_routing"
TABLE = Path(__file__).with_suffix(".yaml")

#: Seconds beyond which the tests of a change hang, as a multiple of what they take without it.
PATIENCE = 5


@dataclass(frozen=True)
class Change:
    """One change of a file of the package.

    Attributes:
        file: Path in the package.
        place: The function, or the key of a data file.
        how: What is changed, and which of several such places in it.
        make: Returns the whole file after the change.
    """

    file: str
    place: str
    how: str
    make: Callable[[], str]

    def __str__(self) -> str:
        return f"{self.file} {self.place}: {self.how}"


def files() -> list[str]:
    """Code and data of the package, but for its `__init__.py`, which only names what others hold."""
    package = ROOT / PACKAGE
    paths = [*package.rglob("*.py"), *package.rglob("*.yaml")]
    return sorted(
        path.relative_to(package).as_posix() for path in paths if path.name != "__init__.py"
    )


def changes(file: str) -> Iterator[Change]:
    """Every change of one file."""
    text = (ROOT / PACKAGE / file).read_text(encoding="utf-8")
    make = of_code if file.endswith(".py") else of_data
    for place, how, changed in make(text):
        yield Change(file, place, how, changed)


def table() -> dict:
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def judges(file: str, rows: dict[str, list[str]]) -> list[str]:
    """The tests of a file: those of its own row, or of the row of its folder."""
    fitting = [row for row in rows if file == row or (row.endswith("/") and file.startswith(row))]
    return rows[max(fitting, key=len)] if fitting else []


def accepted(change: Change, reasons: dict) -> str | None:
    return reasons.get(change.file, {}).get(change.place, {}).get(change.how)


class Copy:
    """A copy of what git tracks, in which one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tracked = [
            "git",
            "-C",
            str(ROOT),
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ]
        listed = subprocess.run(tracked, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)

    def run(self, tests: list[str], limit: float | None = None) -> bool:
        """Whether the tests pass; tests that take longer than the limit fail."""
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
        command = [sys.executable, "-m", "pytest", *options, *(f"tests/{test}" for test in tests)]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        quiet = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
        }
        with subprocess.Popen(
            command, cwd=self.folder, env=environment, start_new_session=True, **quiet
        ) as process:
            try:
                return process.wait(limit) == 0
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                return False

    def survives(self, change: Change, text: str, limit: float) -> bool:
        """Whether the tests of the changed file pass."""
        path = self.folder / PACKAGE / change.file
        before = path.read_text(encoding="utf-8")
        path.write_text(text, encoding="utf-8")
        try:
            return self.run(judges(change.file, table()["tests"]), limit)
        finally:
            path.write_text(before, encoding="utf-8")


def limits(sample: list[Change], copy: Copy) -> dict[str, float]:
    """How long the tests of each file may take; they must pass without a change."""
    rows, known, found = table()["tests"], {}, {}
    for change in sample:
        tests = tuple(judges(change.file, rows))
        if tests not in known:
            start = time.monotonic()
            if not copy.run(list(tests)):
                sys.exit(f"these tests fail without any change: {' '.join(tests)}")
            known[tests] = 30 + PATIENCE * (time.monotonic() - start)
        found[change.file] = known[tests]
    return found


def drawn(seed: str, count: int, only: list[str]) -> list[Change]:
    """A sample of all changes; each file is as likely as its number of changes."""
    names = [file for file in files() if not only or any(part in file for part in only)]
    everything = [change for file in names for change in changes(file)]
    return random.Random(seed).sample(everything, min(count, len(everything)))


def commit() -> str:
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", help="of the sample; the default is the commit")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="parts of files' names")
    parser.add_argument("--matching", default="", help="a pattern in a change, as it is printed")
    how = parser.parse_args()
    seed = how.seed or commit()
    if how.matching:
        sample = [c for c in drawn(seed, 10**9, how.only) if re.search(how.matching, str(c))][
            : how.count
        ]
    else:
        sample = drawn(seed, how.count, how.only)
    reasons, unexplained = table()["accepted"], []
    with tempfile.TemporaryDirectory() as folder:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for number in range(how.jobs):
            copies.put(Copy(Path(folder, str(number))))
        first = copies.get()
        allowed = limits(sample, first)
        copies.put(first)

        def judged(work: tuple[Change, str]) -> bool:
            (change, text), copy = work, copies.get()
            try:
                return copy.survives(change, text, allowed[change.file])
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(how.jobs) as pool:
            work = [(change, change.make()) for change in sample]
            for change, survives in zip(sample, pool.map(judged, work), strict=True):
                reason = accepted(change, reasons)
                state = "killed" if not survives else "accepted" if reason else "SURVIVES"
                print(f"{state:9}{change}", flush=True)
                unexplained += [change] if state == "SURVIVES" else []
    print(f"{len(sample)} changes, seed {seed}: {len(unexplained)} survive without a reason")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
