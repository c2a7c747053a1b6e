"""YAML files that are read, and everything that is refused."""

import os
from contextlib import suppress
from math import inf
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from slrmerge.errors import RecipeError
from slrmerge.io.strict_yaml import MAX_BYTES, read_mapping, write_yaml
from tests.problems import refused


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "file.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\ufeff# comment\na: 1  # α\n", {"a": 1}),
        ("{}", {}),
        ("a: &x [1, 2]\nb: *x\n", {"a": [1, 2], "b": [1, 2]}),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\n", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("a: {b: 1}\nc: {b: 1}\n", {"a": {"b": 1}, "c": {"b": 1}}),
        ("1: a\nnull: b\n", {1: "a", None: "b"}),
        ("a: [1e-1, -2E+3, 1., .5, 0x1F, 0o17]\n", {"a": [0.1, -2000.0, 1.0, 0.5, 31, 15]}),
        ("a: [.inf, -.Inf, +.INF, 1e400]\n", {"a": [inf, -inf, inf, inf]}),
        ("a: [0, -0, 1:30, 1:30.5, 0b1, 1_000]\n", {"a": [0, 0, "1:30", "1:30.5", "0b1", "1_000"]}),
        ("a: ['010', 0.10, 00.5]\n", {"a": ["010", 0.1, 0.5]}),
        ("a: [yes, No, on, OFF, y, true, FALSE]\n", {"a": ["yes", "No", "on", "OFF", "y", True, False]}),
        ("a: [2020-13-45, 2020-01-01, =, ~, Null, '', ]\n", {"a": ["2020-13-45", "2020-01-01", "=", None, None, ""]}),
        ("a:\n", {"a": None}),
        ('a: "\\uDCE9"\nb: 010.5', {"a": "\udce9", "b": 10.5}),
        ("a: " + ":".join("9" * 100_000) + "\n", {"a": ":".join("9" * 100_000)}),
    ],
)
def test_ordinary_yaml_is_read(tmp_path: Path, text: str, content: dict[Any, Any]) -> None:
    assert read_mapping(written(tmp_path, text)) == content


def test_a_file_of_the_maximum_size_is_read(tmp_path: Path) -> None:
    assert read_mapping(written(tmp_path, "a: 1\n".ljust(MAX_BYTES, "#"))) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "wrong-type"),
        ("# nothing\n", "wrong-type"),
        ("- a: 1\n", "wrong-type"),
        ("llama", "wrong-type"),
        ("a: 1\na: 0\n", "invalid-yaml"),
        ("a: [{b: 0, c: 1, b: 0}]", "invalid-yaml"),
        ("1: a\n'1': b\n", "invalid-yaml"),
        ("? [a]\n: 1\n", "invalid-yaml"),
        ("a:\n\t- 1\n", "invalid-yaml"),
        ("a: [1\n", "invalid-yaml"),
        ("a: *b\n", "invalid-yaml"),
        ("a: 1\n---\na: 0\n", "invalid-yaml"),
        ("a: !!python/object:os.system {}\n", "invalid-yaml"),
        ("a: \x01\n", "invalid-yaml"),
        ("a: 1\n\ufeffb: 2\n", "invalid-yaml"),
        ("a: &a [*a]\n", "invalid-yaml"),
        ("a: &a {b: {c: *a}}\n", "invalid-yaml"),
        ("a: &a {<<: *a}\n", "invalid-yaml"),
        (b"a: \xe9\n", "not-utf8"),
        ("a: 1\n".encode("utf-16"), "not-utf8"),
        ("a: " + "[" * 1500 + "]" * 1500, "invalid-yaml"),
        ("a: " + "{a: " * 1500 + "}" * 1500, "invalid-yaml"),
        ("a: " + "[" * 200_000, "invalid-yaml"),
        ("- " * 100_000, "invalid-yaml"),
        ("\n".join(f"a{i}: &a{i} {'[' * 120}{f'*a{i - 1}' if i else 1}{']' * 120}" for i in range(20)), "invalid-yaml"),
        (b"#" * (MAX_BYTES + 1), "recipe-too-large"),
        *((f"a: {value}", "invalid-yaml") for value in ("!!int 9:9:9", "!!int ''", "!!float abc", "!!timestamp soon")),
        *((f"a: {value}", "invalid-yaml") for value in ("!!bool maybe", "!!map x", "!!set [x]", "!!map [[a, b]]")),
        *((f"a: [{value}, 12]", "invalid-yaml") for value in ("010", "08", "-010", "00")),
        ("a: " + "9" * 5000, "invalid-yaml"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_a_file_that_is_not_a_strict_mapping_is_refused(tmp_path: Path, text: str | bytes, code: str) -> None:
    path = written(tmp_path, text)
    with refused(RecipeError, code) as caught:
        read_mapping(path)
    assert caught.value.problems[0].where == str(path)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_the_place_of_a_duplicate_key_is_named(tmp_path: Path) -> None:
    with refused(RecipeError, "invalid-yaml") as caught:
        read_mapping(written(tmp_path, "a: 1\nb: {c: 1,\n  c: 2}\n"))
    assert "line 3, column 3" in str(caught.value)


@pytest.mark.parametrize("name", ["missing.yaml", ".", "null\0byte", "x" * 300])
def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with refused(RecipeError, "recipe-unreadable"):
        read_mapping(tmp_path / name)


TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
CONTENT = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=10)


@given(content=st.dictionaries(TEXT, CONTENT))
@example(content={"1e-1": ["1e-1", "0o17", "010", "1:30", "yes", "2020-01-01", "0b1", "="]})
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    text = write_yaml(content)
    assert yaml.safe_load(text) == content
    path = written(tmp_path_factory.getbasetemp(), text)
    if "<<" not in text:
        assert read_mapping(path) == content


def test_short_lists_are_written_on_one_line_in_the_order_given() -> None:
    assert write_yaml({"b": [1, 2], "a": "é"}) == "b: [1, 2]\na: é\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_pipe_is_read_whole_or_refused(tmp_path: Path) -> None:
    for text, is_read in ((b"a: 1\n", True), (b"#" * MAX_BYTES + b"\na: 1\n", False)):
        pipe = tmp_path / f"pipe-{is_read}"
        os.mkfifo(pipe)
        writer = Thread(target=_write_to_pipe, args=(pipe, text))
        writer.start()
        if is_read:
            assert read_mapping(pipe) == {"a": 1}
        else:
            with refused(RecipeError, "recipe-too-large"):
                read_mapping(pipe)
        writer.join()


def _write_to_pipe(pipe: Path, text: bytes) -> None:
    with suppress(BrokenPipeError):  # the reader may have seen enough
        pipe.write_bytes(text)


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="needs libyaml")
def test_a_file_is_parsed_by_libyaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yaml.scanner.Scanner.fetch_more_tokens", None)  # in Python: seconds for a file of that size
    assert read_mapping(written(tmp_path, "a: [&x 1, *x, 'b']\n")) == {"a": [1, 1, "b"]}


@pytest.mark.parametrize("text", ["<<: [{a: 1}, {a: 2}]\n", "<<: {a: 1}\n<<: {a: 2}\n"])
def test_several_mappings_to_merge_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with refused(RecipeError, "invalid-yaml"):
        read_mapping(path)
