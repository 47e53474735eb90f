"""Hostile files for every reader, through the command line: one line, soon, and in little memory.

The messages themselves are in the tests of each reader; what is generated here is the whole corpus.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

from test_inputs import (
    NAME,
    bomb,
    corrupt,
    encrypted,
    huge_directory,
    truncated,
    unknown_compression,
)
from test_yaml_nodes import HOSTILE

#: As large as a file may be, of what takes longest to read.
LARGE = 990_000
YAML = {name: text for name, (text, _) in HOSTILE.items()}
LARGE_YAML = {
    "lines": "k: v\n" * (LARGE // 5),
    "keys": "".join(f"k{n}: v\n" for n in range(LARGE // 12)),
    "comments": "# c\n" * (LARGE // 4) + "x",
    "plain": "a: " + "word " * (LARGE // 5),
    "plain lines": "a: " + "word\n  " * (LARGE // 7),
    "quoted": 'a: "' + "\\n" * (LARGE // 2) + '"',
    "block": "a: |\n" + " x\n" * (LARGE // 3),
    "anchors": "".join(f"- &a{n} x\n" for n in range(LARGE // 14)),
    "brackets": "[" * LARGE,
    "braces": "{" * LARGE,
    "dashes": "- " * (LARGE // 2),
    "questions": "? " * (LARGE // 2),
    "one key": "k" * LARGE + ": v",
    "documents": "--- a\n" * (LARGE // 6),
}
RUNNER = Path(__file__).with_name("forked.py")


def outcomes(cases):
    """What became of each command line, by its name."""
    done = subprocess.run(
        [sys.executable, str(RUNNER)],
        input=json.dumps([list(map(str, case)) for case in cases.values()]),
        capture_output=True,
        text=True,
        check=True,
    )
    # The last line: pytest may have printed before.
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


def is_refused(found, code, begin):
    lines = [line for line in found["err"].splitlines() if line]
    return (
        found["code"] == code
        and len(lines) == 1
        and lines[0].startswith(begin)
        and len(lines[0]) < 2_000
        and lines[0].isprintable()
        and found["megabytes"] < 500
    )


# -- what no file should be ------------------------------------------------------------------------


def big(path):
    with path.open("wb") as file:
        file.truncate(20_000_000_000)


NO_FILES = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "directory": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
    "sparse": big,
    "missing": lambda path: None,
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 100),
    "utf-16": lambda path: path.write_text("a: 1\n", "utf-16"),
    "empty bytes": lambda path: path.write_bytes(bytes(1000)),
}
JSON = {
    "digits": '{"model_type": ' + "9" * 5000 + "}",
    "infinite": '{"model_type": 1e999}',
    "nan": '{"model_type": NaN}',
    "nesting": "[" * 100_000,
    "deep": '{"a":' * 900 + "1" + "}" * 900,
    "twice": '{"a": 1, "a": 2}',
    "surrogate": '{"model_type": "\\ud800"}',
    "escape": '{"model_type": "\\u001b[2J"}',
    "architectures": json.dumps({"architectures": ["x" * 1_000_000]}),
    "many": "{" + ",".join(f'"k{n}": {{}}' for n in range(200_000)) + "}",
    "list": "[]",
    "text": '"x"',
    "cut": '{"model_type": "deep',
}


def write_all(folder, texts, suffix):
    made = {}
    for place, (name, text) in enumerate(texts.items()):
        path = folder / f"m{place}{suffix}"
        path.write_text(text, "utf-8", "surrogatepass")
        made[name] = path
    for place, (name, make) in enumerate(NO_FILES.items()):
        path = folder / f"n{place}{suffix}"
        make(path)
        made[name] = path
    return made


def test_model_files_and_configs_and_reports(tmp_path):
    cases = {}
    for place, (name, text) in enumerate({**YAML, **LARGE_YAML}.items()):
        folder = tmp_path / f"y{place}"
        folder.mkdir()
        (folder / "model.yaml").write_text(text, "utf-8", "surrogatepass")
        cases["model", name] = ("moe-routing", "explain", folder / "model.yaml")
    for name, path in write_all(tmp_path, JSON, ".json").items():
        cases["config", name] = ("moe-routing", "explain", path)
    (tmp_path / "reports").mkdir()
    for name, path in write_all(tmp_path / "reports", JSON, ".jsonl").items():
        out = tmp_path / "out.md"
        cases["report", name] = ("moe-routing", "report", out, path)
    for name, found in outcomes(cases).items():
        assert is_refused(found, 2, "moe-routing: "), (name, found)
    assert not (tmp_path / "out.md").exists()


def test_ledgers_and_golden_directories_and_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("test_x.py").write_text("def test_x(): pass\n")
    Path("pytest.ini").write_text("[pytest]\n")
    cases = {}
    for name, path in write_all(tmp_path, YAML, ".yaml").items():
        cases["ledger", name] = ("pytest", "--moe-known-failures", path)
    for place, name in enumerate(("alias bomb as a key", "merge bomb", "nesting", "values")):
        folder = tmp_path / f"golden{place}/m"
        folder.mkdir(parents=True)
        (folder / "model.yaml").write_text(YAML[name])
        cases["golden", name] = ("pytest", "--moe-golden", "--moe-golden-dir", folder.parent)
    for place, (name, make) in enumerate(NO_FILES.items()):
        folder = tmp_path / f"nothing{place}/m"
        folder.mkdir(parents=True)
        make(folder / "model.yaml")
        cases["golden", name] = ("pytest", "--moe-golden", "--moe-golden-dir", folder.parent)
        config = tmp_path / f"n{place}.yaml"
        cases["config", name] = ("pytest", "--moe-golden", "--moe-config", config)
    for option in ("--moe-min-gpu-tests", "--moe-flashinfer"):
        for value in ("9" * 5000, "9" * 200, "-1", "\u0663", "1e9", "x\x1b[2J"):
            cases[option, value] = ("pytest", "--moe-golden", f"{option}={value}")
    for target in ("os:system", "nosuch:X", ":", "a:", "vllm@", "vllm@/dev/zero", "builtin@x"):
        cases["target", target] = ("pytest", "--moe-golden", f"--moe-target={target}")
    for name, found in outcomes(cases).items():
        assert is_refused(found, 4, "ERROR: "), (name, found)


def metadata(text):
    def make(path):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("vllm/__init__.py", "")
            file.writestr("flashinfer/fused_moe/core.py", text)
            file.writestr(NAME, text)

    return make


def unpacks_to(size):
    def make(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("vllm/__init__.py", "")
            for name in (NAME, "flashinfer/fused_moe/core.py"):
                with file.open(name, "w", force_zip64=True) as member:
                    for _ in range(size // 10_000_000):
                        member.write(bytes(10_000_000))

    return make


def many_members(path):
    """Says that it has a million files."""
    metadata("Version: 1\n")(path)
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    data[end + 8 : end + 12] = struct.pack("<HH", 65_535, 65_535)
    path.write_bytes(data)


def several(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("vllm/__init__.py", "")
        for n in range(500):
            file.writestr(f"vllm-{n}.dist-info/METADATA", "Version: 1\n")


WHEELS = {
    "not UTF-8": metadata(b"Version: \xff\n"),
    "unpacks to 300 MB": unpacks_to(300_000_000),
    "several": several,
    "encrypted": encrypted,
    "compression 99": unknown_compression,
    "bomb": bomb,
    "huge directory": huge_directory,
    "truncated": truncated,
    "corrupt": corrupt,
    **NO_FILES,
}
#: What flashinfer's reader has besides: Python that is none.
PYTHON = {
    "NUL": metadata("a = \0"),
    "parentheses": metadata("(" * 100_000),
    "operators": metadata("-" * 300_000 + "1"),
    "dots": metadata("a" + ".a" * 200_000),
    "digits": metadata("class E(Enum):\n  a = " + "9" * 5000),
    "no release": metadata("def trtllm_x_moe(a=" + "[" * 50 + "]" * 50 + "): pass"),
    "surrogates": metadata("a = '\\ud800'"),
}


def test_wheels(tmp_path):
    cases = {}
    for place, (name, make) in enumerate({**WHEELS, **PYTHON}.items()):
        path = tmp_path / f"w{place}.whl"
        make(path)
        if name in WHEELS:
            cases["history", name] = ("moe-routing", "history", "vllm", path)
        if name not in ("several",):
            cases["flashinfer", name] = ("moe-routing", "drift", "flashinfer", path)
    for name, found in outcomes(cases).items():
        assert is_refused(found, 2, "moe-routing: "), (name, found)
