"""Files of prompts with their generations, as NoveltyBench has them: answers from elsewhere, and answers for elsewhere.

A line is JSON: `{"id": …, "prompt": …, "model": …, "generations": […]}`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import xxhash

from slrmerge.errors import DataError, Problem, raise_all
from slrmerge.evaluation.lines import MAX_LINE_BYTES, PROBLEMS_SHOWN, lines_of, open_data
from slrmerge.evaluation.models import AnswerSink, ChatModel, SampleRequest
from slrmerge.evaluation.questions import raise_shown
from slrmerge.evaluation.samples import Answer, Settings
from slrmerge.evaluation.tasks.base import ModelResponses
from slrmerge.io.files import create_folder, replace_file
from slrmerge.io.pieces import translate_os_errors
from slrmerge.io.sizes import shorten
from slrmerge.io.strict_json import parse_json
from slrmerge.io.text import printable, to_json

SUFFIX = ".jsonl"


class GenerationsFile(ChatModel):
    """A ChatModel that gives the answers in a file: sample n of a prompt is its generation n. They stay in the file.

    Other keys than `prompt` and `generations` are ignored. Raises DataError for a file that cannot be read, for lines
    of another form, and in `answer` for answers that it does not have.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, list[int]] = {}  # where the lines of each prompt start
        self._counts: Counter[str] = Counter()
        self._digest = xxhash.xxh3_64()
        self._read()
        self._generations = lru_cache(1)(self._read_generations)  # a prompt's samples follow each other

    @property
    def model_id(self) -> str:
        """The file's name and a digest of its content."""
        return f"{printable(self._path.name)} {self._digest.hexdigest()}"

    def answer(self, requests: Sequence[SampleRequest], settings: Settings, sink: AnswerSink) -> None:
        """See `ChatModel`. Whether answers are truncated is not known."""
        if settings.temperature == 0:
            what = "has samples, not the answers of greedy decoding"
            remedy = "name another model first, choose a temperature above 0, or pass missed=False to ask all questions"
            raise DataError(Problem("no-greedy-answers", str(self._path), what, remedy))
        raise_shown(list(self._lacking(requests)))
        for request in requests:
            sink.keep(request, Answer(self._generations(request.prompt)[request.key.sample], "stop"))

    def _lacking(self, requests: Sequence[SampleRequest]) -> Iterable[Problem]:
        wanted: dict[str, int] = {}
        for request in requests:
            wanted[request.prompt] = max(wanted.get(request.prompt, 0), request.key.sample + 1)
        for prompt, count in wanted.items():
            known = self._counts[prompt]
            what, remedy = f"has {known} of {count} generations for the prompt", "add them, or ask for fewer samples"
            if not known:
                what, remedy = "has no line for the prompt", "write the questions as the data has them, to the letter"
            if known < count:
                yield Problem("generations-missing", str(self._path), f"{what} {shorten(prompt)}", remedy)

    def _read(self) -> None:
        """Read which prompts the file has, where, and with how many generations."""
        problems: list[Problem] = []
        with open_data(self._path) as file:
            for line in lines_of(file):
                self._digest.update(line.data)
                if line.data.strip() and len(problems) < PROBLEMS_SHOWN:
                    try:
                        prompt, generations = _line(parse_json(line.data))
                    except (ValueError, KeyError, TypeError):
                        what = "is not a prompt with its generations"
                        remedy = 'write {"prompt": "…", "generations": ["…", …]}'
                        problems.append(Problem("not-generations", f"{self._path}:{line.number}", what, remedy))
                    else:
                        self._lines.setdefault(prompt, []).append(line.start)
                        self._counts[prompt] += len(generations)
        raise_all(problems, DataError)

    def _read_generations(self, prompt: str) -> Sequence[str]:
        found: list[str] = []
        with open_data(self._path) as file:
            for start in self._lines[prompt]:
                file.seek(start)
                try:
                    same, generations = _line(parse_json(file.readline(MAX_LINE_BYTES)))
                except (ValueError, KeyError, TypeError):
                    same, generations = "", []
                found += generations if same == prompt else []
        if len(found) != self._counts[prompt]:
            raise DataError(Problem("data-changed", str(self._path), "was changed while it was in use", "run again"))
        return found


def _line(value: Any) -> tuple[str, list[str]]:
    """Raises KeyError and TypeError."""
    prompt, generations = value["prompt"], value["generations"]
    if not isinstance(prompt, str) or not isinstance(generations, list):
        raise TypeError("a value has another type")
    if not all(isinstance(text, str) for text in generations):
        raise TypeError("a generation is not text")
    return prompt, generations


def is_generations(at: object) -> bool:
    """Whether the place of a model is a file of generations."""
    return isinstance(at, Path) and at.suffix == SUFFIX and not at.is_dir()


def noveltybench_folder(folder: Path, label: str) -> Path:
    """Where the generations of a model are in an evaluation's folder, and what NoveltyBench's scripts make of them."""
    name = quote(label, safe=" +=,") if label.strip(".") else label.replace(".", "%2E")
    return folder / "noveltybench" / name


def write_generations(folder: Path, model: str, responses: Iterable[ModelResponses[Any]]) -> None:
    """Write `generations.jsonl` of one model to a new or existing folder, atomically. Raises OutputError.

    Missing answers are empty.
    """
    path = folder / "generations.jsonl"
    lines = (
        {
            "id": each.question.id,
            "prompt": each.question.text,
            "model": model,
            "generations": [text or "" for text in each.texts],
        }
        for each in responses
    )
    with translate_os_errors(path):
        create_folder(folder, durable=False)
        replace_file(path, (to_json(line).encode("utf-8", "replace") + b"\n" for line in lines))
