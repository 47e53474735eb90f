"""Calibrate the MoE comparison on right kernels, and measure what it notices of wrong ones.

    python benchmarks/moe_sensitivity.py measure suite --seconds 600 --jobs 16
    python benchmarks/moe_sensitivity.py measure even --seconds 600 --jobs 16
    python benchmarks/moe_sensitivity.py measure full --seconds 600 --jobs 16
    python benchmarks/moe_sensitivity.py write      # docs/moe-sensitivity.md from the results

Results are added to moe_sensitivity_SIZE.json next to this file. A run may be stopped at any time;
the next goes on with the next seed, so results do not depend on where one was stopped. Kernels and
problems are those of the tests.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "moe-sensitivity.md"

sys.path.insert(0, str(HERE.parent / "tests"))
from honest_kernel import Honest  # noqa: E402
from moe_cases import FULL, SLIPS, SUITE, TESTED, make  # noqa: E402

from pytest_moe_routing.compare import compare_moe  # noqa: E402
from pytest_moe_routing.compare.aggregates import families  # noqa: E402
from pytest_moe_routing.compare.budget import FLASHINFER  # noqa: E402
from pytest_moe_routing.compare.spread import pipelines, spread_moe  # noqa: E402
from pytest_moe_routing.suite.test_gpu_moe import MANY  # noqa: E402

ACTIVATIONS = ("silu", "swigluoai", "gelu", "relu2", "swiglustep")

#: Tokens of each problem in turn, kernels that solve it, and trials of each slip.
TOKENS = {"suite": (1, 5, 33), "even": (MANY,), "full": (32,)}
KERNELS = {"suite": 20, "even": 20, "full": 8}
TRIALS = {"suite": 10, "even": 10, "full": 2}
WANTED = {"suite": 10_000, "even": 10_000, "full": 200}


def layer(scheme, size):
    return FULL[scheme] if size == "full" else SUITE


def problem_of(scheme, size, tokens, act, seed):
    even = size == "even"
    return make(scheme, layer(scheme, size), tokens=tokens, act=act, seed=seed, even=even)


def slips_of(size):
    """What is tried at a size: test_equal_shares has one activation."""
    return [slip for slip in SLIPS if size != "even" or slip.act == "silu"]


def path(size):
    return HERE / f"moe_sensitivity_{size}.json"


def read(size):
    return json.loads(path(size).read_text()) if path(size).exists() else {}


def write(size, results):
    text = json.dumps(results, indent=1, sort_keys=True) + "\n"
    partial = path(size).with_suffix(".part")
    partial.write_text(text)
    partial.replace(path(size))


def calibrated(scheme, size, number):
    """One problem, solved by several right kernels, each judged by its own kind of kernel alone."""
    tokens = TOKENS[size][number % len(TOKENS[size])]
    act = ACTIVATIONS[number % len(ACTIVATIONS)]
    problem = problem_of(scheme, size, tokens, act, 1000 + 7 * number)
    spreads = [spread_moe(problem, kind) for kind in pipelines(problem, FLASHINFER)]
    opened, alarms, sums = {}, [], {}
    for draw in range(KERNELS[size] * number, KERNELS[size] * (number + 1)):
        kernel = Honest.drawn(draw)
        spread = spreads[-1 if kernel.bf16 else 0]
        output = kernel(problem, opened).to(torch.float64)
        tried = list(families(output, spread, problem, range(tokens)))
        worst = max((family.worst() for family in tried), key=lambda a: a.use)
        if worst.use > 1:
            alarms.append([number, draw, str(worst)])
        for family in tried:
            key = family.name + (", mean" if family.kind == "mean" else "")
            past = sums.setdefault(key, [0, 0.0, 0.0])
            # What may drift is no chance.
            chance = (family.found.abs() - family.drift).clamp_min(0)[family.deviation > 0]
            chance = chance / family.deviation[family.deviation > 0]
            past[0] += len(chance)
            past[1] += float(chance.square().sum())
            past[2] = max(past[2], float(family.use.max()))
    return {"alarms": alarms, "families": sums}


def noticed(scheme, size, name, number):
    """One wrong kernel: whether it was noticed, and how far it moved the output of a token."""
    slip = next(slip for slip in SLIPS if slip.name == name)
    tokens = TOKENS[size][-1]
    problem = problem_of(scheme, size, tokens, slip.act, 5 + 7 * number)
    kernel = Honest.drawn(number)
    right = kernel(problem, raw=True)
    output = slip.output(kernel(slip.problem(problem, number), raw=True), number)
    found = compare_moe(output.to(torch.bfloat16), problem, diagnose=False)
    moved = float(((output - right).norm(dim=1) / right.norm(dim=1).clamp_min(1e-30)).max())
    use = max([found.use, *(a.use for a in found.aggregates)])
    named = any(a.family == slip.family for a in found.aggregates)
    numbers = {"use": float(f"{use:.4g}"), "moved": float(f"{moved:.4g}")}
    return {"noticed": not found.ok, "named": named, **numbers}


def add(record, size, found):
    """Add what one task found to the record of its scheme."""
    if "families" not in found:
        record.setdefault("trials", []).append(found)
        return
    record["problems"] = record.get("problems", 0) + 1
    record["kernels"] = KERNELS[size] * record["problems"]
    record.setdefault("alarms", []).extend(found["alarms"])
    for key, (count, squares, use) in found["families"].items():
        past = record.setdefault("families", {}).setdefault(key, [0, 0.0, 0.0])
        past[:] = [past[0] + count, past[1] + squares, max(past[2], use)]


def tasks(size, schemes, results) -> Iterator[tuple]:
    """What is left to do: the place of its record, and a call."""
    for scheme in schemes:
        for slip in slips_of(size):
            place = ("slips", scheme, slip.name)
            past = results.get("slips", {}).get(scheme, {}).get(slip.name, {}).get("trials", [])
            if scheme in slip.schemes:
                for number in range(len(past), TRIALS[size]):
                    yield place, noticed, (scheme, size, slip.name, number)
    done = {s: results.get("calibration", {}).get(s, {}).get("problems", 0) for s in schemes}
    for number in range(WANTED[size] // KERNELS[size]):
        for scheme in schemes:
            if number >= done[scheme]:
                yield ("calibration", scheme), calibrated, (scheme, size, number)


def done(task):
    place, action, arguments = task
    torch.set_num_threads(1)
    return place, action(*arguments)


def run(size, schemes, seconds, jobs):
    """Do what is left, in order, until the time is over."""
    results, end, saved = read(size), time.monotonic() + seconds, 0.0
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for place, found in pool.imap(done, list(tasks(size, schemes, results))):
            record = results
            for key in place:
                record = record.setdefault(key, {})
            add(record, size, found)
            late = time.monotonic() > end
            if late or time.monotonic() > saved + 5:
                write(size, results)
                saved = time.monotonic()
            if late:
                break
        else:
            write(size, results)
        pool.terminate()


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def cell(trials):
    """Wrong kernels that were noticed, and how far the others moved a token's output at most."""
    missed = [trial["moved"] for trial in trials if not trial["noticed"]]
    hidden = f" ({100 * max(missed):.2g} %)" if missed else ""
    return f"{len(trials) - len(missed)}/{len(trials)}{hidden}"


