"""`moe-routing`: explain, check, compare and set up models without running tests."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from pytest_moe_routing import progress
from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.escape import printable

_MODELS = "comma-separated ids or shell patterns of models (default: all)"
_SCHEMES = "comma-separated quantization schemes, such as nvfp4,fp8_block, or all (the default)"
_RELEASE = (
    "FlashInfer release to judge against (default: for a target at a PATH, the release that it "
    "pins; otherwise the installed release, or else the newest known one)"
)
_PINNED = "FlashInfer release to judge against (default: the one that each judged release pins)"
_DIRECTORY = "a directory with your own models, one folder for each; may be repeated"


class _Version(argparse.Action):
    """Print the version; it is looked up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        print(f"moe-routing {metadata.version('pytest-moe-routing')}")
        parser.exit()


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Add a command; its own help starts with the sentence that the list of commands shows."""
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    return cast("argparse.ArgumentParser", command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when it answered, 1 when the answer is bad, 2 for misuse."""
    parser = argparse.ArgumentParser(
        prog="moe-routing",
        description="Explain, check, compare and set up models, without running tests.",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(
        dest="command", required=True, title="commands", metavar="COMMAND"
    )
    explain = _command(
        commands, "explain", "show what a model's router computes, and the verdict in each scheme"
    )
    explain.add_argument(
        "model",
        help="the id or Hugging Face repository of a known model, or the path of a model.yaml or "
        "config.json",
    )
    explain.add_argument("--flashinfer", metavar="RELEASE", help=_RELEASE)
    explain.add_argument(
        "--target",
        default="builtin",
        metavar="NAME[@PATH]",
        help="the system whose decisions are judged, such as vllm@WHEEL (default: builtin, the "
        "rules of this package)",
    )
    explain.add_argument(
        "--golden-dir", type=Path, action="append", default=[], metavar="DIR", help=_DIRECTORY
    )
    explain.add_argument(
        "--schemes",
        default="",
        metavar="NAMES",
        help="comma-separated quantization schemes, or all (default: those of published "
        "checkpoints)",
    )
    explain.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    add = _command(commands, "add", "write a model folder from a Hugging Face config.json")
    add.add_argument("config", type=Path, help="the config.json, or the folder that contains it")
    add.add_argument("directory", type=Path, help="the golden directory to write into")
    check = _command(
        commands, "check", "validate every model folder of one or more golden directories"
    )
    check.add_argument("directory", type=Path, nargs="+", metavar="DIR", help="a golden directory")
    diff = _command(
        commands,
        "diff",
        "compare two reports or releases; the exit status is 1 if the second has a new failure",
    )
    side = "a .json or .jsonl report, or a release as NAME@PATH"
    diff.add_argument("before", metavar="A", help=side)
    diff.add_argument("after", metavar="B", help=side)
    diff.add_argument("--models", default="", metavar="PATTERNS", help=_MODELS)
    diff.add_argument("--schemes", default="", metavar="NAMES", help=_SCHEMES)
    diff.add_argument("--flashinfer", metavar="RELEASE", help=_PINNED)
    diff.add_argument(
        "--golden-dir", type=Path, action="append", default=[], metavar="DIR", help=_DIRECTORY
    )
    diff.add_argument("--json", action="store_true", help="print the changes as JSON")
    init = _command(
        commands,
        "init",
        "create a golden directory with a model to edit, a README, a CI step and an empty ledger",
    )
    init.add_argument("directory", type=Path, help="the directory to create")
    init.add_argument(
        "--from",
        dest="model",
        default="deepseek-r1",
        metavar="MODEL",
        help="the known model to start from, by id (default: deepseek-r1)",
    )
    report = _command(commands, "report", "merge the .jsonl reports of several runs")
    report.add_argument("out", type=Path, help="the report to write: .html, .md, .json or .jsonl")
    report.add_argument(
        "files", type=Path, nargs="+", metavar="FILE.jsonl", help="a report to merge"
    )
    history = _command(commands, "history", "show when verdicts changed, release by release")
    history.add_argument("target", help="a target's name, such as vllm")
    history.add_argument(
        "paths", nargs="+", metavar="PATH", help="a wheel, an unpacked wheel or a checkout"
    )
    history.add_argument("--models", default="", metavar="PATTERNS", help=_MODELS)
    history.add_argument("--schemes", default="", metavar="NAMES", help=_SCHEMES)
    history.add_argument("--flashinfer", metavar="RELEASE", help=_PINNED)
    history.add_argument(
        "--golden-dir", type=Path, action="append", default=[], metavar="DIR", help=_DIRECTORY
    )
    history.add_argument("--all", action="store_true", help="also list cases that never changed")
    history.add_argument(
        "-o", dest="out", type=Path, metavar="FILE", help="write the history to a .md or .json file"
    )
    _command(commands, "models", "print a Markdown page with the router of every known model")
    _command(
        commands,
        "faults",
        "print a Markdown page with the GPU test that catches each injected fault",
    )
    drift = _command(
        commands,
        "drift",
        "list what this package does not know about a release, without running its code",
    )
    drift.add_argument(
        "system", choices=("vllm", "sglang", "flashinfer"), help="the system that was released"
    )
    drift.add_argument(
        "path",
        type=Path,
        nargs="*",
        metavar="PATH",
        help="a wheel, an unpacked wheel or a checkout (default: the installed package)",
    )
    words = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(words)
    if not all(word.strip(" ,") for word in words):
        parser.error("found an empty argument, expected a value")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A name in letters that the terminal lacks is shown in escapes.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _COMMANDS[arguments.command](arguments)
    except MoERoutingError as error:
        print(f"moe-routing: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        sys.stdout = None
        return 0


def _say(text: str, end: str = "\n") -> None:
    print(printable(text), end=end)


def _explain(arguments: argparse.Namespace) -> int:
    from pytest_moe_routing.report import explain
    from pytest_moe_routing.session import MoESession

    session = MoESession(
        target_name=arguments.target,
        model_patterns=[],
        scheme_names=_names(arguments.schemes),
        flashinfer_release=arguments.flashinfer,
        golden_dirs=arguments.golden_dir,
    )
    form = explain.as_json if arguments.json else explain.page
    text, fails = form(session, arguments.model)
    _say(text, end="")
    return int(fails)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _add(arguments: argparse.Namespace) -> int:
    from pytest_moe_routing.models import dump_model, read_config
    from pytest_moe_routing.oracle.judge import OPEN_KEYS, open_questions

    model = read_config(arguments.config)
    file = arguments.directory / model.id / "model.yaml"
    _write_new(file, dump_model(model))
    _say(str(file))
    if questions := open_questions(model):
        keys = " and ".join(f"'{name}'" for name in OPEN_KEYS if getattr(model, name))
        _say(f"The model is not judged yet. Settle these points, then remove {keys} from the file:")
        for question in questions:
            _say(f"  {question}")
    _say("Then write its goldens:" if questions else "Read it, then write its goldens:")
    _say(
        f"  pytest --moe-golden --moe-golden-dir {arguments.directory} "
        f"--moe-models {model.id} --snapshot-update"
    )
    return 0


def _write_new(file: Path, text: str) -> None:
    """Write a file, but never over one that somebody may have worked on."""
    from pytest_moe_routing.goldens import write_in_one_step

    if file.exists() or file.is_symlink():
        raise MoERoutingError(f"{file}: already exists; remove it first")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_in_one_step(file, text)
    except OSError as error:
        raise MoERoutingError(f"{file}: cannot be written: {error.strerror}") from error


def _init(arguments: argparse.Namespace) -> int:
    from importlib import resources

    from pytest_moe_routing import starter
    from pytest_moe_routing.goldens import packaged_directory
    from pytest_moe_routing.models import dump_model, load_models

    directory, models = arguments.directory, load_models(packaged_directory())
    if arguments.model not in models:
        raise MoERoutingError(f"no model {arguments.model!r}; models: {', '.join(models)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise MoERoutingError(
            f"{directory}: already exists and is not empty; name a new or an empty directory"
        )
    model = models[arguments.model]
    source = model.folder / "model.yaml"
    # As it stands, with its comments, unless it is like a model that would not be there.
    text = source.read_text("utf-8") if model.like is None else dump_model(model)
    files = {directory / model.id / "model.yaml": text}
    for template in resources.files(starter.__name__).iterdir():
        if not template.name.endswith((".py", ".pyc")) and template.is_file():
            filled = template.read_text("utf-8")
            for name, value in (("directory", str(directory)), ("model", model.id)):
                filled = filled.replace(f"{{{name}}}", value)
            files[directory / template.name] = filled
    for file, text in files.items():
        _write_new(file, text)
        _say(str(file))
    _say(
        f"Rename {directory / model.id} and edit its model.yaml. Then write its "
        "goldens, and test:\n"
        f"  pytest --moe-golden --moe-golden-dir {directory} --moe-models ID --snapshot-update\n"
        f"  pytest --moe-golden --moe-golden-dir {directory}\n"
        f"See {directory / 'README.md'} for the rest."
    )
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from pytest_moe_routing.report.folders import check

    folders = [folder for directory in arguments.directory for folder in check(directory)]
    _say("\n".join(map(str, folders)))
    wrong = sum(bool(folder.problem) for folder in folders)
    _say(f"{len(folders) - wrong} valid, {wrong} wrong")
    return int(wrong > 0)


def _diff(arguments: argparse.Namespace) -> int:
    from pytest_moe_routing.report import diff
    from pytest_moe_routing.session import MoESession

    sides = []
    for name in (arguments.before, arguments.after):
        session = MoESession(
            target_name=name,
            model_patterns=_names(arguments.models),
            scheme_names=_names(arguments.schemes),
            flashinfer_release=arguments.flashinfer,
            golden_dirs=arguments.golden_dir,
        )
        sides.append(diff.side(name, session))
    changes = diff.changes(*sides)
    _say(diff.as_json(changes).rstrip() if arguments.json else "\n".join(diff.lines(changes)))
    return int(diff.fails(changes))


def _report(arguments: argparse.Namespace) -> int:
    from pytest_moe_routing.report.files import check_merged, write_report
    from pytest_moe_routing.report.records import merge

    check_merged(arguments.out, arguments.files)
    write_report(arguments.out, merge(arguments.files))
    _say(f"report {arguments.out}")
    return 0


def _history(arguments: argparse.Namespace) -> int:
    from pytest_moe_routing.report import history
    from pytest_moe_routing.report.files import check_suffix, write_text
    from pytest_moe_routing.session import MoESession

    if arguments.out:
        check_suffix(arguments.out, tuple(history.FORMATS))
    if not arguments.target.isidentifier():
        raise MoERoutingError(f"found target {arguments.target!r}, expected a registered name")

    sessions = [
        MoESession(
            target_name=f"{arguments.target}@{path}",
            model_patterns=_names(arguments.models),
            scheme_names=_names(arguments.schemes),
            flashinfer_release=arguments.flashinfer,
            golden_dirs=arguments.golden_dir,
        )
        for path in dict.fromkeys(arguments.paths)
    ]
    sessions[0].check()
    for session in sessions:
        _ = session.located
    releases = history.survey(sessions)
    form = history.FORMATS[arguments.out.suffix] if arguments.out else history.terminal
    text = form(arguments.target, releases, every=arguments.all)
    if arguments.out:
        write_text(arguments.out, text)
        _say(f"history {arguments.out}")
    else:
        _say(text, end="")
    return 1 if all(release.problem for release in releases) else 0


def _models(arguments: argparse.Namespace) -> int:
    from pytest_moe_routing.report.models import page

    _say(page(), end="")
    return 0


def _faults(arguments: argparse.Namespace) -> int:
    from pytest_moe_routing.report.faults import page

    _say(page(), end="")
    return 0


def _drift(arguments: argparse.Namespace) -> int:
    examine = _examine_flashinfer if arguments.system == "flashinfer" else _examine_framework
    drifted = False
    for path in progress.each(arguments.path or [None], "release"):
        lines, differs = examine(arguments.system, path)
        _say("\n".join(lines))
        drifted = drifted or differs
    return int(drifted)


def _examine_flashinfer(_: str, path: Path | None) -> tuple[list[str], bool]:
    from pytest_moe_routing.flashinfer.drift import examine
    from pytest_moe_routing.flashinfer.package import Package

    found = examine(Package.installed() if path is None else Package.of(path))
    return found.lines(), bool(found.differences)


def _examine_framework(name: str, path: Path | None) -> tuple[list[str], bool]:
    from pytest_moe_routing.targets.drift import examine

    found = examine(name, path)
    return found.lines(), found.has_drifted


_COMMANDS = {
    "explain": _explain,
    "add": _add,
    "check": _check,
    "diff": _diff,
    "init": _init,
    "report": _report,
    "history": _history,
    "models": _models,
    "faults": _faults,
    "drift": _drift,
}


if __name__ == "__main__":
    sys.exit(main())
