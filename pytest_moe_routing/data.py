"""The package's own files: its models, and YAML that is read as it is.

Users' files are read by `models`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any


def packaged_directory() -> Path:
    """Return the folder of the packaged models: in the wheel, or in the checkout."""
    package = Path(__file__).resolve().parent
    packaged = package / "_golden"
    return packaged if packaged.is_dir() else package.parent / "golden"


def read_data(package: str, *path: str) -> Any:
    """Return the content of a YAML file of this package; None if there is no such file.

    Args:
        package: Full name of the package that holds the file.
        path: The file's path in it.
    """
    import yaml

    file = resources.files(package).joinpath(*path)
    if not file.is_file():
        return None
    # A tenth of the time where PyYAML was built with libyaml, as its wheels are.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(file.read_text("utf-8"), loader)
