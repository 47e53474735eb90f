"""Where a framework's sources are, and what its packaging says: version and FlashInfer pin."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pytest_moe_routing.data import read_data
from pytest_moe_routing.errors import TargetNotInstalled, UnknownTarget
from pytest_moe_routing.inputs import Archive, parse_release, read_bytes, read_text

_FLASHINFER = "flashinfer-python"
#: The largest METADATA seen, with a README in it, has 60 kB.
_MAX_BYTES = 2_000_000
#: The largest Python file seen, a generated one, has 1 MB.
_MAX_SOURCE = 20_000_000


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
        """Return the sources in this environment, without importing them.

        Raises:
            TargetNotInstalled: None of the distributions is installed.
        """
        for distribution in distributions:
            try:
                found = metadata.distribution(distribution)
            except metadata.PackageNotFoundError:
                continue
            root = Path(str(found.locate_file(""))).absolute()
            pin = _pin(found.requires or ()) or _known_pin(package, found.version)
            return cls(root, found.version, pin)
        raise TargetNotInstalled(
            f"target {package}: {package} is not installed; install it, or name a wheel, an "
            f"unpacked wheel or a checkout: {package}@PATH"
        )

    def names(self, package: str, word: str) -> bool:
        """Whether any Python file of the package contains a word."""
        return _contains(self.root, package, word)

    @classmethod
    def at(cls, package: str, path: Path, distributions: tuple[str, ...] = ()) -> Source:
        """Return the sources in a wheel file, an unpacked wheel or a checkout.

        Args:
            distributions: Names of the distributions that contain the package, besides its own.

        Raises:
            UnknownTarget: There is nothing there, or no such package in it.
        """
        if not path.exists():
            raise UnknownTarget(f"target {package}@{path}: no such file or directory")
        if not path.is_dir():
            return cls._of_wheel(package, path, distributions)
        for root in (path, path / "python"):
            if (root / package / "__init__.py").is_file():
                names = [f"{folder.name}/METADATA" for folder in root.glob("*.dist-info")]
                name = _one_of(names, (package, *distributions), f"target {package}@{path}")
                text = read_text(root / name, _MAX_BYTES, UnknownTarget) if name else ""
                version = _version(text) or _scm_version(root / package) or path.resolve().name
                stated = [*_requirements(text), *_requirements_of_checkout(path)]
                return cls(root.absolute(), version, _pin(stated) or _known_pin(package, version))
        if path.resolve().name == package and (path / "__init__.py").is_file():
            raise UnknownTarget(
                f"target {package}@{path}: found the package itself, expected the folder that "
                f"contains it: {package}@{path.absolute().parent}"
            )
        raise UnknownTarget(
            f"target {package}@{path}: found no {package}/__init__.py, expected a wheel, an "
            f"unpacked wheel or a checkout of {package}"
        )

    @classmethod
    def _of_wheel(cls, package: str, path: Path, distributions: tuple[str, ...]) -> Source:
        with Archive(path, UnknownTarget) as wheel:
            if f"{package}/__init__.py" not in wheel.names:
                raise UnknownTarget(
                    f"target {package}@{path}: found no {package}/__init__.py in it"
                )
            names = [n for n in wheel.names if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
            name = _one_of(names, (package, *distributions), f"target {package}@{path}")
            text = wheel.read_text(name, _MAX_BYTES) if name else ""
        version = _version(text) or path.stem
        pin = _pin(_requirements(text)) or _known_pin(package, version)
        return cls(path.absolute(), version, pin)


@cache
def _contains(root: Path, package: str, word: str) -> bool:
    """Read every Python file of a package; once in a run, as there are thousands of them."""
    text = word.encode()
    if root.is_file():
        with Archive(root, UnknownTarget) as wheel:
            files = [n for n in wheel.names if n.startswith(f"{package}/") and n.endswith(".py")]
            return any(text in wheel.read_bytes(name, _MAX_SOURCE) for name in files)
    return any(
        text in read_bytes(file, _MAX_SOURCE, UnknownTarget)
        for file in (root / package).rglob("*.py")
    )


def _one_of(names: list[str], known: Iterable[str], where: str) -> str | None:
    """Return the METADATA of the framework; a site-packages has those of many others.

    Raises:
        UnknownTarget: Several may be the one.
    """
    if len(names) > 1:
        distributions = {canonicalize_name(name) for name in known}
        names = [n for n in names if canonicalize_name(n.partition("-")[0]) in distributions]
    if len(names) > 1:
        raise UnknownTarget(
            f"{where}: found {len(names)} dist-info folders of the framework, expected one"
        )
    return names[0] if names else None


def _version(text: str) -> str | None:
    found = re.search(r"^Version: (\S{1,100})\r?$", text, re.MULTILINE)
    return found[1] if found else None


def _scm_version(package: Path) -> str | None:
    """Return the version that setuptools-scm wrote, if it did."""
    file = package / "_version.py"
    text = read_text(file, _MAX_BYTES, UnknownTarget) if file.exists() else ""
    found = re.search(
        r"^(?:__version__ = )?(?:version = )?[\"']([\w.+]{1,100})[\"']$", text, re.MULTILINE
    )
    return found[1] if found else None


def _requirements(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.startswith("Requires-Dist: "):
            yield line.removeprefix("Requires-Dist: ")


def _requirements_of_checkout(checkout: Path) -> Iterator[str]:
    for name in ("requirements/cuda.txt", "requirements-cuda.txt", "python/pyproject.toml"):
        file = checkout / name
        if file.exists():
            text = read_text(file, _MAX_BYTES, UnknownTarget)
            yield from (part.strip(' ",') for part in text.splitlines())


def _pin(requirements: Iterable[str]) -> str | None:
    """Return the one FlashInfer release that is required."""
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
    """Return the FlashInfer release for releases whose metadata do not pin one."""
    if package == "flashinfer":
        return version
    pins: dict[str, str] = read_data(__package__, package, "pins.yaml") or {}
    try:
        place = bisect_right([Version(release) for release in pins], parse_release(version))
    except ValueError:
        return None
    return list(pins.values())[place - 1] if place else None
