"""Plain values as dataclasses: what an annotation asks for, and every fault at its place."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from slrmerge.structure import (
    UNWRITTEN,
    Fault,
    FaultsError,
    Finish,
    Prepare,
    Read,
    Text,
    filled,
    keys_of,
    plain,
    structured,
)


def even(value: object) -> int:
    if type(value) is not int or value % 2:
        raise Fault(f"{value} is not even", "double it")
    return value


def no_bees(value: tuple[str, ...]) -> tuple[str, ...]:
    if "bee" in value:
        raise Fault("has a bee", "let it out")
    return tuple(sorted(value))


@dataclass(frozen=True, kw_only=True)
class Leg:
    length: Annotated[int, Read(even)]

    def __post_init__(self) -> None:
        if self.length > 10:
            raise Fault("is too long to walk on", "cut it")


@dataclass(frozen=True, kw_only=True)
class Animal:
    name: Text
    legs: Annotated[tuple[Leg, ...], Prepare(filled)]
    fears: Annotated[tuple[str, ...], Finish(no_bees)] = ()
    diet: Literal["meat", "grass"] | None = None
    found: str | None = field(default=None, metadata=UNWRITTEN)


DOG: dict[str, Any] = {"name": "Rex", "legs": [{"length": 2}, {"length": 4}]}


def faults(content: object, *, strict: bool = True) -> list[str]:
    with pytest.raises(FaultsError) as caught:
        structured(Animal, content, "zoo", strict=strict)
    return [str(problem) for problem in caught.value.problems]


def test_each_field_is_read_as_its_annotation_says() -> None:
    dog = structured(Animal, {**DOG, "fears": ["rain", "cats"], "diet": "meat"}, "zoo")
    legs = (Leg(length=2), Leg(length=4))
    assert dog == Animal(name="Rex", legs=legs, fears=("cats", "rain"), diet="meat")


def test_what_is_at_its_default_and_what_nobody_writes_is_not_written() -> None:
    assert plain(Animal(name="Rex", legs=(Leg(length=2),), found="in a box")) == {
        "name": "Rex",
        "legs": [{"length": 2}],
    }
    assert keys_of(Animal) == ["name", "legs", "fears", "diet"]


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"name": 3}, ["zoo: $.name: 3 is not valid; write a text"]),
        ({"name": ""}, ["zoo: $.name: '' is not valid; it cannot be empty"]),
        ({"legs": {}}, ["zoo: $.legs: {} is not valid; write a list"]),
        ({"legs": []}, ["zoo: $.legs: [] is not valid; give at least one"]),
        ({"legs": [{"length": 2}, 4]}, ["zoo: $.legs[1]: 4 is not valid; write a map of keys to values"]),
        ({"legs": [{"length": 3}]}, ["zoo: $.legs[0].length: 3 is not even; double it"]),
        ({"legs": [{"length": 12}]}, ["zoo: $.legs[0]: is too long to walk on; cut it"]),
        ({"legs": [{}]}, ["zoo: $.legs[0].length: is missing; add it"]),
        ({"fears": ["bee"]}, ["zoo: $.fears: has a bee; let it out"]),
        ({"fears": ["cat", None]}, ["zoo: $.fears[1]: None is not valid; write a text"]),
        ({"fears": "cats"}, ["zoo: $.fears: 'cats' is not valid; write a list"]),
        ({"diet": "bees"}, ["zoo: $.diet: 'bees' is not known; use 'meat' or 'grass'"]),
        ({"diet": ["meat"]}, ["zoo: $.diet: ['meat'] is not known; use 'meat' or 'grass'"]),
        ({"found": "in a box"}, ["zoo: $: unknown key found; known: name, legs, fears, diet"]),
        ({"nmae": "Max", 1: 2}, ["zoo: $: unknown key 1; known: name, legs, fears, diet",
                                 "zoo: $: unknown key nmae; did you mean name?"]),
    ],
)  # fmt: skip
def test_a_fault_is_told_at_its_place(change: dict[Any, Any], lines: list[str]) -> None:
    assert faults({**DOG, **change}) == lines


def test_all_faults_are_told_at_once() -> None:
    assert faults({"legs": [{"length": 1}, {"lenght": 2}], "fears": ["bee"]}) == [
        "zoo: $.name: is missing; add it",
        "zoo: $.legs[0].length: 1 is not even; double it",
        "zoo: $.legs[1].length: is missing; add it",
        "zoo: $.legs[1]: unknown key lenght; did you mean length?",
        "zoo: $.fears: has a bee; let it out",
    ]


def test_unknown_keys_pass_where_that_is_asked_for_and_nothing_else_does() -> None:
    assert structured(Animal, {**DOG, "colour": "brown"}, "zoo", strict=False) == structured(Animal, DOG, "zoo")
    assert faults({**DOG, "name": 3, "colour": "brown"}, strict=False) == ["zoo: $.name: 3 is not valid; write a text"]


def test_what_is_no_map_at_all_is_said() -> None:
    assert faults(["Rex"]) == ["zoo: $: ['Rex'] is not valid; write a map of keys to values"]


def test_an_error_that_is_no_fault_is_a_bug_and_stays_one() -> None:
    def broken(value: object) -> object:
        raise ZeroDivisionError

    @dataclass(frozen=True)
    class Odd:
        value: Annotated[object, Read(broken)]

    with pytest.raises(ZeroDivisionError):
        structured(Odd, {"value": 1}, "zoo")
