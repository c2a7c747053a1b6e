"""Models raise their own error, with every problem at its path."""

from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import BeforeValidator, Field, ValidationError

from slrmerge.errors import MAX_PROBLEMS, DataError, RecipeError, SlrmergeError
from slrmerge.io.model import InvalidValue, Model, plain, validate_as
from tests.problems import refused


def _even(value: object) -> object:
    if not isinstance(value, int) or value % 2:
        raise InvalidValue("odd", f"{value} is not even", "double it")
    return value


class Inner(Model):
    even: Annotated[int, BeforeValidator(_even)]
    word: str = "x"

    def model_post_init(self, _: Any) -> None:
        if self.word == "even":
            raise InvalidValue("forbidden-word", "the word is forbidden")


class Outer(Model):
    error: ClassVar[type[SlrmergeError]] = DataError

    inner: Inner | None = None
    several: Annotated[tuple[Inner, ...], Field(min_length=1)] | None = None
    mode: Literal["fast", "exact"] = "fast"
    flag: bool = False
    number: float = 0.0
    count: Annotated[int, Field(ge=0, le=9)] = 0
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    name: Annotated[str, Field(min_length=1)] = "name"
    mapping: dict[str, Any] = Field(default={})


BAD: list[tuple[dict[Any, Any], list[tuple[str, str]]]] = [
    ({"inner": {}}, [("missing-key", "$.inner.even")]),
    ({"inner": 3}, [("wrong-type", "$.inner")]),
    ({"inner": {"even": 3}}, [("odd", "$.inner.even")]),
    ({"inner": {"even": 2, "word": "even"}}, [("forbidden-word", "$.inner")]),
    (
        {"several": [{"even": 2}, {"even": 1, "word": 3}]},
        [("odd", "$.several[1].even"), ("wrong-type", "$.several[1].word")],
    ),
    ({"several": [{"even": 1}]}, [("odd", "$.several[0].even")]),
    ({"several": [1]}, [("wrong-type", "$.several[0]")]),
    ({"several": []}, [("empty", "$.several")]),
    ({"several": "x"}, [("wrong-type", "$.several")]),
    ({"mode": "slow"}, [("invalid-choice", "$.mode")]),
    ({"flag": []}, [("wrong-type", "$.flag")]),
    ({"number": None}, [("wrong-type", "$.number")]),
    ({"count": {}}, [("wrong-type", "$.count")]),
    ({"count": -1, "share": 0}, [("out-of-range", "$.count"), ("out-of-range", "$.share")]),
    ({"count": 10, "share": 1}, [("out-of-range", "$.count"), ("out-of-range", "$.share")]),
    ({"name": ""}, [("empty", "$.name")]),
    ({"name": "\ud800"}, [("invalid-value", "$.name")]),
    ({"mapping": []}, [("wrong-type", "$.mapping")]),
    ({"Mode": "fast", "a b": 1, "c d": 2}, [("unknown-key", "$")] * 3),
    ({"inner": {"even": 2, "evn": 4}, "x": 1}, [("unknown-key", "$.inner"), ("unknown-key", "$")]),
    ({1: 2}, [("unknown-key", "$")]),
    ({"several": [{"even": 2, None: 1}]}, [("unknown-key", "$.several[0]")]),
]


@pytest.mark.parametrize(("content", "expected"), BAD, ids=repr)
def test_problems_have_codes_and_paths(content: dict[Any, Any], expected: list[tuple[str, str]]) -> None:
    with pytest.raises(DataError) as caught:
        validate_as(Outer, content, "file")
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [
        (code, f"file: {path}") for code, path in expected
    ]


def test_of_many_problems_the_first_are_reported() -> None:
    with refused(DataError, *["unknown-key"] * MAX_PROBLEMS, "more-problems"):
        validate_as(Outer, {f"key {number}": 1 for number in range(2 * MAX_PROBLEMS)}, "file")


@pytest.mark.parametrize("content", [None, 3, "text", [1], [("mode", "fast")]], ids=repr)
def test_anything_but_a_mapping_is_refused(content: object) -> None:
    with refused(DataError, "wrong-type") as caught:
        validate_as(Outer, content, "file")
    assert caught.value.problems[0].where == "file: $"


def test_places_can_be_named_by_the_caller() -> None:
    with refused(DataError, "invalid-choice") as caught:
        validate_as(Outer, {"mode": 1}, "file", place=lambda path: f"line 7, {path}")
    assert caught.value.problems[0].where == "line 7, $.mode"


def test_an_unknown_key_is_corrected_to_the_nearest_of_its_own_model() -> None:
    with refused(DataError, "unknown-key") as caught:
        validate_as(Outer, {"several": [{"even": 2, "wrd": 1}], "mod": 1}, "file")
    assert [problem.remedy for problem in caught.value.problems] == ["did you mean word?", "did you mean mode?"]


def test_a_constructor_raises_the_error_of_its_model() -> None:
    with refused(DataError, "wrong-type", "unknown-key") as caught:
        Outer(count=[], cuont=1)
    assert [problem.where for problem in caught.value.problems] == ["Outer: $.count", "Outer: $"]
    with refused(RecipeError, "odd"):
        Inner(even=1)
    with refused(RecipeError, "forbidden-word"):
        Inner(even=2, word="even")


def test_nested_models_do_not_hide_the_problems_of_the_outer_one() -> None:
    with refused(DataError, "odd", "invalid-choice"):
        Outer(inner={"even": 1}, mode="slow")


def test_values_are_frozen_and_plain_without_defaults() -> None:
    made = Outer(several=(Inner(even=2),), count=3)
    assert plain(made) == {"several": [{"even": 2}], "count": 3}
    assert validate_as(Outer, plain(made), "file") == made
    assert repr(made) == "Outer(several=[{'even': 2}], count=3)"
    with pytest.raises(ValidationError):
        made.count = 4
