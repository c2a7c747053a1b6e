"""pydantic models whose errors are slrmerge's: every problem at once, each with its path (`$.layers[0].range`)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from slrmerge.errors import MAX_PROBLEMS, Problem, RecipeError, SlrmergeError, did_you_mean
from slrmerge.io.sizes import shorten

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

M = TypeVar("M", bound="Model")


class InvalidValue(PydanticCustomError):  # noqa: N818 (never seen by a caller: it becomes a Problem)
    """Raised by a validator: what is wrong with a value and what to write; becomes a Problem at the value's path."""

    def __new__(cls, code: str, what: str, remedy: str = "") -> "InvalidValue":
        return super().__new__(cls, code, "{what}; {remedy}", {"what": what, "remedy": remedy})


class _ModelType(ModelMetaclass):
    """Calls of a model's constructor raise its own error; validation of nested models does not pass through here."""

    def __call__(self, *args: Any, **values: Any) -> Any:
        kind = cast("type[Model]", self)
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise kind.error(*problems_of(error, kind, kind.__name__)) from None


class Model(BaseModel, metaclass=_ModelType):
    """A frozen value that refuses unknown keys. Its constructor and `validate_as` raise `error`."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, defer_build=True)
    error: ClassVar[type[SlrmergeError]] = RecipeError

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return plain(self).items()


def validate_as(kind: type[M], content: object, where: str, *, place: Callable[[str], str] | None = None) -> M:
    """A model from plain values that were read at `where`. Raises the model's error with every problem found.

    `place` turns a path such as `$.layers[0]` into the place that a message names; the default is `where: path`.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise kind.error(*problems_of(error, kind, where, place)) from None


def problems_of(
    error: ValidationError, kind: type[BaseModel], where: str, place: Callable[[str], str] | None = None
) -> list[Problem]:
    """What pydantic found, as Problems; alternatives of a union that failed at one path are reported once."""
    found: dict[tuple[str, str], Problem] = {}
    errors = error.errors(include_url=False)
    containers = {details["loc"][:length] for details in errors for length in range(len(details["loc"]))}
    for details in errors:
        if len(found) > MAX_PROBLEMS:
            break
        location, unknown = details["loc"], ""
        if details["type"] == "too_short" and location in containers:
            continue  # pydantic counts valid entries only
        if details["type"] in ("extra_forbidden", "invalid_key"):
            location, unknown = location[:-1], str(location[-1])
            code, what = "unknown-key", f"unknown key {unknown}"
            remedy = did_you_mean(unknown, _keys_at(kind, location))
        else:
            code, what, remedy = _described(details)
        path = "$" + "".join(map(_step, location))
        found.setdefault((path, unknown), Problem(code, place(path) if place else f"{where}: {path}", what, remedy))
    return list(found.values())


def _step(step: int | str) -> str:
    """A step of a path; empty for the alternative of a union that pydantic tried, such as `list[int]`."""
    if isinstance(step, int):
        return f"[{step}]"
    return f".{step}" if step.replace("-", "_").isidentifier() else ""


def _described(details: ErrorDetails) -> tuple[str, str, str]:
    """Code, what is wrong, and remedy."""
    code, context = details["type"], details.get("ctx", {})
    value = shorten(details["input"])
    if "what" in context:
        return code, context["what"], context["remedy"]
    if code == "missing":
        return "missing-key", "is missing", "add it"
    if code in _EXPECTED:
        return "wrong-type", f"expected {_EXPECTED[code]}, got {value}", ""
    if code == "literal_error":
        return "invalid-choice", f"expected {context['expected']}, got {value}", ""
    if code in ("too_short", "string_too_short"):
        return "empty", "must not be empty", "" if isinstance(details["input"], str) else "give at least one"
    if code in _BOUNDS:
        word, bound = _BOUNDS[code]
        return "out-of-range", f"{value} is not in range", f"give a number {word} {context[bound]:g}"
    return "invalid-value", f"{value} is not valid", details["msg"][:1].lower() + details["msg"][1:]


_EXPECTED = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
"""pydantic's codes of bounds: a word for each, and where it puts the bound."""


def _keys_at(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the model at a location, as far as plain fields and lists of models lead there."""
    for step in location:
        if isinstance(step, str) and step in kind.model_fields:
            inner = next(iter(_models_in(kind.model_fields[step].annotation)), None)
            if inner is not None:
                kind = inner
    return [each.alias or name for name, each in kind.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)


def plain(value: BaseModel, **more: Any) -> Mapping[str, Any]:
    """A model as plain values, without what is at its default."""
    return value.model_dump(mode="json", exclude_defaults=True, **more)
