"""Options: each is defined once and checked by the constructor."""

import inspect
from dataclasses import dataclass
from typing import Any

import pytest

from slrmerge.errors import OptionError
from slrmerge.io.options import Option, Options, make_options, option, options_of, takes_options
from tests.problems import refused


@dataclass(frozen=True, kw_only=True)
class Example(Options):
    threads: int | None = option(None, "Threads.", minimum=1, maximum=64)
    share: float = option(0.5, "A share.", above=0, maximum=1)
    mode: str = option("fast", "A mode.", choices=("fast", "exact"))
    modes: tuple[str, ...] = option((), "Several modes.", choices=("fast", "exact"))
    memory: int = option("2GB", "Memory.", is_size=True)
    limit: int | None = option(None, "A limit.", is_size=True)
    overwrite: bool = option(False, "Overwrite.", flag="--overwrite/--keep")
    name: str | None = option(None, "A name.")
    files: object = option((), "Anything.")
    plain: int = 3


GOOD: list[dict[str, Any]] = [
    {"threads": 1},
    {"threads": 64},
    {"threads": None},
    {"share": 1},
    {"share": 1e-9},
    {"mode": "exact"},
    {"modes": ("exact", "fast")},
    {"memory": 17},
    {"limit": "1.5kB"},
    {"overwrite": True},
    {"name": ""},
    {"files": ["a"]},
    {"plain": "unchecked"},
]


@pytest.mark.parametrize("values", GOOD, ids=repr)
def test_valid_values_are_accepted(values: dict[str, Any]) -> None:
    made = Example(**values)
    for name, value in values.items():
        assert getattr(made, name) == value or options_of(Example)[name].is_size


def test_sizes_become_numbers_of_bytes_also_the_default() -> None:
    assert (Example().memory, Example().limit) == (2 * 10**9, None)
    assert Example(memory="1KiB", limit=5) == Example(memory=1024, limit=5)  # type: ignore[arg-type]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"threads": 0}, "out-of-range"),
    ({"threads": 65}, "out-of-range"),
    ({"threads": 16**5000}, "out-of-range"),
    ({"threads": 1.5}, "wrong-type"),
    ({"threads": "4"}, "wrong-type"),
    ({"threads": True}, "wrong-type"),
    ({"share": 0}, "out-of-range"),
    ({"share": 1.01}, "out-of-range"),
    ({"share": float("nan")}, "out-of-range"),
    ({"share": float("inf")}, "out-of-range"),
    ({"share": None}, "wrong-type"),
    ({"share": False}, "wrong-type"),
    ({"mode": "exakt"}, "invalid-choice"),
    ({"mode": None}, "wrong-type"),
    ({"modes": ("fast", "slow")}, "invalid-choice"),
    ({"memory": "much"}, "invalid-size"),
    ({"memory": 0}, "invalid-size"),
    ({"limit": 1.5}, "invalid-size"),
    ({"overwrite": 1}, "wrong-type"),
    ({"overwrite": "yes"}, "wrong-type"),
    ({"name": b"x"}, "wrong-type"),
]


@pytest.mark.parametrize(("values", "code"), BAD, ids=lambda value: "".join(value))
def test_invalid_values_are_refused(values: dict[str, Any], code: str) -> None:
    with refused(OptionError, code) as caught:
        Example(**values)
    assert [problem.where for problem in caught.value.problems] == list(values)


def test_all_problems_are_reported_together() -> None:
    with refused(OptionError, "out-of-range", "invalid-choice", "invalid-choice", "invalid-size"):
        Example(threads=0, modes=("a", "b"), memory="x")  # type: ignore[arg-type]


def test_a_choice_is_corrected_to_the_nearest() -> None:
    with refused(OptionError, "invalid-choice") as caught:
        Example(mode="exakt")
    assert caught.value.problems[0].remedy == "did you mean exact?"


def test_unknown_options_are_refused_with_the_nearest_known() -> None:
    assert make_options(Example, {"threads": 2}) == Example(threads=2)
    with refused(OptionError, "unknown-option") as caught:
        make_options(Example, {"thread": 2, "share": 0.5, "zzz": 1})
    assert [problem.where for problem in caught.value.problems] == ["thread", "zzz"]
    assert caught.value.problems[0].remedy == "did you mean threads?"


def test_options_are_known_by_field() -> None:
    known = options_of(Example)
    assert "plain" not in known
    assert known["overwrite"] == Option("Overwrite.", flag="--overwrite/--keep")


def test_a_function_that_takes_options_shows_them_in_its_signature_and_its_docstring() -> None:
    @takes_options(Example)
    def work(first: str, *, progress: object = None, **options: Any) -> Example:
        del first, progress
        return make_options(Example, options)

    parameters = inspect.signature(work).parameters
    assert list(parameters) == ["first", "progress", *Example.__dataclass_fields__]
    assert all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    assert parameters["threads"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["share"].default == 0.5
    assert work("x", threads=3).threads == 3
    for name, known in options_of(Example).items():
        assert f"    {name}: {known.help}" in (work.__doc__ or "").splitlines()
