"""Read `model.yaml` files. Every mistake is one `ModelError`: file, line, key, found, expected."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.inputs import read_text
from pytest_moe_routing.models.sections import Section, compose, fail_at
from pytest_moe_routing.models.spec import IncompleteModel, ModelSpec, schema
from pytest_moe_routing.models.yaml_nodes import MAX_BYTES

FILE_NAME = "model.yaml"
_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")


def load_model(path: Path) -> ModelSpec:
    """Read one `model.yaml`, given the file or its folder.

    Raises:
        ModelError: the file cannot be read, or anything in it is not as the schema says; or the
            model is incomplete, and the message says what is missing.
    """
    file = path / FILE_NAME if path.is_dir() else path
    model = load_any(file)
    if isinstance(model, IncompleteModel):
        raise ModelError(f"{file}: incomplete, so it cannot be judged: {model.incomplete}")
    return model


def load_any(file: Path) -> ModelSpec | IncompleteModel:
    """Read one `model.yaml`, be it complete or not.

    Raises:
        ModelError: As for `load_model`, an incomplete model excepted.
    """
    root = _read(file)
    folder = Path(os.path.realpath(file)).parent
    if "incomplete" in root.entries:
        incomplete: IncompleteModel = root.build(IncompleteModel, partial=True)
        return replace(incomplete, folder=folder)
    spec: ModelSpec = root.build(ModelSpec)
    return replace(spec, folder=folder)


def _read(file: Path, likes: tuple[Path, ...] = ()) -> Section:
    """Read a file's keys, over those of the file that it is like."""
    folder = Path(os.path.realpath(file)).parent
    if not _ID.fullmatch(folder.name):
        raise ModelError(
            f"{file}: the folder's name is the model's id: found {folder.name!r}, "
            "expected lower-case letters, digits, dots and dashes"
        )
    root = compose(file)
    if root is None:
        fail_at(file, 1, "the file", "nothing", "a mapping with the keys of a model")
    section = Section(file, root)
    if "like" in section.entries:
        like = section.value("like", schema(ModelSpec)["like"].metadata["kind"])
        other = folder.parent / like / FILE_NAME
        if not _ID.fullmatch(like) or not other.is_file():
            section.fail("like", repr(like), f"the id of a model in {folder.parent}")
        if other in (*likes, folder / FILE_NAME):
            section.fail(
                "like",
                repr(like),
                "a model that does not inherit, directly or indirectly, from this one",
            )
        section.like = _read(other, (*likes, folder / FILE_NAME))
    return section


def load_models(*directories: Path) -> dict[str, ModelSpec]:
    """Read every complete model of the directories; a later one's model replaces an earlier's.

    Returns the models by id, sorted.

    Raises:
        ModelError: a directory is missing or holds no model, a model is wrong, or two folders of
            one directory describe a model under the same name.
    """
    return load_all(*directories)[0]


def load_named(name: str, *directories: Path) -> ModelSpec:
    """Return the model of an id, a Hugging Face repository or a model's name; see `find`.

    Of the models, those whose files do not contain the name are not read.

    Raises:
        ModelError: As for `load_models` and `find`, duplicate names excepted.
    """
    wanted = _last(name)
    files = {f.parent.name: f for directory in directories for f in _files(directory)}
    near = [f for id_, f in files.items() if wanted == id_ or wanted in _text(f)]
    models = {spec.id: spec for spec in map(load_any, near) if isinstance(spec, ModelSpec)}
    if any(_is_called(spec, name.lower()) for spec in models.values()):
        return find(models, name)
    return find(load_models(*directories), name)


def load_incomplete(*directories: Path) -> dict[str, IncompleteModel]:
    """Return the models of the directories that say what is missing, by id. They cannot be judged.

    Raises:
        ModelError: as for `load_models`.
    """
    return load_all(*directories)[1]


