"""What `tox -e mutation` samples: changes are what they say, and every file has tests that judge it."""

from __future__ import annotations

import ast

import pytest
import sampled_mutants
import yaml
from code_mutants import of_code, of_data

CODE = '''
def f(x: int = 1, *, half: bool = False) -> float:
    """A docstring of 3 words."""
    if not x or half:
        raise ValueError(f"found {x + 1}")
    log(x, base=2)
    return -0.5 * max(y for y in x if y > 1)
'''
CHANGES = {
    "1 to 2 (1)": "def f(x: int=2,",
    "False to True (1)": "half: bool=True",
    "Or of 2 without operand 2 (1)": "if not x:",
    "Or to And (1)": "if not x and half:",
    "Not dropped (1)": "if x or half:",
    "If always False (1)": "if False:",
    "raise ValueError dropped (1)": "    if not x or half:\n        pass\n",
    "log dropped (1)": "        raise ValueError(f'found {x + 1}')\n    pass\n",
    "log without base (1)": "log(x)",
    "USub dropped (1)": "return 0.5 * max",
    "0.5 to 1.0 (1)": "return -1.0 * max",
    "Mult to Div (1)": "return -0.5 / max",
    "max to min (1)": "* min((y",
    "condition 1 of a comprehension dropped (1)": "max((y for y in x))",
    "Gt to GtE (1)": "if y >= 1",
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_change_of_code(how):
    texts = {change: make() for place, change, make in of_code(CODE) if place == "f"}
    assert CHANGES[how] in texts[how]
    assert CHANGES[how] not in ast.unparse(ast.parse(CODE))


def test_changes_of_code_are_single_and_leave_text_alone():
    before = ast.unparse(ast.parse(CODE)).splitlines()
    texts = [make() for _, _, make in of_code(CODE)]
    assert len(set(texts)) == len(texts) > len(CHANGES)
    for text in texts:
        assert "A docstring of 3 words." in text
        assert len(set(before) - set(text.splitlines())) <= 2
        compile(text, "changed", "exec")


def test_file_of_comments_has_no_changes():
    assert list(of_data("# entries go here\n")) == []


def test_changes_of_data():
    text = 'releases: [0.9, 0.10.1]\nlimit: {top_k: "<=8 >1", since: 0.9}\nwidth: 7 # of 9\nflag: true\nfact: "8 experts"\n'
    found = {f"{place}: {how}": make() for place, how, make in of_data(text)}
    assert list(found) == [
        "releases[0]: 0.9 to 0.10.1",
        "releases[1]: 0.10.1 to 0.9",
        'limit.top_k: "<=8 >1" to "<=9 >1"',
        'limit.top_k: "<=8 >1" to "<=8 >2"',
        "limit.since: 0.9 to 0.10.1",
        "width: 7 to 8",
        "flag: true to false",
    ]
    assert yaml.safe_load(found["width: 7 to 8"])["width"] == 8
    assert "# of 9" in found["width: 7 to 8"]


def test_every_file_has_tests_that_exist():
    rows = sampled_mutants.table()["tests"]
    folder = sampled_mutants.ROOT / "tests"
    named = {test.partition("::")[0] for tests in rows.values() for test in tests}
    assert [test for test in sorted(named) if not (folder / test).is_file()] == []
    files = sampled_mutants.files()
    assert [file for file in files if not sampled_mutants.judges(file, rows)] == []
    stale = [row for row in rows if not any(f == row or f.startswith(row) for f in files)]
    assert stale == []


def test_the_longest_row_judges():
    rows = {"models/": ["a"], "models/huggingface/": ["b"], "models/spec.py": ["c"]}
    judged = {file: sampled_mutants.judges(file, rows) for file in ("models/spec.py", "models/x.py", "models/huggingface/x.py", "cli.py")}  # fmt: skip
    assert list(judged.values()) == [["c"], ["a"], ["b"], []]


def test_accepted_survivors_are_changes_that_there_are():
    for file, places in sampled_mutants.table()["accepted"].items():
        there = {(change.place, change.how) for change in sampled_mutants.changes(file)}
        for place, reasons in places.items():
            for how, reason in reasons.items():
                assert (place, how) in there, f"{file} {place}: {how}"
                assert len(reason) > 10
