"""Samples on disk: one line of JSON each, appended as they arrive, never requested again. Texts stay on disk."""

import os
import stat
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import xxhash

from slrmerge.errors import OutputError, Problem, raise_all
from slrmerge.evaluation.lines import MAX_LINE_BYTES, PROBLEMS_SHOWN, lines_of
from slrmerge.io.files import open_no_link
from slrmerge.io.pieces import output_error
from slrmerge.io.strict_json import parse_json
from slrmerge.io.text import to_json

REFUSED = "refused"
"""The finish reason of a prompt that a model refuses, for example because it is too long."""


class Settings(NamedTuple):
    """What an answer depends on besides its prompt.

    `temperature` 0 is greedy decoding; `min_p` is the minimum probability of a token relative to the most probable one;
    `max_tokens` is the maximum length of an answer. `seed` is the seed that samples' own seeds derive from, and
    `verbalized` the number of answers requested at once. `dtype` is that of a model in this process, None for float32.
    """

    model_id: str
    temperature: float
    min_p: float
    max_tokens: int
    seed: int = 0
    verbalized: int | None = None
    dtype: str | None = None


class SampleKey(NamedTuple):
    """Identifies a sample: the model's label, the prompt's id, the sample's index."""

    model: str
    prompt: str
    sample: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer; `finish_reason` is `stop` where it is complete and `length` where it was truncated.

    It is `refused`, and the text empty, for a prompt that the model refuses; `error` then says why.
    """

    text: str
    finish_reason: str
    error: str = ""

    @property
    def is_refusal(self) -> bool:
        return self.finish_reason == REFUSED


def seed_of(seed: int, prompt: str, sample: int) -> int:
    """The seed of one sample, 31 bits: equal for all models, different for each prompt and index."""
    return xxhash.xxh3_64_intdigest(f"{seed} {prompt} {sample}".encode()) >> 33


def sample_keys(label: str, prompts: Iterable[str], samples: int) -> list[SampleKey]:
    """The keys of `samples` samples of a model for each prompt id, prompt by prompt."""
    return [SampleKey(label, prompt, sample) for prompt in prompts for sample in range(samples)]


class SampleFile:
    """A JSONL file of samples, which continues where an earlier run stopped. Use it in a `with`.

    Each line holds model, prompt id, sample index, seed, settings, text and finish reason; a refusal also its error.
    Drops an incomplete last line, which a kill leaves, and in the end a file without samples. Raises OutputError with
    the lines that are not samples, at most 10.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers: dict[SampleKey, int] = {}
        self._starts, self._settings_of = array("Q"), array("L")  # of each sample: its line, the number of its settings
        self._settings: dict[Settings, int] = {}
        what, remedy = "is not a regular file", "choose another output folder"
        not_a_file = OutputError(Problem("not-a-file", str(path), what, remedy))
        try:
            # Open until the end of the `with`. Through a link, a file of the user's would be written to, or cut short.
            self._file = open(path, "a+b", buffering=0, opener=open_no_link)  # noqa: SIM115
        except OSError as error:
            raise (not_a_file if path.is_symlink() else output_error(path, error)) from error
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise not_a_file
            self._bytes = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if not self._bytes:
            with suppress(OSError):
                self.path.unlink()

    def __len__(self) -> int:
        return len(self._numbers)

    def require_same(self, keys: Iterable[SampleKey], settings: Settings) -> None:
        """Raise OutputError where one of these samples was generated with other settings."""
        every = list(self._settings)
        for key in keys:
            number = self._numbers.get(key)
            earlier = settings if number is None else every[self._settings_of[number]]
            if earlier != settings:
                pairs = zip(Settings._fields, earlier, settings, strict=True)
                changed = ", ".join(f"{name} {old}, now {new}" for name, old, new in pairs if old != new)
                what = f"contains samples of {key.model} with other settings ({changed})"
                remedy = "choose another output folder, or use the earlier settings"
                raise OutputError(Problem("settings-changed", str(self.path), what, remedy))

    def missing(self, keys: Iterable[SampleKey]) -> list[SampleKey]:
        return [key for key in keys if key not in self._numbers]

    def answer(self, key: SampleKey) -> Answer:
        """A sample that is not missing."""
        return next(self.answers([key]))

    def answers(self, keys: Iterable[SampleKey]) -> Iterator[Answer]:
        """Samples that are not missing, read from the file. Raises OutputError where it was changed meanwhile."""
        places = [(key, self._starts[self._numbers[key]]) for key in keys]
        try:
            with open(self.path, "rb") as file:
                for key, start in places:
                    file.seek(start)
                    found, answer, _ = _sample(parse_json(file.readline(MAX_LINE_BYTES)))
                    if found != key:
                        raise ValueError(f"{found} in the place of {key}")
                    yield answer
        except OSError as error:
            raise output_error(self.path, error) from error
        except (ValueError, KeyError, TypeError) as error:
            what = "was changed while it was in use"
            raise OutputError(Problem("samples-changed", str(self.path), what, "run again")) from error

    def append(self, key: SampleKey, answer: Answer, settings: Settings) -> None:
        """Write a sample, completely or not at all. Raises NoSpaceError and OutputError.

        Lone surrogates, which UTF-8 cannot encode, become question marks.
        """
        answer = Answer(*(text.encode("utf-8", "replace").decode() for text in astuple(answer)))
        seed = seed_of(settings.seed, key.prompt, key.sample)
        line = {**key._asdict(), "seed": seed, "settings": settings._asdict(), **asdict(answer)}
        if not answer.error:
            del line["error"]
        data = to_json(line).encode() + b"\n"
        try:
            left = memoryview(data)
            while left:  # a full disk accepts a part first, and fails at the next write
                left = left[self._file.write(left) :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._bytes)
            raise output_error(self.path, error) from error
        self._keep(key, settings, start=self._bytes)
        self._bytes += len(data)

    def _keep(self, key: SampleKey, settings: Settings, *, start: int) -> None:
        """Remember where a sample is; of two with one key, the last."""
        model, prompt, sample = key
        self._numbers[SampleKey(sys.intern(model), sys.intern(prompt), sample)] = len(self._starts)
        self._starts.append(start)
        self._settings_of.append(self._settings.setdefault(settings, len(self._settings)))

    def _read(self) -> int:
        """Read the samples of earlier runs; returns the bytes of the complete lines."""
        complete = 0
        problems: list[Problem] = []
        with open(self.path, "rb") as file:
            for number, start, line in lines_of(file):
                if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                    break
                try:
                    key, _, settings = _sample(parse_json(line))
                    self._keep(key, settings, start=start)
                except (ValueError, KeyError, TypeError):
                    remedy = "delete this line: its sample is then requested again; or choose another output folder"
                    problems.append(Problem("not-a-sample", f"{self.path}:{number}", "is not a sample", remedy))
                    if len(problems) == PROBLEMS_SHOWN:
                        break
                complete = start + len(line)
        raise_all(problems, OutputError)
        if complete < os.fstat(self._file.fileno()).st_size:
            os.ftruncate(self._file.fileno(), complete)
        return complete


def _sample(line: Mapping[str, Any]) -> tuple[SampleKey, Answer, Settings]:
    """A line of the file. Raises ValueError, KeyError and TypeError."""
    model, prompt, sample = line["model"], line["prompt"], line["sample"]
    words = (line["text"], line["finish_reason"], line.get("error", ""))
    if type(sample) is not int or not all(isinstance(word, str) for word in (model, prompt, *words)):
        raise TypeError("a value has another type")
    return SampleKey(model, prompt, sample), Answer(*words), Settings(**line["settings"])
