"""Answers that are kept between runs: as long as nothing changes that they depend on."""

from __future__ import annotations

import json
import os
import textwrap
import zipfile
import zlib
from pathlib import Path

import pytest

from pytest_moe_routing import options
from pytest_moe_routing.errors import TargetError, Unsupported
from pytest_moe_routing.targets import kept
from pytest_moe_routing.targets.kept import Store, key_of_sources
from pytest_moe_routing.targets.probe import Probe

CHILD = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.server import serve

def imported():
    import mini.gates
    places = (module.__file__ for name, module in sys.modules.items() if name.startswith("mini"))
    return sorted(os.path.relpath(place, sys.argv[1]) for place in places)

def answer(n):
    if n < 0:
        raise Unsupported("less than nothing")
    return 12 // n

def main():
    serve({"imported": imported, "answer": answer, "end": lambda: os._exit(3)})
"""
FILES = {
    "mini/__init__.py": "",
    "mini/gates.py": "from mini.experts import base",
    "mini/experts/__init__.py": "",
    "mini/experts/base.py": "import mini.experts",
    "mini/models.py": "never = 'imported, and read as text'",
}


@pytest.fixture
def tree(tmp_path):
    """A framework's sources."""
    for name, text in FILES.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)
    return tmp_path / "tree"


@pytest.fixture
def probe(tmp_path, tree, monkeypatch):
    """A function that makes a probe of the tree, with the answers of the probes before it."""
    (tmp_path / "child_of_mini.py").write_text(textwrap.dedent(CHILD))
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "kept"
    made = []

    def make(release="0.7.1", make_folder=None, **more):
        one = Probe("mini", "child_of_mini", str(tree), release, answers={"answer": int}, **more)
        made.append(one)
        sources = key_of_sources(tree, "mini", ["mini"])
        one.keep(Store(folder, make_folder or (lambda: folder)), sources, tree)
        return one

    yield make
    for one in made:
        one.close()


def files(tmp_path):
    return list((tmp_path / "kept").glob("*/*"))


def test_answers_are_kept_without_a_child(probe):
    first = probe()
    assert first.ask("answer", n=4) == 3
    with pytest.raises(Unsupported):
        first.ask("answer", n=-1)
    with pytest.raises(TargetError, match="ZeroDivisionError"):
        first.ask("answer", n=0)
    first.close()

    second = probe()
    assert second.ask("answer", n=4) == 3
    with pytest.raises(Unsupported, match="less than nothing"):
        second.ask("answer", n=-1)
    assert second._child is None
    # What failed is asked again, and so is what is new.
    with pytest.raises(TargetError, match="ZeroDivisionError"):
        second.ask("answer", n=0)
    assert second._child is not None
    second.prepare("answer", [{"n": 2}, {"n": 3}])
    second.close()
    third = probe()
    assert [third.ask("answer", n=n) for n in (2, 3, 4)] == [6, 4, 3]
    assert third._child is None


def test_an_edit_of_any_imported_file_invalidates(probe, tree):
    one = probe()
    imported = one.ask("imported")
    assert imported == sorted(set(FILES) - {"mini/models.py"})
    one.close()
    # And of what was only read, or looked for.
    (tree / "mini/table.json").write_text("{}")
    for name in (*imported, "mini/models.py", "mini/table.json", "mini/new.py", "mini/_C.so"):
        before = key_of_sources(tree, "mini", ["mini"])
        with (tree / name).open("a") as file:
            file.write("\n# edited\n")
        assert key_of_sources(tree, "mini", ["mini"]) != before, name
        edited = probe()
        assert edited._earlier == {}
    assert edited.ask("answer", n=12) == 1
    edited.close()
    assert len(probe()._earlier) == 1


