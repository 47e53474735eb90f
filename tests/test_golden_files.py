"""Golden files on disk: what is not read, how one is written, and what a killed update leaves."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_moe_routing import goldens
from pytest_moe_routing.errors import MoERoutingError

GOOD = goldens.serialize({"router": {"score": "sigmoid", "scale": 2.5}, "ids": [1, 2, 3]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "x": ' + "9" * 400 + "}", "found a number of 400 digits"),
        ('{"format": 1, "x": 1e999}', "expected a number that a float can hold"),
        ('{"format": 1, "x": NaN}', "found NaN, expected a number"),
        ('{"format": 1, "x": ' + "[" * 500 + "]" * 500 + "}", "nested too deeply"),
        ('{"format": 1, "x": 1, "x": 2}', "x: found the key twice, expected it once"),
        ("[]", "format: found None, expected 1"),
        ('{"format": 1, "x": ' + "1" * 5_000_000 + "}", "bytes, expected at most 4000000"),
    ],
)
def test_a_golden_that_is_not_read(tmp_path, text, message):
    path = tmp_path / "router.golden.json"
    path.write_text(text)
    with pytest.raises(MoERoutingError, match=message) as caught:
        goldens.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_golden_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "router.golden.json")
    with pytest.raises(MoERoutingError, match="found a named pipe, expected a regular file"):
        goldens.read(tmp_path / "router.golden.json")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_one_line_or_a_difference(tmp_path, data):
    start = data.draw(st.integers(0, len(GOOD)))
    end = data.draw(st.integers(start, len(GOOD)))
    piece = data.draw(st.text(max_size=6) | st.sampled_from(["[[", '"a":1,"a":2', "1e999", "-"]))
    path = tmp_path / "router.golden.json"
    path.write_text(GOOD[:start] + piece + GOOD[end:], "utf-8", "surrogatepass")
    try:
        found = goldens.read(path)
    except MoERoutingError as error:
        assert "\n" not in str(error)
        return
    assert all(str(difference) for difference in goldens.differences(found, {"ids": [1.5]}))


# -- writing ------------------------------------------------------------------------------------


def test_a_link_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere/real.json"
    real.write_text("old")
    link = tmp_path / "router.golden.json"
    link.symlink_to(real)
    goldens.write_in_one_step(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == [real.name, link.name]


def test_threads_write_one_file(tmp_path):
    path = tmp_path / "router.golden.json"
    texts = [letter * 100_000 for letter in "abcdefgh"]
    with ThreadPoolExecutor(8) as pool:
        written = [pool.submit(goldens.write_in_one_step, path, text) for text in texts * 20]
        read = {path.read_text() for _ in range(50) if path.exists()}
    for one in written:
        one.result()
    assert read <= set(texts)
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_update_leaves_is_named(tmp_path):
    """A young file may be one that another worker is writing."""
    assert goldens.left_by_killed_updates(tmp_path) == []
    real_replace = Path.replace

    def killed(self, target):
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            goldens.write_in_one_step(tmp_path / "router.golden.json", "text")
    assert Path.replace is real_replace
    [left] = tmp_path.iterdir()
    assert goldens.left_by_killed_updates(tmp_path) == []
    os.utime(left, (0, 0))
    assert goldens.left_by_killed_updates(tmp_path) == [left]
    ignored = (Path(__file__).parents[1] / ".gitignore").read_text().split()
    assert any(
        re.fullmatch(line.replace(".", r"\.").replace("*", ".*"), left.name) for line in ignored
    )


def test_syrupy_may_ask_about_any_test(tmp_path):
    """It does so when a run is interrupted inside an assertion."""
    from pytest_moe_routing.snapshot import GoldenExtension

    for callspec in ({}, {"callspec": SimpleNamespace(params={})}):
        location = SimpleNamespace(
            item=SimpleNamespace(**callspec),
            filepath=str(tmp_path / "test_x.py"),
            basename="test_x",
        )
        assert not GoldenExtension.matches_test_location(
            test_location=location, snapshot_location="/golden/m/router.golden.json"
        )


def test_a_golden_that_cannot_be_written_is_one_line(host):
    """A full disk is named with the file, and not in the middle of a traceback of syrupy."""
    model = goldens.packaged_directory() / "minimax-m2"
    folder = host.path / "moe/minimax-m2"
    folder.mkdir(parents=True)
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    old = '{"format": 1}\n'
    (folder / "router.golden.json").write_text(old)
    host.makepyfile(
        disk="""
        import os
        from pathlib import Path
        import pytest_moe_routing.goldens as goldens

        def full(self, target):
            raise OSError(28, os.strerror(28))

        def pytest_collection_finish(session):
            Path.replace = full
        """
    )
    host.syspathinsert()
    result = host.runpytest_subprocess(
        *("-p", "disk", "--moe-golden", "--moe-models", "minimax-m2", "-m", "not gpu"),
        *("--moe-golden-dir", "moe", "--snapshot-update", "-k", "test_router"),
    )
    assert result.ret == 1
    place = f"{folder}/router.golden.json"
    result.stdout.fnmatch_lines([f"{place}: cannot be written: No space left on device"])
    result.stdout.no_fnmatch_line("*Traceback*")
    assert (folder / "router.golden.json").read_text() == old
    assert not list(folder.glob(".*"))


def test_a_leftover_fails_the_stray_test(host):
    model = goldens.packaged_directory() / "minimax-m2"
    folder = host.path / "moe/minimax-m2"
    folder.mkdir(parents=True)
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    left = folder / f".router{goldens.SUFFIX}.1-abcd{goldens.PARTIAL}"
    left.touch()
    os.utime(left, (0, 0))
    result = host.runpytest_subprocess(
        *("--moe-golden", "--moe-models", "minimax-m2", "-k", "test_no_stray"),
        *("--moe-golden-dir", "moe"),
    )
    assert result.ret == 1
    result.stdout.fnmatch_lines([f"*an update that was killed left {left.name}; delete them"])


@pytest.mark.parametrize(
    ("golden", "now", "is_same"),
    [
        ("exact", "exact", True),
        ("exact", "wrong", False),
        (8, 8, True),
        (1, True, False),
        (True, 1, False),
        (None, None, True),
        (2.5, 2.5 + 1e-12, True),
        (2.5, 2.501, False),
        (0, 0.0, True),
        (False, 0.0, False),
        (None, 0.0, False),
    ],
)
def test_leaves_of_a_golden(golden, now, is_same):
    found = list(goldens.differences({"a": [golden]}, {"a": (now,)}))
    assert [difference.where for difference in found] == ([] if is_same else ["a[0]"])
