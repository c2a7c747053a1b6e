"""The questions of an evaluation: the rows of a file, or of a dataset on the Hub."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import xxhash

from slrmerge.errors import DataError, Problem, require_extra
from slrmerge.repository import Repository, parse_source
from slrmerge.structure import FaultsError, structured

PROBLEMS_SHOWN = 10

Q = TypeVar("Q", bound="Question")

_FORMS = ".json, .jsonl, .csv or .txt"


@dataclass(frozen=True, slots=True)
class Row:
    """What a row of the data says, and where it stands."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row that a task can use; further columns are nobody's business.

    `aliases` are what a column may be called, in the order they are looked for.
    """

    aliases: ClassVar[Mapping[str, Sequence[str]]] = {}

    @property
    def text(self) -> str:
        """What a model is asked."""
        raise AttributeError("text")

    @property
    def id(self) -> str:
        """The same for the same text, whatever stands around it."""
        return prompt_id(self.text)


def prompt_id(text: str) -> str:
    """The name that samples know a prompt by."""
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))


class Data(NamedTuple):
    """Rows, and what tells them from others: a file's digest, a dataset's commit."""

    name: str
    rows: Sequence[Row]


def read_data(data: str, *, subset: str | None = None, split: str = "test") -> Data:
    """The rows of `data`: a file (.json, .jsonl, .csv, or .txt with a prompt a line), or a Hub dataset `org/name`.

    A JSON map counts as rows too: its keys are the questions. `subset` and `split` are of a Hub dataset. Raises
    DataError, and MissingExtraError where a dataset is named and `datasets` is not installed.
    """
    source = parse_source(data)
    found = _dataset(source, subset, split) if isinstance(source, Repository) else _file(source)
    if not found.rows:
        raise DataError(Problem(data, "holds no questions"))
    return found


def questions_of(kind: type[Q], rows: Iterable[Row]) -> list[Q]:
    """The rows as questions, each text once. Raises DataError with the problems of all rows."""
    found: dict[str, Q] = {}
    problems: list[Problem] = []
    for row in rows:
        try:
            question = structured(kind, _renamed(row.values, kind.aliases), row.where, strict=False)
        except FaultsError as error:
            problems += error.problems
        else:
            if found.setdefault(question.id, question) != question:
                problems.append(Problem(row.where, "is asked before, with other answers", "give it once"))
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        rest = [Problem("…", f"and {more} problems more")] if more > 0 else []
        raise DataError(*problems[:PROBLEMS_SHOWN], *rest)
    return list(found.values())


def _renamed(values: Mapping[str, Any], aliases: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The values of a row with the names that its columns go by here."""
    found = {name: next((each for each in others if each in values), name) for name, others in aliases.items()}
    return {**values, **{name: values[each] for name, each in found.items() if each in values}}


def _file(path: Path) -> Data:
    read = {".json": _json, ".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".txt": _lines}.get(path.suffix.lower())
    try:
        if read is None:
            path.stat()
            raise DataError(Problem(str(path), "is of no form that is read here", f"give {_FORMS}"))
        raw = path.read_bytes()
        return Data(f"{path.name} {xxhash.xxh3_64_hexdigest(raw)}", list(read(path, raw.decode("utf-8-sig"))))
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise DataError(Problem(str(path), what, f"name a {_FORMS} file, or a dataset on the Hub")) from error
    except UnicodeDecodeError as error:
        raise DataError(Problem(str(path), f"is not UTF-8 text (byte {error.start})")) from None


def _json(path: Path, text: str) -> Iterator[Row]:
    content = _parsed(str(path), text)
    if isinstance(content, dict):
        content = [
            {"question": question, **(value if isinstance(value, dict) else {"answers": value})}
            for question, value in content.items()
        ]
    if not isinstance(content, list):
        raise DataError(Problem(str(path), "is neither a list of rows nor a map of questions"))
    for number, values in enumerate(content):
        yield _row(f"{path}[{number}]", values)


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _row(f"{path}:{number}", _parsed(f"{path}:{number}", line))


def _csv(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    try:
        for values in reader:
            named = {name: value for name, value in values.items() if name is not None and value is not None}
            yield Row(f"{path}:{reader.line_num}", named)
    except csv.Error as error:
        raise DataError(Problem(f"{path}, after line {reader.line_num}", f"is not sound CSV ({error})")) from None


def _lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Row(f"{path}:{number}", {"prompt": line.strip()})


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(Problem(where, f"is not sound JSON ({error})")) from None


def _row(where: str, values: object) -> Row:
    if not isinstance(values, dict):
        raise DataError(Problem(where, "is not a map of columns to values"))
    return Row(where, values)


def _dataset(repository: Repository, subset: str | None, split: str) -> Data:
    require_extra("eval", "datasets")
    from slrmerge.hub.datasets import load_rows

    commit, found = load_rows(repository, subset=subset, split=split)
    rows = [Row(f"{repository}[{number}]", values) for number, values in enumerate(found)]
    return Data(" ".join(filter(None, (str(Repository(repository.name, commit)), subset, split))), rows)
