"""Where a framework's sources are, and what its packaging says: version and FlashInfer pin."""

from __future__ import annotations

import re
import zipfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pytest_moe_routing.errors import TargetNotInstalled, UnknownTarget
from pytest_moe_routing.inputs import parse_release

_FLASHINFER = "flashinfer-python"


@dataclass(frozen=True)
class Source:
    """The sources of one framework, in one release.

    Attributes:
        root: A directory or wheel file that has the framework's package in it.
        version: The release, or the name of the directory where nothing says it.
        flashinfer: The FlashInfer release that it is made for, if that is known.
    """

    root: Path
    version: str
    flashinfer: str | None

    @classmethod
    def installed(cls, package: str, distributions: tuple[str, ...]) -> Source:
        """The sources in this environment, without importing them.

        Raises:
            TargetNotInstalled: None of the distributions is installed.
        """
        for distribution in distributions:
            try:
                found = metadata.distribution(distribution)
            except metadata.PackageNotFoundError:
                continue
            root = Path(str(found.locate_file("")))
            pin = _pin(found.requires or ()) or _known_pin(package, found.version)
            return cls(root, found.version, pin)
        raise TargetNotInstalled(
            f"target {package}: {package} is not installed: pip install {package}"
        )

    def names(self, package: str, word: str) -> bool:
        """Whether any Python file of the package contains a word."""
        return _contains(self.root, package, word)

    @classmethod
    def at(cls, package: str, path: Path) -> Source:
        """The sources in a wheel file, an unpacked wheel or a checkout.

        Raises:
            UnknownTarget: There is nothing there, or no such package in it.
        """
        if not path.exists():
            raise UnknownTarget(f"target {package}@{path}: no such file or directory")
        if path.is_file():
            return cls._of_wheel(package, path)
        for root in (path, path / "python"):
            if (root / package / "__init__.py").is_file():
                texts = [file.read_text("utf-8") for file in root.glob("*.dist-info/METADATA")]
                version = _version(texts) or _scm_version(root / package) or path.resolve().name
                lines = (line for text in texts for line in text.splitlines())
                pin = _pin(_requirements(lines, path)) or _known_pin(package, version)
                return cls(root, version, pin)
        raise UnknownTarget(
            f"target {package}@{path}: found no {package}/__init__.py, expected a wheel, an "
            f"unpacked wheel or a checkout of {package}"
        )

    @classmethod
    def _of_wheel(cls, package: str, path: Path) -> Source:
        try:
            with zipfile.ZipFile(path) as wheel:
                names = wheel.namelist()
                texts = [
                    wheel.read(name).decode("utf-8")
                    for name in names
                    if name.endswith(".dist-info/METADATA")
                ]
        except zipfile.BadZipFile:
            raise UnknownTarget(f"target {package}@{path}: found no wheel file") from None
        if f"{package}/__init__.py" not in names:
            raise UnknownTarget(f"target {package}@{path}: found no {package}/__init__.py in it")
        version = _version(texts) or path.stem
        lines = (line for text in texts for line in text.splitlines())
        return cls(path, version, _pin(_requirements(lines)) or _known_pin(package, version))


@cache
def _contains(root: Path, package: str, word: str) -> bool:
    """Read every Python file of a package; once in a run, as there are thousands of them."""
    text = word.encode()
    if root.is_file():
        with zipfile.ZipFile(root) as wheel:
            files = (n for n in wheel.namelist() if n.startswith(f"{package}/") and n[-3:] == ".py")
            return any(text in wheel.read(name) for name in files)
    return any(text in file.read_bytes() for file in (root / package).rglob("*.py"))


def _version(texts: list[str]) -> str | None:
    found = [m[1] for text in texts if (m := re.search(r"^Version: (\S+)$", text, re.MULTILINE))]
    return found[0] if found else None


def _scm_version(package: Path) -> str | None:
    """The version that setuptools-scm wrote, when it did."""
    file = package / "_version.py"
    text = file.read_text("utf-8") if file.is_file() else ""
    found = re.search(
        r"^(?:__version__ = )?(?:version = )?[\"']([\w.+]+)[\"']$", text, re.MULTILINE
    )
    return found[1] if found else None


def _requirements(lines: Iterator[str], checkout: Path | None = None) -> Iterator[str]:
    for line in lines:
        if line.startswith("Requires-Dist: "):
            yield line.removeprefix("Requires-Dist: ")
    if checkout is not None:
        for name in ("requirements/cuda.txt", "requirements-cuda.txt", "python/pyproject.toml"):
            file = checkout / name
            if file.is_file():
                yield from (part.strip(' ",') for part in file.read_text("utf-8").splitlines())


def _pin(requirements: Iterable[str]) -> str | None:
    """The one release that is required of FlashInfer."""
    for text in requirements:
        try:
            requirement = Requirement(text.partition("#")[0].strip())
        except InvalidRequirement:
            continue
        specifiers = list(requirement.specifier)
        if canonicalize_name(requirement.name) != _FLASHINFER:
            continue
        if len(specifiers) == 1 and specifiers[0].operator == "==":
            return specifiers[0].version
    return None


def _known_pin(package: str, version: str) -> str | None:
    """The FlashInfer beside a release that does not say it; FlashInfer itself is its own."""
    if package == "flashinfer":
        return version
    import yaml

    text = resources.files(__package__).joinpath(package, "pins.yaml")
    pins: dict[str, str] = yaml.safe_load(text.read_text("utf-8")) if text.is_file() else {}
    try:
        place = bisect_right([Version(release) for release in pins], parse_release(version))
    except ValueError:
        return None
    return list(pins.values())[place - 1] if place else None
