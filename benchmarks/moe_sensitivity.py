"""Calibrate the MoE comparison on right kernels, and measure what it notices of wrong ones.

    python benchmarks/moe_sensitivity.py calibrate suite --seconds 600
    python benchmarks/moe_sensitivity.py calibrate full --seconds 600
    python benchmarks/moe_sensitivity.py notice suite
    python benchmarks/moe_sensitivity.py notice full
    python benchmarks/moe_sensitivity.py write      # docs/moe-sensitivity.md from the results

After every problem, results are added to moe_sensitivity_SIZE.json next to this file, so a run may
be stopped at any time, and goes on with the next seed. Kernels and problems are those of the tests.
"""

import argparse
import json
import sys
import time
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

ACTIVATIONS = ("silu", "swigluoai", "gelu", "relu2", "swiglustep")

#: Tokens of each problem in turn, kernels that solve it, and trials of each slip.
TOKENS = {"suite": (1, 5, 33), "full": (32,)}
KERNELS = {"suite": 8, "full": 4}
TRIALS = {"suite": 5, "full": 1}
WANTED = {"suite": 10_000, "full": 200}


def layer(scheme, size):
    return SUITE if size == "suite" else FULL[scheme]


def path(size):
    return HERE / f"moe_sensitivity_{size}.json"


def read(size):
    return json.loads(path(size).read_text()) if path(size).exists() else {}


def write(size, results):
    text = json.dumps(results, indent=1, sort_keys=True) + "\n"
    partial = path(size).with_suffix(".part")
    partial.write_text(text)
    partial.replace(path(size))


def largest(tried):
    return max(float(family.use.max()) for family in tried)


def calibrated(scheme, size, record):
    """Add one problem, solved by several right kernels, to a record."""
    number = record.setdefault("problems", 0)
    tokens = TOKENS[size][number % len(TOKENS[size])]
    act = ACTIVATIONS[number % len(ACTIVATIONS)]
    problem = make(scheme, layer(scheme, size), tokens=tokens, act=act, seed=1000 + 7 * number)
    spreads = [spread_moe(problem, kind) for kind in pipelines(problem, FLASHINFER)]
    opened = {}
    for draw in range(KERNELS[size] * number, KERNELS[size] * (number + 1)):
        output = Honest.drawn(draw)(problem, opened).to(torch.float64)
        fits = [list(families(output, spread, problem, range(tokens))) for spread in spreads]
        tried = min(fits, key=largest)
        use = largest(tried)
        if use > 1:
            worst = max((family.worst() for family in tried), key=lambda a: a.use)
            record.setdefault("alarms", []).append([number, draw, str(worst)])
        for family in tried:
            key = family.name + (", mean" if family.kind == "mean" else "")
            past = record.setdefault("families", {}).setdefault(key, [0, 0.0, 0.0])
            # What may drift is no chance.
            chance = (family.found.abs() - family.drift).clamp_min(0)[family.deviation > 0]
            chance = chance / family.deviation[family.deviation > 0]
            past[0] += len(chance)
            past[1] += float(chance.square().sum())
            past[2] = max(past[2], float(family.use.max()))
    record["problems"] = number + 1
    record["kernels"] = KERNELS[size] * (number + 1)


def noticed(scheme, size, slip, record):
    """Add one wrong kernel to a record."""
    number = record.setdefault("trials", 0)
    tokens = TOKENS[size][-1]
    problem = make(scheme, layer(scheme, size), tokens=tokens, act=slip.act, seed=5 + 7 * number)
    kernel = Honest.drawn(number)
    output = kernel(slip.problem(problem, number), raw=True)
    output = slip.output(output, number).to(torch.bfloat16)
    found = compare_moe(output, problem, diagnose=False)
    use = max([found.use, *(a.use for a in found.aggregates)])
    named = any(a.family == slip.family for a in found.aggregates)
    record["trials"] = number + 1
    record["noticed"] = record.get("noticed", 0) + (not found.ok)
    record["by elements"] = record.get("by elements", 0) + bool(found.wrong_tokens)
    record["named"] = record.get("named", 0) + named
    record["least"] = min(record.get("least", use), use)


