"""Files of others: regular files only, with limits that are checked before reading."""

from __future__ import annotations

import json
import os
import socket
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_moe_routing.errors import ModelError, UnknownTarget
from pytest_moe_routing.inputs import Archive, parse_json, read_bytes, read_text


def pipe(path):
    os.mkfifo(path)


def directory(path):
    path.mkdir()


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


def sparse(path):
    with path.open("wb") as file:
        file.truncate(50_000_000_000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pipe, "found a named pipe, expected a regular file"),
        (directory, "found a directory, expected a regular file"),
        (unix_socket, "cannot be read: No such device or address"),
        (sparse, "found 50000000000 bytes, expected at most 100"),
        (lambda path: path.symlink_to("/dev/zero"), "found a device, expected a regular file"),
        (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic"),
        (lambda path: path.write_bytes(b"x" * 101), "found 101 bytes, expected at most 100"),
        (lambda path: path.write_bytes(b"a\nb\xff"), ":2: found bytes that are not UTF-8 text"),
        (lambda path: None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_small_text_file(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "file")
    with pytest.raises(ModelError) as caught:
        read_text(tmp_path / "file", 100, ModelError)
    assert str(caught.value).startswith(f"{tmp_path / 'file'}:")
    assert message in str(caught.value)


def test_a_file_that_says_it_is_empty_and_is_not():
    """Files of /proc are regular files of no size."""
    file = Path("/proc/self/smaps")
    if not file.exists():
        pytest.skip("no /proc here")
    with pytest.raises(ModelError, match="expected at most 100"):
        read_bytes(file, 100, ModelError)


def test_a_path_that_cannot_be(tmp_path):
    with pytest.raises(ModelError, match=r"cannot be read: .*null"):
        read_bytes(tmp_path / "a\0b", 100, ModelError)


def test_a_good_file(tmp_path):
    (tmp_path / "file").write_text("grün")
    (tmp_path / "link").symlink_to("file")
    assert read_text(tmp_path / "link", 5) == "grün"


# -- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n", "f:2: not valid JSON: Expecting property name"),
        ('{"a": 1,\n "a": 2}', "f: a: found the key twice, expected it once"),
        (f'{{"a": {"9" * 400}}}', "found a number of 400 digits, expected at most 19"),
        (f'{{"a": {"9" * 5000}}}', "found a number of 5000 digits"),
        ('{"a": 1e400}', "found 1e400, expected a number that a float can hold"),
        ('{"a": NaN}', "found NaN, expected a number"),
        ('{"a": -Infinity}', "found -Infinity, expected a number"),
        ("[" * 102 + "]" * 102, "nested too deeply"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ("", "f: not valid JSON: Expecting value"),
        ('{"a": "\x01"}', "f: not valid JSON: Invalid control character"),
        ("\ufeff{}", "not valid JSON"),
    ],
)
def test_json_that_is_not_read(text, message):
    with pytest.raises(ModelError) as caught:
        parse_json(text, "f", ModelError)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not str(caught.value).endswith(" at")


def test_json_that_is_read():
    text = '{"a": [1, -9223372036854775808, 1.5, null, true, "\\ud83d\\ude00"], "b": {"a": 1}}'
    assert parse_json(text, "f") == json.loads(text)
    assert parse_json("[" * 100 + "]" * 100, "f") != []


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**18), 10**18)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_ordinary_json_is_read_as_python_reads_it(value):
    assert parse_json(json.dumps(value), "f") == value


@given(st.data())
def test_any_damage_to_json_is_one_line(data):
    text = '{"format": 1, "kind": "verdict", "list": [1, 2.5e3, null], "o": {"x": "\\u00e9"}}'
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    piece = data.draw(st.text(max_size=8) | st.just(text[start:end] * 2))
    try:
        parse_json(text[:start] + piece + text[end:], "f", ModelError)
    except ModelError as error:
        assert "\n" not in str(error)


# -- wheels -------------------------------------------------------------------------------------

NAME = "p-1.dist-info/METADATA"


def zipped(path, data=b"Version: 1\n", method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr(NAME, data)
    return path


def patched(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def encrypted(path):
    zipped(path)
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)


def unknown_compression(path):
    zipped(path)
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.index(signature) + offset] = 99
    path.write_bytes(data)


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open(NAME, "w") as member:
        for _ in range(50):
            member.write(bytes(1_000_000))


def lying_bomb(path):
    """Says that it has 10 bytes, and unpacks to 50 MB."""
    bomb(path)
    patched(path, struct.pack("<I", 50_000_000), struct.pack("<I", 10))


def huge_directory(path):
    zipped(path)
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    data[end + 12 : end + 16] = struct.pack("<I", 2_000_000_000)
    path.write_bytes(data)


def truncated(path):
    zipped(path, os.urandom(5000))
    path.write_bytes(path.read_bytes()[:-30])


def corrupt(path):
    zipped(path, bytes(range(256)) * 3)
    data = bytearray(path.read_bytes())
    data[60:70] = bytes(10)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: zipped(path, b"Version: \xff\n"),
            "METADATA:1: found bytes that are not UTF-8",
        ),
        (encrypted, "METADATA: cannot be read: File .* is encrypted"),
        (unknown_compression, "METADATA: cannot be read: That compression method is not supported"),
        (bomb, "METADATA: found 50000000 bytes, expected at most 1000"),
        (lying_bomb, "METADATA: cannot be read: "),
        (huge_directory, "list of files: found 2000000000 bytes, expected at most 10000000"),
        (truncated, "found no wheel file"),
        (corrupt, "METADATA: cannot be read: "),
        (lambda path: path.write_bytes(b""), "found no wheel file"),
        (lambda path: path.write_bytes(b"PK\x05\x06"), "found no wheel file"),
        (pipe, "found a named pipe, expected a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "found a device"),
    ],
)
def test_wheels_that_are_not_read(tmp_path, make, message):
    path = tmp_path / "a.whl"
    make(path)
    with (
        pytest.raises(UnknownTarget, match=message) as caught,
        Archive(path, UnknownTarget) as wheel,
    ):
        wheel.read_text(NAME, 1000)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_good_wheel(tmp_path):
    with Archive(zipped(tmp_path / "a.whl")) as wheel:
        assert wheel.names == [NAME]
        assert wheel.read_text(NAME, 11) == "Version: 1\n"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_a_wheel_is_one_line(tmp_path, data):
    path = zipped(tmp_path / "a.whl", b"Version: 1\n" * 20)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        with Archive(path, UnknownTarget) as wheel:
            for name in wheel.names:
                wheel.read_text(name, 1000)
    except UnknownTarget as error:
        assert "\n" not in str(error)
