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
    explain.add_argument("model", help="id of a known model, or path of a model.yaml")
    explain.add_argument("--flashinfer", metavar="RELEASE", help="default: installed, or newest")
    explain.add_argument("--target", default="builtin", help="who decides (default: builtin)")
    explain.add_argument("--golden-dir", type=Path, action="append", default=[], metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        return _explain(arguments)
    except MoERoutingError as error:
        print(f"moe-routing: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        sys.stdout = None  # type: ignore[assignment]
        return 0


def _explain(arguments: argparse.Namespace) -> int:
    from pytest_moe_routing.backends import BACKENDS, FlashInfer, exact_calls
    from pytest_moe_routing.goldens import packaged_directory
    from pytest_moe_routing.models import load_model, load_models
    from pytest_moe_routing.routing import recipe_of
    from pytest_moe_routing.targets import judge, load_target
    from pytest_moe_routing.targets.judge import show_call

    path = Path(arguments.model)
    if path.exists():
        model = load_model(path)
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
        yield f"  experts  {model.router.num_experts}, logits {model.router.logits_dtype}"
        yield f"  decided  {target.classify(model)}"
        yield f"  judged   by {target} against {flashinfer}"

    print("\n".join(text()))
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


if __name__ == "__main__":
    sys.exit(main())
