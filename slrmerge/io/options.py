"""Options: each is defined once, with its default, range and help text.

An option class is a frozen dataclass whose fields are made by `option`. Its constructor checks every value, the command
line is generated from it (`cli.options`), and `takes_options` gives a function its fields as keyword arguments.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import date
from functools import partial, wraps
from itertools import chain
from math import inf
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from slrmerge.errors import OptionError, Problem, did_you_mean, raise_all
from slrmerge.io.progress import Progress
from slrmerge.io.sizes import InvalidSizeError, parse_bytes, shorten

C = TypeVar("C")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Option:
    """What is known of an option besides its type and default.

    `flag` is its name on the command line where that is not the field's.
    `above` is an open lower bound. `is_size` marks a number of bytes, which may be given as text such as 4GB; `is_date`
    a date, as text such as 2025-03-07. `or_auto` allows the word auto instead of a number.
    `default_help` describes a default of None. `or_file` are suffixes of files that may be named instead of a choice.
    `group` is the heading under which the command line's help lists it.
    """

    help: str
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    or_file: tuple[str, ...] = ()
    metavar: str | None = None
    flag: str | None = None
    is_size: bool = False
    is_date: bool = False
    or_auto: bool = False
    default_help: str = ""
    group: str = ""


def option(default: Any, help: str, **more: Any) -> Any:  # noqa: A002 (the word that click and argparse use)
    """A dataclass field that is an option; `more` are fields of `Option`."""
    return field(default=default, metadata={"option": Option(help, **more)})


def options_in(group: str) -> Callable[..., Any]:
    """`option`, for options under one heading of the command line's help."""
    return partial(option, group=group)


def options_of(kind: type[Any]) -> dict[str, Option]:
    """The options of an option class, by field."""
    return {each.name: each.metadata["option"] for each in fields(kind) if "option" in each.metadata}


class Options:
    """The base of option classes. Raises OptionError with every value of the wrong type or out of range."""

    def __post_init__(self) -> None:
        problems: list[Problem] = []
        types = get_type_hints(type(self))
        for name, known in options_of(type(self)).items():
            value = getattr(self, name)
            if known.is_size and value is not None:
                try:
                    object.__setattr__(self, name, parse_bytes(value))
                except InvalidSizeError as error:
                    problems.append(Problem("invalid-size", name, error.what, error.remedy))
            else:
                problems += _type_problems(name, value, types[name]) or _problems(name, value, known)
        raise_all(problems, OptionError)


def make_options(kind: type[C], values: dict[str, Any]) -> C:
    """An option class from keyword arguments. Raises OptionError for an unknown one, with the nearest known."""
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    unknown = [name for name in values if name not in known]
    raise_all(
        (Problem("unknown-option", name, "is not an option", did_you_mean(name, known)) for name in unknown),
        OptionError,
    )
    return kind(**values)


def takes_options(kind: type[Any]) -> Callable[[F], F]:
    """Show the fields of an option class in the signature and the docstring of a function that takes `**options`."""

    def decorate(function: F) -> F:
        listed = "\n".join(f"    {name}: {known.help}" for name, known in options_of(kind).items())
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n{listed}\n"
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        more = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in inspect.signature(kind).parameters.values()
        ]
        function.__signature__ = signature.replace(parameters=own + more)  # type: ignore[attr-defined]
        return function

    return decorate


def checks_types(function: F) -> F:
    """Make a function raise OptionError for arguments that are not of the simple type that they are annotated with."""

    @wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        types = get_type_hints(function)
        given = {**dict(zip(types, args, strict=False)), **options}  # what cannot be given, Python reports
        problems = (_type_problems(name, value, types[name]) for name, value in given.items() if name in types)
        raise_all(chain.from_iterable(problems), OptionError)
        return function(*args, **options)

    return cast("F", checked)


_SIMPLE_TYPES: dict[type, str] = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a string", Progress: "a slrmerge.Progress"
}  # fmt: skip


def _type_problems(name: str, value: Any, annotation: Any) -> list[Problem]:
    """Whether a value has one of the simple types that its field is annotated with; other types are not checked."""
    types = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if not {*types} <= {*_SIMPLE_TYPES, NoneType}:
        return []
    accepted = {*types, int} if float in types else {*types}
    if type(value) in accepted or (isinstance(value, tuple(accepted)) and not isinstance(value, bool)):
        return []
    expected = " or ".join(_SIMPLE_TYPES.get(each, "None") for each in types)
    return [Problem("wrong-type", name, f"expected {expected}, got {shorten(value)}")]


def _problems(name: str, value: Any, known: Option) -> list[Problem]:
    if value is None or (known.or_auto and value == "auto"):
        return []
    if known.is_date:
        try:
            date.fromisoformat(value)
        except ValueError:
            return [Problem("invalid-date", name, f"{shorten(value)} is not a date", "write YEAR-MONTH-DAY")]
    if known.choices:
        chosen = value if isinstance(value, tuple) else (value,)
        return [
            Problem("invalid-choice", name, f"{shorten(each)} is not a choice", did_you_mean(str(each), known.choices))
            for each in chosen
            if each not in known.choices and not str(each).endswith(known.or_file)
        ]
    bounds = {"at least": known.minimum, "above": known.above, "at most": known.maximum}
    bounds = {word: bound for word, bound in bounds.items() if bound is not None}
    if not bounds:
        return []
    expected = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items())
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    inside = (
        is_number
        and abs(value) < inf  # nan is not
        and (known.minimum is None or value >= known.minimum)
        and (known.above is None or value > known.above)
        and (known.maximum is None or value <= known.maximum)
    )
    remedy = f"give a number {expected}{', or auto' if known.or_auto else ''}"
    return [] if inside else [Problem("out-of-range", name, f"{shorten(value)} is not in range", remedy)]