def page():
    """The page in docs/, from the results."""
    parts = [HEAD.format(script=f"benchmarks/{Path(__file__).name}")]
    for size, title in SIZES.items():
        results = read(size)
        made, slips = results.get("calibration", {}), results.get("slips", {})
        parts += [f"## {title}", "### Correct kernels", RIGHT[size]]
        rows = []
        for scheme in TESTED:
            if scheme not in made:
                continue
            record = made[scheme]
            use = max(past[2] for past in record["families"].values())
            chance = max(
                (past[1] / past[0]) ** 0.5 for past in record["families"].values() if past[0]
            )
            alarms = len(record.get("alarms", []))
            sums = sum(past[0] for past in record["families"].values())
            rows.append(
                [scheme, record["kernels"], f"{sums:,}", alarms, f"{use:.2f}", f"{chance:.2f}"]
            )
        parts.append(
            table(["scheme", "kernels", "aggregates", "alarms", "largest use", "largest RMS"], rows)
        )
        parts += ["### Wrong kernels", WRONG[size]]
        rows = []
        for slip in slips_of(size):
            cells = []
            for scheme in TESTED:
                trials = slips.get(scheme, {}).get(slip.name, {}).get("trials", [])
                cells.append(cell(trials) if trials else "-")
            rows.append([slip.name, *cells])
        parts.append(table(["what is wrong", *TESTED], rows))
    return "\n\n".join(parts) + "\n"