def load_all(*directories: Path) -> tuple[dict[str, ModelSpec], dict[str, IncompleteModel]]:
    """Return what `load_models` and `load_incomplete` do, each file read once.

    Raises:
        ModelError: as for `load_models`.
    """
    models: dict[str, ModelSpec | IncompleteModel] = {}
    for directory in directories:
        names: dict[str, Path] = {}
        for file in _files(directory):
            model = load_any(file)
            if model.model in names:
                raise ModelError(
                    f"{file}: model: found {model.model!r}, expected a "
                    f"unique name; it is also in {names[model.model]}"
                )
            names[model.model] = file
            models[model.id] = model
    ordered = sorted(models.items())
    return (
        {id_: model for id_, model in ordered if isinstance(model, ModelSpec)},
        {id_: model for id_, model in ordered if isinstance(model, IncompleteModel)},
    )


def model_files(directory: Path) -> list[Path]:
    """Return the `model.yaml` of each folder that has one, be it a link that leads nowhere."""
    folders = sorted(directory.iterdir()) if directory.is_dir() else []
    files = [folder / FILE_NAME for folder in folders if folder.is_dir()]
    return [file for file in files if os.path.lexists(file)]


def misnamed_files(directory: Path) -> list[Path]:
    """Return the files that nothing reads, as they are called `model.yml` or `Model.yaml`."""
    folders = sorted(directory.iterdir()) if directory.is_dir() else []
    return [
        file
        for folder in folders
        if folder.is_dir() and not os.path.lexists(folder / FILE_NAME)
        for file in sorted(folder.iterdir())
        if file.name.lower() in (FILE_NAME, "model.yml")
    ]


def _files(directory: Path) -> list[Path]:
    for file in misnamed_files(directory):
        raise ModelError(f"{file}: found the name {file.name}, expected {FILE_NAME}")
    files = model_files(directory)
    if not files:
        raise ModelError(f"{directory}: found no */{FILE_NAME}, expected a golden directory")
    return files


def _text(file: Path) -> str:
    return read_text(file, MAX_BYTES, ModelError).lower()


def find(models: Mapping[str, ModelSpec], name: str) -> ModelSpec:
    """Return the model of an id, a Hugging Face repository or a model's name, in any case.

    Raises:
        ModelError: There is none, or several have the name. The message suggests near names.
    """
    wanted = name.lower()
    found = [spec for spec in models.values() if _is_called(spec, wanted)]
    exact = [spec for spec in found if spec.id == wanted]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if found:
        several = ", ".join(spec.id for spec in found)
        raise ModelError(
            f"{name!r} is the name of several models: {several}; give one of these ids"
        )
    names = {key: spec.id for spec in models.values() for key in (spec.id, _last(spec.hf_repo))}
    near = dict.fromkeys(names[n] for n in get_close_matches(_last(wanted), names, n=3))
    hint = f"did you mean {' or '.join(near)}?" if near else "`moe-routing models` lists them"
    shown = name if len(name) <= 60 else f"{name[:57]}..."
    raise ModelError(
        f"{shown!r} is neither a file nor one of the {len(models)} known models; {hint}"
    )


def _is_called(spec: ModelSpec, wanted: str) -> bool:
    return wanted in (spec.id, spec.hf_repo.lower(), spec.model.lower(), _last(spec.hf_repo))


def _last(repository: str) -> str:
    """Return a repository's own name, in lower case: `deepseek-r1` of `deepseek-ai/DeepSeek-R1`."""
    return repository.rpartition("/")[2].lower()


def select(models: dict[str, ModelSpec], patterns: Iterable[str]) -> list[ModelSpec]:
    """Return the models whose id matches any of the shell patterns; all of them without patterns.

    Raises:
        ModelError: a pattern matches no model.
    """
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(model, pattern) for model in models):
            near = get_close_matches(pattern.strip("*?"), models, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else "`moe-routing models` lists them"
            )
            raise ModelError(f"none of the {len(models)} models matches {pattern!r}; {hint}")
    return [
        spec
        for model, spec in models.items()
        if not patterns or any(fnmatchcase(model, pattern) for pattern in patterns)
    ]