def test_directories_in_a_circle_of_links_are_read_once(tree, monkeypatch):
    for name in ("a", "b"):
        (tree / "mini" / name).symlink_to(tree / "mini", target_is_directory=True)
    (tree / "mini/again").symlink_to(tree / "mini/experts", target_is_directory=True)
    read = []
    monkeypatch.setattr(kept, "read_bytes", lambda path, _: read.append(path.resolve()) or b"")
    assert key_of_sources(tree, "mini", ["mini"]) is not None
    ours = [path for path in read if path.is_relative_to(tree)]
    assert len(ours) == len(FILES)
    assert set(ours) == {tree / name for name in FILES}
    # The name of a link is one that code may import.
    before = key_of_sources(tree, "mini", ["mini"])
    (tree / "mini/again").unlink()
    assert key_of_sources(tree, "mini", ["mini"]) != before


def test_an_edit_of_a_wheel_invalidates(tmp_path):
    keys = set()
    for edited in ("", *FILES):
        with zipfile.ZipFile(tmp_path / "mini.whl", "w") as wheel:
            for name, text in FILES.items():
                wheel.writestr(name, f"{text}\n# edited" if name == edited else text)
        keys.add(key_of_sources(tmp_path / "mini.whl", "mini", ["mini"]))
    assert len(keys) == 1 + len(FILES)
    assert None not in keys
    (tmp_path / "mini.whl").write_bytes(b"no wheel")
    assert key_of_sources(tmp_path / "mini.whl", "mini", ["mini"]) is None


def test_an_edit_of_this_package_invalidates(tmp_path, tree, monkeypatch):
    ours = tmp_path / "ours"
    (ours / "data").mkdir(parents=True)
    monkeypatch.setattr(kept, "_PACKAGE", ours)
    keys = set()
    for name in ("code.py", "data/facts.yaml", "code.py"):
        with (ours / name).open("a") as file:
            file.write("1\n")
        keys.add(key_of_sources(tree, "mini", ["mini"]))
    assert len(keys) == 3


def test_what_else_answers_depend_on(probe, tree, monkeypatch):
    first = probe(switches=("MINI_SWITCH",))
    assert first.ask("answer", n=4) == 3
    first.close()
    assert probe(switches=("MINI_SWITCH",))._earlier
    assert not probe(release="0.7.2", switches=("MINI_SWITCH",))._earlier
    monkeypatch.setenv("MINI_SWITCH", "1")
    assert not probe(switches=("MINI_SWITCH",))._earlier
    before = key_of_sources(tree, "mini", ["mini"])
    monkeypatch.setattr(kept, "_installed", lambda: ["torch 99"])
    assert key_of_sources(tree, "mini", ["mini"]) != before


def test_an_edit_of_an_editable_distribution_invalidates(tmp_path, tree, monkeypatch):
    """Its release stays the same, as that of a checkout of transformers."""
    site, checkout = tmp_path / "site", tmp_path / "a checkout"
    info = site / "other-1.0.dist-info"
    for folder in (info, checkout / "src", checkout / ".git"):
        folder.mkdir(parents=True)
    (info / "METADATA").write_text("Name: other\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(site)

    def key():
        kept._installed.cache_clear()
        return key_of_sources(tree, "mini", ["mini"])

    def edit(file):
        (checkout / file).write_text("edited")
        return key()

    url = {"url": checkout.as_uri(), "dir_info": {}}
    (info / "direct_url.json").write_text(json.dumps(url))
    assert key() == edit("src/other.py") is not None
    (info / "direct_url.json").write_text(json.dumps({**url, "dir_info": {"editable": True}}))
    before = key()
    assert edit(".git/index.json") == edit("notes.txt") == before
    assert len({before, edit("src/more.py"), edit("other.py"), None}) == 4
    (info / "direct_url.json").write_text("no JSON")
    assert key() is None
    monkeypatch.undo()
    kept._installed.cache_clear()


ASKED = json.dumps({"n": 4}, separators=(",", ":"))


def packed(*replies, rows=(("answer", ASKED, 0),), **more):
    return zlib.compress(json.dumps({"replies": replies, "rows": rows, **more}).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        zlib.compress(b"garbage"),
        zlib.compress(b'{"answer": 3}'),
        zlib.compress(b"[" * 100_000),
        packed(["error", 1], ["answer"], 2, None, rows=[("answer", ASKED, n) for n in range(4)]),
        packed(["answer", 999], rows=[("answer", ASKED, n) for n in (-1, 1, None, "0")]),
        packed(["answer", 999], rows=[1, None, [], ["answer", ASKED], ["answer", {"n": 4}, 0]]),
        packed(["answer", 999], rows=None),
        # Of another type than the question's answer has.
        packed(["answer", "three"]),
        packed(["answer", None]),
        # More than is read.
        packed(["answer", 999], more="x" * 5000),
        packed(["answer", 999])[:-4],
    ],
)
def test_a_damaged_or_hostile_file_is_no_answer(data, probe, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "_READ", 4096)
    first = probe()
    assert first.ask("answer", n=3) == 4
    first.close()
    [file] = files(tmp_path)
    file.write_bytes(data)
    assert probe().ask("answer", n=4) == 3


