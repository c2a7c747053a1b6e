"""Files of prompts with their generations, as NoveltyBench has them: answers from elsewhere, and answers for elsewhere.

A line is JSON: `{"id": …, "prompt": …, "model": …, "generations": […]}`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import xxhash

from slrmerge.errors import DataError, Problem
from slrmerge.evaluation.models import AnswerSink, SampleRequest
from slrmerge.evaluation.questions import PROBLEMS_SHOWN, raise_shown
from slrmerge.evaluation.samples import MAX_LINE_BYTES, Answer, Settings
from slrmerge.evaluation.tasks.base import ModelResponses
from slrmerge.io.files import create_folder, open_no_link
from slrmerge.io.pieces import translate_os_errors
from slrmerge.io.sizes import shorten
from slrmerge.io.strict_json import parse_json
from slrmerge.io.text import printable, to_json

SUFFIX = ".jsonl"


class GenerationsFile:
    """A ChatModel that gives the answers in a file: sample n of a prompt is its generation n.

    Other keys than `prompt` and `generations` are ignored. Raises DataError for a file that cannot be read, for lines
    of another form, and in `answer` for answers that it does not have.
    """

    dtype = None

    def __init__(self, path: Path) -> None:
        self._path = path
        digest = xxhash.xxh3_64()
        self._generations = self._read(digest)
        self.model_id = f"{printable(path.name)} {digest.hexdigest()}"
        """The file's name and a digest of its content."""

    def check(self) -> None:
        """See `ChatModel`."""

    def close(self) -> None:
        """See `ChatModel`."""

    def answer(self, requests: Sequence[SampleRequest], settings: Settings, sink: AnswerSink) -> None:
        """See `ChatModel`. Whether answers are truncated is not known."""
        if settings.temperature == 0:
            what = "has samples, not the answers of greedy decoding"
            remedy = "name another model first, choose a temperature above 0, or pass missed=False to ask all questions"
            raise DataError(Problem("no-greedy-answers", str(self._path), what, remedy))
        raise_shown(list(self._lacking(requests)))
        for request in requests:
            sink.keep(request, Answer(self._generations[request.prompt][request.key.sample], "stop"))

    def _lacking(self, requests: Sequence[SampleRequest]) -> Iterable[Problem]:
        wanted: dict[str, int] = {}
        for request in requests:
            wanted[request.prompt] = max(wanted.get(request.prompt, 0), request.key.sample + 1)
        for prompt, count in wanted.items():
            known = len(self._generations.get(prompt, ()))
            if known < count:
                what = f"has {known} of {count} generations for the prompt {shorten(prompt)}"
                yield Problem("generations-missing", str(self._path), what, "add them, or ask for fewer samples")

    def _read(self, digest: xxhash.xxh3_64) -> Mapping[str, Sequence[str]]:
        found: dict[str, list[str]] = {}
        problems: list[Problem] = []
        try:
            with open(self._path, "rb") as file:
                for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
                    digest.update(line)
                    if line.strip() and len(problems) < PROBLEMS_SHOWN:
                        try:
                            prompt, generations = _line(parse_json(line))
                        except (ValueError, KeyError, TypeError):
                            what = "is not a prompt with its generations"
                            remedy = 'write {"prompt": "…", "generations": ["…", …]}'
                            problems.append(Problem("not-generations", f"{self._path}:{number}", what, remedy))
                        else:
                            found.setdefault(prompt, []).extend(generations)
        except OSError as error:
            what = f"cannot be read ({error.strerror})"
            raise DataError(Problem("data-unreadable", str(self._path), what, "check the path")) from error
        if problems:
            raise DataError(*problems)
        return found


def _line(value: Any) -> tuple[str, list[str]]:
    """Raises KeyError and TypeError."""
    prompt, generations = value["prompt"], value["generations"]
    if not isinstance(prompt, str) or not isinstance(generations, list):
        raise TypeError("a value has another type")
    if not all(isinstance(text, str) for text in generations):
        raise TypeError("a generation is not text")
    return prompt, generations


def noveltybench_folder(folder: Path, label: str) -> Path:
    """Where the generations of a model are in an evaluation's folder, and what NoveltyBench's scripts make of them."""
    name = quote(label, safe=" +=,") if label.strip(".") else label.replace(".", "%2E")
    return folder / "noveltybench" / name


def write_generations(folder: Path, model: str, responses: Iterable[ModelResponses[Any]]) -> None:
    """Write `generations.jsonl` of one model to a new or existing folder, atomically. Raises OutputError.

    Missing answers are empty.
    """
    path = folder / "generations.jsonl"
    beside = path.with_name(f"{path.name}.new")
    with translate_os_errors(path):
        create_folder(folder, durable=False)
        with open(beside, "wb", opener=open_no_link) as file:
            for each in responses:
                line = {
                    "id": each.question.id,
                    "prompt": each.question.text,
                    "model": model,
                    "generations": [text or "" for text in each.texts],
                }
                file.write(to_json(line).encode("utf-8", "replace") + b"\n")
        os.replace(beside, path)
