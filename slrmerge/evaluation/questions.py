"""The questions of an evaluation: rows of a file, or of a dataset on the Hub."""

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, TypeVar

import xxhash
from pydantic import AfterValidator, ConfigDict, Field

from slrmerge.checkpoint.location import Repository, parse_place
from slrmerge.errors import DataError, Problem, raise_all, require_extra, require_type
from slrmerge.evaluation.lines import PROBLEMS_SHOWN
from slrmerge.io.files import read_file
from slrmerge.io.model import InvalidValue, Model, validate_as
from slrmerge.io.sizes import shorten
from slrmerge.io.strict_json import InvalidJsonError, parse_json

Q = TypeVar("Q", bound="Question")

MAX_DATA_BYTES = 1 << 28


def _not_blank(text: str) -> str:
    if not text.strip():
        raise InvalidValue("empty", "is blank", "write a question, or remove the row")
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_not_blank)]

_FORMATS = ".json, .jsonl, .csv or .txt"


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """A row of the data, and its place for messages."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class QuestionData:
    """Rows, and a name that identifies them: with a file's digest, or a dataset's commit."""

    name: str
    rows: Sequence[QuestionRow]


class Question(Model):
    """A row as a task reads it; other columns are ignored. A column with several names is a field with AliasChoices.

    `text` is the prompt for a model.
    """

    model_config = ConfigDict(extra="ignore")
    error = DataError

    text: Text

    @property
    def reference(self) -> list[str]:
        """The right answers, if there are any."""
        return []

    @property
    def id(self) -> str:
        """A digest of the text."""
        return prompt_id(self.text)


def prompt_id(text: str) -> str:
    """The id of a prompt in sample files: a digest of its text."""
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))


def read_data(data: str | os.PathLike[str], *, subset: str | None = None, split: str = "test") -> QuestionData:
    """The rows of `data`: a file (.json, .jsonl, .csv, or .txt with one prompt per line), or a Hub dataset `org/name`.

    A JSON object has questions as keys. Raises DataError, HubError, and MissingExtraError where a Hub dataset needs
    `datasets`, which is not installed.
    """
    require_type("data", data, (str, os.PathLike), "pass a file or the name of a dataset on the Hub")
    source = parse_place(data) if isinstance(data, str) else Path(data)
    found = _read_dataset(source, subset, split) if isinstance(source, Repository) else _read_file(source)
    if not found.rows:
        raise DataError(Problem("empty", str(data), "contains no questions"))
    return found


def parse_questions(kind: type[Q], rows: Iterable[QuestionRow]) -> list[Q]:
    """The rows as questions without repetitions. Raises DataError with the problems of all rows, at most 10 in full."""
    found: dict[str, Q] = {}
    problems: list[Problem] = []
    for row in rows:
        try:
            question = validate_as(kind, row.values, row.where)
        except DataError as error:
            problems += error.problems
        else:
            if found.setdefault(question.id, question) != question:
                what = "repeats a question with different answers"
                problems.append(Problem("conflicting-answers", row.where, what, "keep one of the two"))
    raise_shown(problems)
    return list(found.values())


def raise_shown(problems: Sequence[Problem]) -> None:
    """Raise DataError with these problems, at most 10 in full; do nothing where there are none."""
    more = len(problems) - PROBLEMS_SHOWN
    rest = [Problem("more-problems", "…", f"and {more} more problems")] if more > 0 else []
    raise_all([*problems[:PROBLEMS_SHOWN], *rest], DataError)


def _read_file(path: Path) -> QuestionData:
    suffix = path.suffix.lower()
    read = {".json": _json, ".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".txt": _lines}.get(suffix)
    try:
        raw = read_file(path, MAX_DATA_BYTES)
    except OSError as error:
        remedy = f"name a {_FORMATS} file, or a dataset on the Hub"
        raise DataError(Problem("unreadable", str(path), f"cannot be read ({error.strerror})", remedy)) from error
    if read is None:
        raise DataError(Problem("unknown-format", str(path), "has an unknown file format", f"use {_FORMATS}"))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(Problem("not-utf8", str(path), f"is not UTF-8 text (byte {error.start})")) from None
    return QuestionData(f"{path.name} {xxhash.xxh3_64_hexdigest(raw)}", list(read(path, text)))


def _json(path: Path, text: str) -> Iterator[QuestionRow]:
    content = _parse_json(str(path), text)
    if isinstance(content, dict):
        content = [
            {"question": question, **(value if isinstance(value, dict) else {"answers": value})}
            for question, value in content.items()
        ]
    if not isinstance(content, list):
        raise DataError(
            Problem("wrong-type", str(path), "is neither a list of rows nor an object with questions as keys")
        )
    for number, values in enumerate(content):
        yield _row(f"{path}[{number}]", values)


def _jsonl(path: Path, text: str) -> Iterator[QuestionRow]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _row(f"{path}:{number}", _parse_json(f"{path}:{number}", line))


def _csv(path: Path, text: str) -> Iterator[QuestionRow]:
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        if repeated := [name for name in names if names.count(name) > 1]:
            raise DataError(
                Problem("duplicate-key", str(path), f"has two columns {shorten(repeated[0])}", "rename one")
            )
        for values in reader:
            named = {name: value for name, value in values.items() if name is not None and value is not None}
            yield QuestionRow(f"{path}:{reader.line_num}", named)
    except csv.Error as error:
        where = f"{path}, after line {reader.line_num}"
        raise DataError(Problem("invalid-csv", where, f"invalid CSV ({error})")) from None


def _lines(path: Path, text: str) -> Iterator[QuestionRow]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield QuestionRow(f"{path}:{number}", {"prompt": line.strip()})


def _parse_json(where: str, text: str) -> Any:
    try:
        return parse_json(text)
    except InvalidJsonError as error:
        raise DataError(Problem("invalid-json", where, f"invalid JSON ({error})")) from None


def _row(where: str, values: object) -> QuestionRow:
    if not isinstance(values, dict):
        raise DataError(Problem("wrong-type", where, "is not an object with columns as keys"))
    return QuestionRow(where, values)


def _read_dataset(repository: Repository, subset: str | None, split: str) -> QuestionData:
    require_extra("eval", "datasets")
    from slrmerge.evaluation.hub_dataset import load_rows

    found = load_rows(repository, subset=subset, split=split)
    rows = [QuestionRow(f"{repository}[{number}]", values) for number, values in enumerate(found.rows)]
    return QuestionData(" ".join(filter(None, (str(Repository(repository.name, found.commit)), subset, split))), rows)
