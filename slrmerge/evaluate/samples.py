"""What models answered: a line of JSON a sample, written as it comes, never asked for again."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import xxhash

from slrmerge.errors import OutputError, Problem
from slrmerge.writer import output_error


class Settings(NamedTuple):
    """What an answer depends on besides its prompt.

    `temperature` 0 is greedy decoding; `min_p` keeps the tokens that are at least so probable, relative to the most
    probable one; `max_tokens` is the length at which an answer is cut off. `asked_of` names the model exactly, `seed`
    is what samples' own seeds are drawn from, and `verbalized` the answers asked for in one call.
    """

    asked_of: str
    temperature: float
    min_p: float
    max_tokens: int
    seed: int = 0
    verbalized: int | None = None


class Key(NamedTuple):
    """Which sample: of which model, by its label, for which prompt, the how manieth."""

    model: str
    prompt: str
    sample: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said; `finish_reason` is `stop` where it ended by itself and `length` where it was cut off."""

    text: str
    finish_reason: str


def seed_of(seed: int, prompt: str, sample: int) -> int:
    """A sample's own seed, 31 bits: the same for all models, another for every prompt and sample."""
    return xxhash.xxh3_64_intdigest(f"{seed} {prompt} {sample}".encode()) >> 33


class SampleFile:
    """A JSONL file of samples, opened to go on where it was. Use it in a `with`.

    Each line holds model, prompt id, sample index, seed, settings, text and finish reason. A last line that was cut off
    by a kill is dropped. Raises OutputError for a file that is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers: dict[Key, Answer] = {}
        self._made_by: dict[Key, Settings] = {}
        self._known: dict[Settings, Settings] = {}
        try:
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (held until the end of the `with`)
        except OSError as error:
            raise output_error(path, error) from error
        try:
            self._bytes = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._answers)

    def require_same(self, keys: Iterable[Key], settings: Settings) -> None:
        """Raise OutputError where one of these samples was made by other settings."""
        for key in keys:
            then = self._made_by.get(key, settings)
            if then != settings:
                pairs = zip(Settings._fields, then, settings, strict=True)
                changed = ", ".join(f"{name} {old}, now {new}" for name, old, new in pairs if old != new)
                what = f"has samples of {key.model} made by other settings ({changed})"
                raise OutputError(Problem(str(self.path), what, "choose another --out, or the settings of then"))

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        return [key for key in keys if key not in self._answers]

    def answer(self, key: Key) -> Answer | None:
        return self._answers.get(key)

    def append(self, key: Key, answer: Answer, settings: Settings) -> None:
        """Write a sample down, whole or not at all. Raises NoSpaceError and OutputError."""
        seed = seed_of(settings.seed, key.prompt, key.sample)
        line = {**key._asdict(), "seed": seed, "settings": settings._asdict(), **asdict(answer)}
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            left = memoryview(data)
            while left:  # a full disk takes a part first, and says so at the next
                left = left[self._file.write(left) :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._bytes)
            raise output_error(self.path, error) from error
        self._bytes += len(data)
        self._keep(key, answer, settings)

    def _keep(self, key: Key, answer: Answer, settings: Settings) -> None:
        self._answers[key] = answer
        self._made_by[key] = self._known.setdefault(settings, settings)  # the same few, many thousand times

    def _read(self) -> int:
        """Take in what is there; the bytes of it that are whole."""
        whole = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file.fileno(), whole)
                    break
                try:
                    self._keep(*_sample(json.loads(line)))
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    where = f"{self.path}:{number}"
                    raise OutputError(Problem(where, "is not a sample", "choose another --out")) from error
                whole += len(line)
        return whole


def _sample(line: Mapping[str, Any]) -> tuple[Key, Answer, Settings]:
    key = Key(str(line["model"]), str(line["prompt"]), int(line["sample"]))
    answer = Answer(str(line["text"]), str(line["finish_reason"]))
    return key, answer, Settings(**line["settings"])
