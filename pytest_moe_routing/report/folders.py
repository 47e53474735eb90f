"""The folders of a golden directory, checked: what is wrong in each, and which goldens lack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pytest_moe_routing import goldens
from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.models import IncompleteModel, load_any, misnamed_files, model_files
from pytest_moe_routing.oracle.judge import open_questions


@dataclass(frozen=True)
class Folder:
    """What was found in one model's folder.

    Attributes:
        problem: Why the folder is not valid; empty if it is.
        note: What is worth knowing about a valid one.
    """

    name: str
    problem: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.problem or self.note or 'valid'}"


def check(directory: Path) -> list[Folder]:
    """Check every model folder of a golden directory.

    Raises:
        MoERoutingError: The directory has no model folder.
    """
    files, misnamed = model_files(directory), misnamed_files(directory)
    if not files and not misnamed:
        raise MoERoutingError(f"{directory}: found no */model.yaml, expected a golden directory")
    found, names = [], dict[str, str]()
    for file in misnamed:
        problem = f"found the name {file.name}, expected model.yaml"
        found.append(Folder(file.parent.name, problem))
    for file in files:
        folder = _check(file)
        try:
            name = load_any(file).model
        except MoERoutingError:
            name = ""
        if name in names:
            folder = Folder(folder.name, f"the model's name {name!r} is also that of {names[name]}")
        if name:
            names[name] = folder.name
        found.append(folder)
    return found


def _check(file: Path) -> Folder:
    folder = file.parent
    try:
        model = load_any(file)
        if isinstance(model, IncompleteModel):
            return Folder(folder.name, note=f"incomplete, and not judged: {model.incomplete}")
        wanted = {f"{name}{goldens.SUFFIX}" for name in goldens.names_of(model)}
        present = {path.name for path in folder.glob(f"*{goldens.SUFFIX}")}
        for path in sorted(folder.glob(f"*{goldens.SUFFIX}")):
            goldens.read(path)
    except MoERoutingError as error:
        return Folder(folder.name, str(error))
    if stray := sorted(present - wanted):
        return Folder(folder.name, f"no test reads {', '.join(stray)}; delete them")
    if questions := open_questions(model):
        return Folder(folder.name, note=f"not judged: {'; '.join(questions)}")
    if missing := sorted(wanted - present):
        command = (
            f"pytest --moe-golden --moe-golden-dir {folder.parent} --moe-models {folder.name} "
            "--snapshot-update"
        )
        return Folder(folder.name, note=f"valid; {', '.join(missing)} not written yet: {command}")
    return Folder(folder.name)