SIZES = {
    "suite": "The sizes of the GPU suite",
    "even": "Many tokens with experts of equal shares",
    "full": "The sizes of published models",
}

HEAD = """# What the MoE comparison detects

Generated by `python {script} write` from the results next to it; do not edit.

`compare_moe` compares the output of a fused MoE kernel with the reference. It makes two kinds of
checks:

- Each element of the output must be within its *error budget*, a bound on the error in the worst
  case.
- *Aggregates*, which are sums over many elements, must be within a tighter bound. Rounding errors
  of many elements mostly cancel, so an aggregate shows a small systematic error. The bound is
  Hoeffding's. Its variances are derived from the reference and the number formats
  (`compare/spread.py`).

No number was fitted to a kernel. This page shows that correct kernels pass, and which wrong
kernels are detected."""

RIGHT = {
    "suite": f"""The layers have {SUITE.experts} experts with {SUITE.top_k} per token, a hidden
size of {SUITE.hidden} and an intermediate size of {SUITE.inner}. They run with {
        ", ".join(map(str, TOKENS["suite"]))
    } tokens in turn, and with five activations in turn.
In fp8_per_tensor, which has one scale for each whole matrix, the scales of different matrices
differ by a factor of up to 8.

The kernels are correct, but differ in the order of summation, the length of partial sums, rounding
to bfloat16 after the activation, and the error of their sigmoid (`tests/honest_kernel.py`).

- *Largest use* is the largest share of its bound that any aggregate used. More than 1 is an alarm.
- *Largest RMS* shows whether the derived variances are large enough. A family is all aggregates of
  one kind, for example one aggregate for each token. For each aggregate, take the size of its
  difference from the reference, subtract the systematic error that a correct kernel may have, and
  divide the rest by the derived standard deviation. The root mean square of these numbers must be
  below 1 for each family; the column shows the largest.""",
    "even": f"""These are the same layers, with the inputs of the suite's `test_equal_shares`:
{TOKENS["even"][0]} tokens; router weights that are nearly equal; and scales of whole matrices that
differ by a factor of at most 1.7. (In the previous section, these scales differ by a factor of up
to 8.)""",
    "full": f"""There are {TOKENS["full"][0]} tokens, each routed to both of two experts, with
these sizes: """
    + "; ".join(f"{scheme} {size.hidden} x {size.inner}" for scheme, size in FULL.items())
    + ".",
}

WRONG = {
    "suite": f"""There are {TOKENS["suite"][-1]} tokens; every second one has large values. A cell
shows how many of the wrong kernels were detected. If some were not detected, the parentheses show
the largest error of a token's output among them.

*One code* is the change of a scale to the next value of its number format. In bfloat16 and float32,
neighboring values are too close. For these formats, the change is larger, and within the range of
E4M3's steps:

| scale | change by one code |
| --- | --- |
| E4M3 | 6 to 13 % |
| UE8M0 | a factor of 2 |
| bfloat16 | 6 % |
| float32 | 13 % |

(The next bfloat16 number would be only 0.4 to 0.8 % larger, which changes the output by less than
its rounding.)

*One router weight* is the smallest weight of a token. Its expert may contribute only 2 % of the
token's output, and rounding may remove most of the change. The output is then as close to the
exact result as that of a correct kernel. With the inputs of the next section, which the suite uses
too, every change is detected.""",
    "even": """The cells are as above. In this table, the activation is silu, which has no clamp
and no alpha.""",
    "full": f"""The cells are as for the sizes of the GPU suite. There are {TOKENS["full"][-1]}
tokens.""",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["measure", "write"])
    parser.add_argument("size", nargs="?", choices=list(SIZES), default="suite")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--schemes", nargs="*", default=list(TESTED), choices=TESTED)
    how = parser.parse_args()
    if how.command == "write":
        PAGE.write_text(page())
    else:
        run(how.size, how.schemes, how.seconds, how.jobs)


if __name__ == "__main__":
    main()
