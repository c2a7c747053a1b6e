"""Plain values → dataclasses, each field read as its annotation says; everything that is wrong with them, in words."""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from cattrs import (
    AttributeValidationNote,
    BaseValidationError,
    Converter,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)
from cattrs.cols import homogenous_tuple_structure_factory
from cattrs.gen import make_dict_structure_fn, override

from slrmerge.errors import Problem, did_you_mean

T = TypeVar("T")


class Fault(ValueError):  # noqa: N818 (what people get to see is the Problem that it becomes)
    """What is wrong with a value, raised where it is read: it becomes a Problem at the place of the value."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}; {remedy}")
        self.what, self.remedy = what, remedy


class FaultsError(ValueError):
    """All that is wrong with what was written, at its places."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        super().__init__()
        self.problems = list(problems)


@dataclass(frozen=True, slots=True)
class Read:
    """In an annotation: the function that makes the value of what is written. It raises Fault."""

    by: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Prepare:
    """What is done with a value before it is read as the annotated type says. It may raise Fault."""

    by: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Finish:
    """What is done with a value after it was read as the annotated type says. It may raise Fault."""

    by: Callable[[Any], Any]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise Fault(f"{short(value)} is not valid", "write a text")
    return value


def _filled_text(value: object) -> str:
    if not (text := _text(value)):
        raise Fault("'' is not valid", "it cannot be empty")
    return text


def filled(value: T) -> T:
    """Prepares a list that has to hold something."""
    if value in ([], ()):
        raise Fault(f"{short(value)} is not valid", "give at least one")
    return value


Text = Annotated[str, Read(_filled_text)]

UNWRITTEN = {"unwritten": True}
"""The metadata of a field that nobody writes: it is known from elsewhere."""


def keys_of(kind: type[Any]) -> list[str]:
    """The keys that a class is written with."""
    return [each.name for each in fields(kind) if each.metadata != UNWRITTEN]


def structured(kind: type[T], content: object, where: str, *, strict: bool = True) -> T:
    """A value of the dataclass `kind` from plain values, each read as the annotation of its field says.

    Raises FaultsError with all that is wrong, each with its `$.path`; keys that no field has are, unless not `strict`.
    """
    try:
        return _converter(strict=strict).structure(content, kind)
    except BaseValidationError as error:
        raise FaultsError(_problems(error, where, "$")) from None
    except Fault as fault:
        raise FaultsError([Problem(f"{where}: $", fault.what, fault.remedy)]) from None


def plain(value: Any) -> Any:
    """A dataclass as it would be written, without what it leaves at its default."""
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if not is_dataclass(value):
        return value
    defaults = {each.name: each.default for each in fields(value)}
    return {key: plain(now) for key in keys_of(type(value)) if (now := getattr(value, key)) != defaults[key]}


@cache
def _converter(*, strict: bool) -> Converter:
    converter = Converter()

    def of_dataclass(kind: type[Any]) -> Callable[[Any, Any], Any]:
        unwritten = {each.name for each in fields(kind)} - {*keys_of(kind)}
        left_out: dict[str, Any] = {name: override(omit=True) for name in unwritten}
        make = make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=strict, **left_out)

        def structure(value: Any, kind: Any) -> Any:
            if not isinstance(value, Mapping):
                raise Fault(f"{short(value)} is not valid", "write a map of keys to values")
            return make({str(key): entry for key, entry in value.items()}, kind)

        return structure

    def of_tuple(kind: Any) -> Callable[[Any, Any], Any]:
        make = homogenous_tuple_structure_factory(kind, converter)

        def structure(value: Any, kind: Any) -> Any:
            if not isinstance(value, list | tuple):
                raise Fault(f"{short(value)} is not valid", "write a list")
            return make(value, kind)

        return structure

    def annotated(value: Any, kind: Any) -> Any:
        notes = {type(note): note.by for note in kind.__metadata__}
        if Read in notes:
            return notes[Read](value)
        if Prepare in notes:
            value = notes[Prepare](value)
        value = converter.structure(value, kind.__origin__)
        return notes[Finish](value) if Finish in notes else value

    converter.register_structure_hook(str, lambda value, _: _text(value))
    converter.register_structure_hook_func(_is_a(Literal), _one_of)
    converter.register_structure_hook_factory(_is_a(tuple), of_tuple)
    converter.register_structure_hook_factory(is_dataclass, of_dataclass)
    converter.register_structure_hook_func(_is_a(Annotated), annotated)
    return converter


def _is_a(origin: Any) -> Callable[[Any], bool]:
    return lambda kind: get_origin(kind) is origin


def _one_of(value: Any, kind: Any) -> Any:
    *others, last = map(repr, get_args(kind))
    if value not in get_args(kind):
        raise Fault(f"{short(value)} is not known", f"use {', '.join(others)}{' or ' if others else ''}{last}")
    return value


def _problems(error: BaseValidationError, where: str, place: str) -> Iterator[Problem]:
    """What cattrs found, in slrmerge's words."""
    for found in error.exceptions:
        at = place + "".join(map(_step, getattr(found, "__notes__", ())))
        if isinstance(found, BaseValidationError):
            yield from _problems(found, where, at)
        elif isinstance(found, ForbiddenExtraKeysError):
            for key in sorted(found.extra_fields):
                yield Problem(f"{where}: {at}", f"unknown key {key}", did_you_mean(key, keys_of(found.cl)))
        elif isinstance(found, Fault):
            yield Problem(f"{where}: {at}", found.what, found.remedy)
        elif isinstance(found, KeyError):
            yield Problem(f"{where}: {at}", "is missing", "add it")
        else:
            raise found


def _step(note: object) -> str:
    """A step of a path, from the notes that cattrs leaves on what it found."""
    if isinstance(note, AttributeValidationNote):
        return f".{note.name}"
    return f"[{note.index}]" if isinstance(note, IterableValidationNote) else ""


def short(value: object) -> str:
    """A value as the recipe shows it, cut where it is long (and where YAML aliases make it endless)."""
    shorten = reprlib.Repr()
    shorten.maxlevel, shorten.maxlist, shorten.maxdict, shorten.maxstring, shorten.maxother = 2, 4, 4, 60, 60
    return shorten.repr(value)