def test_a_file_has_an_answer_once(probe, tmp_path):
    first = probe()
    assert [first.ask("answer", n=n) for n in (5, 6, 12)] == [2, 2, 1]
    first.close()
    [file] = files(tmp_path)
    kept_answers = json.loads(zlib.decompress(file.read_bytes()))
    assert [len(kept_answers[name]) for name in ("replies", "rows")] == [2, 3]
    assert [probe().ask("answer", n=n) for n in (5, 6, 12)] == [2, 2, 1]
    file.write_bytes(packed(["answer", 999], rows=[("answer", f'{{"n":{n}}}', 0) for n in (3, 4)]))
    second = probe()
    assert [second.ask("answer", n=n) for n in (3, 4)] == [999, 999]
    assert second._child is None


def test_a_pipe_among_the_files_is_not_waited_for(probe, tmp_path):
    import os

    first = probe()
    assert first.ask("answer", n=3) == 4
    first.close()
    os.mkfifo(files(tmp_path)[0].parent / "gw0.json.z")
    assert probe().ask("answer", n=3) == 4


def test_workers_keep_files_of_their_own(probe, tmp_path, monkeypatch):
    for worker, n in (("gw0", 3), ("gw1", 4)):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        one = probe()
        one._earlier.clear()
        one.ask("answer", n=n)
        one.close()
    assert sorted(file.name for file in files(tmp_path)) == ["gw0.json.z", "gw1.json.z"]
    both = probe()
    assert [both.ask("answer", n=n) for n in (3, 4)] == [4, 3]
    assert both._child is None


def test_where_nothing_can_be_written_nothing_is_kept(probe, tmp_path):
    def read_only():
        raise OSError(30, "Read-only file system")

    one = probe(make_folder=read_only)
    assert one.ask("answer", n=4) == 3
    one.close()
    assert files(tmp_path) == []


def test_a_child_that_broke_off_keeps_nothing(probe, tmp_path):
    one = probe()
    assert one.ask("answer", n=4) == 3
    with pytest.raises(TargetError, match="ended with 3"):
        one.ask("end")
    one.close()
    assert files(tmp_path) == []


def test_old_folders_are_dropped(probe, tmp_path):
    written: list[str] = []
    for n in range(kept._FOLDERS + 2):
        one = probe(release=f"0.{n}")
        one.ask("answer", n=4)
        one.close()
        names = {path.name for path in (tmp_path / "kept").iterdir()}
        written += names - {*written}
        # Coarse clocks of file systems must not make two of them equally old.
        os.utime(tmp_path / "kept" / written[-1], (n, n))
    assert names == {*written[-kept._FOLDERS :]}


@pytest.mark.parametrize(
    ("arguments", "keeps"),
    [
        ((), True),
        (("--moe-no-cache",), False),
        (("--snapshot-update",), False),
        (("-p", "no:cacheprovider"), False),
    ],
)
def test_when_answers_are_kept(pytester, arguments, keeps):
    config = pytester.parseconfig(*arguments)
    store = options.store(config)
    assert (store is not None) is keeps
    if store is not None:
        assert store.folder == Path(config.rootpath, ".pytest_cache", "d", "moe-routing")
