"""`moe-routing`: look at one model without running tests."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pytest_moe_routing.errors import MoERoutingError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when it answered, 1 when a verdict is bad, 2 for misuse."""
    parser = argparse.ArgumentParser(prog="moe-routing", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser(
        "explain", help="what a model's router means, and what becomes of it on each backend"
    )
    explain.add_argument(
        "model", help="id of a known model, or path of a model.yaml or config.json"
    )
    explain.add_argument("--flashinfer", metavar="RELEASE", help="default: installed, or newest")
    explain.add_argument("--target", default="builtin", help="who decides (default: builtin)")
    explain.add_argument("--golden-dir", type=Path, action="append", default=[], metavar="DIR")
    add = commands.add_parser("add", help="write a model folder from a Hugging Face config.json")
    add.add_argument("config", type=Path, help="the file, or the folder that holds it")
    add.add_argument("directory", type=Path, help="the golden directory to write into")
    commands.add_parser("models", help="print docs/models.md: every known model's router")
    arguments = parser.parse_args(argv)
    try:
        return {"explain": _explain, "add": _add, "models": _models}[arguments.command](arguments)
    except MoERoutingError as error:
        print(f"moe-routing: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        sys.stdout = None
        return 0


def _explain(arguments: argparse.Namespace) -> int:
    from pytest_moe_routing.backends import BACKENDS, FlashInfer, exact_calls
    from pytest_moe_routing.goldens import packaged_directory
    from pytest_moe_routing.models import load_model, load_models, read_config
    from pytest_moe_routing.routing import recipe_of
    from pytest_moe_routing.targets import judge, load_target
    from pytest_moe_routing.targets.judge import show_call

    path = Path(arguments.model)
    if path.exists():
        is_model = path.suffix in (".yaml", ".yml") or (path / "model.yaml").is_file()
        model = load_model(path) if is_model else read_config(path)
    else:
        models = load_models(packaged_directory(), *arguments.golden_dir)
        if arguments.model not in models:
            known = ", ".join(models)
            raise MoERoutingError(
                f"{arguments.model!r} is no file and no known model; models: {known}"
            )
        model = models[arguments.model]
    flashinfer = FlashInfer.of(arguments.flashinfer)
    target = load_target(arguments.target, flashinfer)

    def text() -> Iterator[str]:
        yield f"{model.model} ({model.hf_repo}, {model.architecture})"
        yield f"  router   {recipe_of(model.router)}"
        if model.router.not_expressible:
            yield f"  but      {model.router.not_expressible}"
        yield f"  experts  {model.router.num_experts}, logits {model.router.logits_dtype}"
        yield from (f"  note     {note}" for note in model.notes)
        yield f"  decided  {target.classify(model)}"
        yield f"  judged   by {target} against {flashinfer}"

    print("\n".join(text()))
    unserved = [name for name in model.checkpoints if name not in BACKENDS]
    if unserved:
        print(f"\nnot judged: {', '.join(unserved)}; backends: {', '.join(BACKENDS)}")
    good = True
    for backend in (name for name in model.checkpoints if name in BACKENDS):
        found = judge(target, model, backend)
        good = good and found.good
        same = ", ".join(map(show_call, exact_calls(model, backend, flashinfer))) or "none"
        print(f"\n{backend}: {found.verdict}")
        for gate in found.gates:
            print(f"  gate     {gate}")
        print(f"  same     {same}")
        # The first lines of a judgement repeat what stands above.
        skipped = ("  router", "  decided", "  gate", "  exact ")
        for line in found.lines()[1:]:
            if not line.startswith(skipped):
                print(line)
    return 0 if good else 1


def _add(arguments: argparse.Namespace) -> int:
    from pytest_moe_routing.models import dump_model, read_config

    model = read_config(arguments.config)
    folder = arguments.directory / model.id
    file = folder / "model.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Never over a file that somebody may have worked on.
        with file.open("x", encoding="utf-8") as stream:
            stream.write(dump_model(model))
    except FileExistsError:
        raise MoERoutingError(f"{file}: there is one already; remove it to write it anew") from None
    except OSError as error:
        raise MoERoutingError(f"{file}: cannot be written: {error.strerror}") from error
    print(f"{file}\nRead it, then write its goldens:")
    print(
        f"  pytest --moe-golden --moe-golden-dir {arguments.directory} "
        f"--moe-models {model.id} -m 'not gpu' --snapshot-update"
    )
    return 0


def _models(arguments: argparse.Namespace) -> int:
    from pytest_moe_routing.report.models import page

    print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
