"""The part of YAML that is read: plain values, with limits on everything else."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.models.yaml_nodes import compose, construct


def read(tmp_path, text):
    file = tmp_path / "file.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    node = compose(file)
    return None if node is None else construct(node)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# nothing\n", None),
        ("a: 1\nb: [x, 'y', \"z\"]\n", {"a": 1, "b": ["x", "y", "z"]}),
        ("[-1, +2, 129_280, 0]", [-1, 2, 129280, 0]),
        (
            "[1.5, -2., .5, 1.0e-20, 1_0.5, .inf, -.Inf]",
            [1.5, -2, 0.5, 1e-20, 10.5, math.inf, -math.inf],
        ),
        ("[true, No, on, OFF]", [True, False, True, False]),
        ("[null, ~, Null, ]", [None, None, None]),
        ("[&a text, *a]", ["text", "text"]),
        # No dates, no base 60, no octal, no exponent without a dot: all text, which a key refuses.
        (
            "[2026-11-25, 1:30, 017, 0x1f, 1e5, =, <<]",
            ["2026-11-25", "1:30", "017", "0x1f", "1e5", "=", "<<"],
        ),
        ("|\n a\n b\n", "a\nb\n"),
    ],
)
def test_values(tmp_path, text, value):
    assert read(tmp_path, text) == value


def test_a_text_is_composed_once_and_a_changed_file_again(tmp_path):
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    for file in (one, other):
        file.write_text("a: 1\n")
    assert compose(one) is compose(other)
    other.write_text("a: 2\n")
    assert construct(compose(other)) == {"a": 2}


@given(
    st.lists(
        st.none()
        | st.booleans()
        | st.integers(-(10**18), 10**18)
        | st.floats(allow_nan=False)
        | st.text(),
        max_size=4,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_values_are_those_of_pyyaml(tmp_path, values):
    """PyYAML writes them; what it would read as another kind, it writes in quotes."""
    assert read(tmp_path, yaml.safe_dump(values, allow_unicode=True)) == values


BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]\n" for n in range(9))
HOSTILE = {
    "alias bomb": (BOMB, ":2: found an alias (*a0) of a list, expected the values themselves"),
    "alias bomb as a key": (BOMB.partition("\n")[0] + "\n? *a0\n: 1\n", ":2: found an alias (*a0)"),
    "alias of itself": ("&a [*a]", ":1: found "),
    "merge bomb": (
        "m: [&m0 {a: 1}, &m1 {<<: [*m0, *m0]}]\n",
        ":1: found an alias (*m0) of a mapping, expected the values themselves",
    ),
    "empty integer": ('a: !!int ""\n', ":1: a: found the tag tag:yaml.org,2002:int"),
    "empty float": ('a: !!float ""\n', ":1: a: found the tag tag:yaml.org,2002:float"),
    "bool": ('a: !!bool "maybe"\n', ":1: a: found the tag tag:yaml.org,2002:bool"),
    "timestamp": ('a: !!timestamp "nope"\n', ":1: a: found the tag"),
    "set": ("a: !!set {x}\n", ":1: a: found the tag"),
    "binary": ("a: !!binary x\n", ":1: a: found the tag"),
    "python": ("a: !!python/object/apply:os.system [x]\n", ":1: a: found the tag"),
    "own tag": ("a: !x y\n", ":1: a: found the tag !x, expected a plain value"),
    "tag of a key": ("? !!int 1\n: 1\n", ":1: found the tag"),
    "nesting": ("[" * 400 + "]" * 400, ":1: found deeper nesting, expected at most 20 levels"),
    "nesting by blocks": ("".join(" " * n + "a:\n" for n in range(400)), ":20: found deeper"),
    "values": ("[" + "1," * 60_000 + "]", ":1: found more values, expected at most 50000"),
    "two documents": ("a: 1\n---\nb: 1\n", ":2: not valid YAML: but found another document"),
    "tab": ("a:\n\t- b\n", ":2: not valid YAML: found character '\\t'"),
    "unclosed": ("a: [1, 2\n", "not valid YAML: "),
    "no such anchor": (
        "a: *x\n",
        "found undefined alias 'x'; text that starts with * needs quotes",
    ),
    "control character": ("a: 1\nb: \x1b[2J\n", ":2: not valid YAML: found the character #x001b"),
    "NUL": ("a: \0\n", ":1: not valid YAML: found the character #x0000"),
    "directive": ("%YAML 9.9\n---\na: 1\n", ":1: not valid YAML: found incompatible YAML document"),
    "size": ("x" * 1_000_001, ": found 1000001 bytes, expected at most 1000000"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_read(tmp_path, name):
    text, message = HOSTILE[name]
    with pytest.raises(ModelError) as caught:
        read(tmp_path, text)
    shown = str(caught.value).removeprefix(str(tmp_path / "file.yaml"))
    assert message in shown
    assert "\n" not in shown
    assert len(shown) < 300


@pytest.mark.parametrize("digits", ["9" * 5000, "1" + "0" * 400 + ".5"])
def test_absurdly_long_numbers(tmp_path, digits):
    with pytest.raises(ValueError, match="a number of"):
        read(tmp_path, digits)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    st.lists(
        st.sampled_from(
            [
                *"[]{}:,-&*!|>%@`'\"#? \n\t~<=a1.",
                "&a ",
                "*a",
                "<<: ",
                "!!int ",
                "---\n",
                "? ",
                "\u2028",
                "\ud800",
            ]
        ),
        max_size=30,
    )
)
def test_any_text_is_a_value_or_one_line(tmp_path, parts):
    try:
        read(tmp_path, "".join(parts))
    except ModelError as error:
        assert "\n" not in str(error)