def run(size, steps, seconds):
    """Take steps, each with a scheme's record, until the time is over or nothing is left."""
    results, end = read(size), time.monotonic() + seconds
    while steps and time.monotonic() < end:
        for step in list(steps):
            keys, done, action = step
            record = results
            for key in keys:
                record = record.setdefault(key, {})
            if done(record):
                steps.remove(step)
                continue
            action(record)
            write(size, results)
            if time.monotonic() > end:
                break


def calibration(size, schemes):
    def step(scheme):
        return (
            ("calibration", scheme),
            lambda record: record.get("kernels", 0) >= WANTED[size],
            lambda record: calibrated(scheme, size, record),
        )

    return [step(scheme) for scheme in schemes]


def trials(size, schemes):
    def step(scheme, slip):
        return (
            ("slips", scheme, slip.name),
            lambda record: record.get("trials", 0) >= TRIALS[size],
            lambda record: noticed(scheme, size, slip, record),
        )

    return [step(s, slip) for s in schemes for slip in SLIPS if s in slip.schemes]


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def page():
    """The page in docs/, from the results."""
    parts = [HEAD.format(script=f"benchmarks/{Path(__file__).name}")]
    for size, title in SIZES.items():
        results = read(size)
        made, slips = results.get("calibration", {}), results.get("slips", {})
        parts += [f"## {title}", "### Right kernels", RIGHT[size]]
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
        for slip in SLIPS:
            cells = []
            for scheme in TESTED:
                record = slips.get(scheme, {}).get(slip.name)
                cells.append(
                    "-"
                    if record is None
                    else f"{record['noticed']}/{record['trials']} ({record['least']:.2g})"
                )
            rows.append([slip.name, *cells])
        parts.append(table(["off by", *TESTED], rows))
    return "\n\n".join(parts) + "\n"


SIZES = {"suite": "The sizes of the GPU suite", "full": "The sizes of published models"}

HEAD = """# What the MoE comparison notices

Generated by `python {script} write` from the results next to it; do not edit.

`compare_moe` judges single elements by a budget, which bounds the worst that can happen to one, and
aggregates by Hoeffding's bound, from variances that follow from the reference and the number
formats (`compare/spread.py`). No number was fitted to a kernel: calibration only counts."""

RIGHT = {
    "suite": f"""Layers of {SUITE.experts} experts, {SUITE.top_k} a token, {SUITE.hidden} x
{SUITE.inner}; {", ".join(map(str, TOKENS["suite"]))} tokens in turn, five activations in turn.
Kernels differ in the order of summation, the length of partial sums, rounding to bfloat16 after
the activation, and the error of their sigmoid (`tests/honest_kernel.py`). *Largest use* is that
of any aggregate, where 1 is an alarm. *Largest RMS* is that of a family of aggregates in units of
their own standard deviations, beyond what may drift: right variances keep it below 1.""",
    "full": f"""{TOKENS["full"][0]} tokens, each with both of two experts: """
    + "; ".join(f"{scheme} {size.hidden} x {size.inner}" for scheme, size in FULL.items())
    + ".",
}

WRONG = {
    "suite": f"""{TOKENS["suite"][-1]} tokens, of which every other one is loud. Wrong kernels that
were noticed, of those tried, and the least use of a bound, where anything above 1 is noticed. A
code of a scale is a step of E4M3 (6 to 13 %), a factor of 2 of UE8M0, and 0.4 to 0.8 % of the
bfloat16 scales of mxint4, less than the rounding of the output; of float32 scales, 12.5 %. A
share of 2 % of a token, or a row whose products are rounded to nothing, may hide what is off.""",
    "full": """As above.""",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["calibrate", "notice", "write"])
    parser.add_argument("size", nargs="?", choices=list(SIZES), default="suite")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--schemes", nargs="*", default=list(TESTED), choices=TESTED)
    how = parser.parse_args()
    torch.set_num_threads(1)
    if how.command == "write":
        PAGE.write_text(page())
    else:
        steps = {"calibrate": calibration, "notice": trials}[how.command]
        run(how.size, steps(how.size, how.schemes), how.seconds)


if __name__ == "__main__":
    main()
