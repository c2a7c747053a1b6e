"""The models of an evaluation: how they are named, and what they can do."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import parse_qsl, urlsplit

from slrmerge.checkpoint.location import Place, parse_place
from slrmerge.errors import OptionError, Problem, SlrmergeError, require_type, without_credentials
from slrmerge.evaluation.samples import Answer, SampleKey, Settings
from slrmerge.io.text import printable


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A model behind an OpenAI-compatible server; `model` may be None where the server has only one.

    `url` may have a user, a password and a query, which `str` and `repr` hide.
    """

    model: str | None
    url: str = field(repr=False)

    @property
    def place(self) -> str:
        """Host, port and path."""
        parts = urlsplit(self.url)
        return parts.netloc.rpartition("@")[2] + parts.path

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.url).query, keep_blank_values=True))

    @property
    def secrets(self) -> set[str]:
        """What the messages of a server must not repeat."""
        parts = urlsplit(self.url)
        return {value for value in (parts.password, *self.query.values()) if value}

    def __str__(self) -> str:
        url = without_credentials(self.url)
        return f"{self.model}@{url}" if self.model else url


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model and its label in tables."""

    label: str
    at: Place | ServerAddress


ModelNames = Mapping[str, str | os.PathLike[str]] | Sequence[str | os.PathLike[str] | NamedModel]
"""Models by label, or a sequence of folders, repositories and addresses, each with or without `LABEL=` before it."""


class SampleRequest(NamedTuple):
    """A sample to generate: its key, the prompt's text, and its own seed."""

    key: SampleKey
    prompt: str
    seed: int


class AnswerSink(Protocol):
    """Takes the answers of a ChatModel."""

    def keep(self, request: SampleRequest, answer: Answer) -> None: ...

    def refuse(self, request: SampleRequest, error: SlrmergeError) -> None:
        """The model refuses the prompt for good. Raises the error where it should end the evaluation."""
        ...


class ChatModel:
    """A model that answers prompts."""

    @property
    def model_id(self) -> str:
        """Identifies the model exactly: samples are only reused for the same id."""
        raise NotImplementedError

    @property
    def dtype(self) -> str | None:
        """The dtype of the arithmetic of a model in this process."""
        return None

    def check(self) -> None:
        """Raise ServerError or UnsupportedModelError if the model cannot answer, as far as is cheap to find out."""

    def load(self) -> None:
        """Load the weights, unless they are there; also done by the first request."""

    def answer(self, requests: Sequence[SampleRequest], settings: Settings, sink: AnswerSink) -> None:
        """Answer all `requests`, in any order; calls `sink` with each answer, or refusal, when it is there."""
        raise NotImplementedError

    def close(self) -> None:
        """Free memory; the model can be used again afterwards."""


MOST_REFUSED = 20
"""So many refused prompts, and none accepted, are an error: the model, or a setting, is the wrong one."""

_LABELLED = re.compile(r"(?P<label>\w[\w.+-]*)=(?P<rest>.*)", re.DOTALL)
_NO_SCHEME = re.compile(r"([^:]+@)?[\w.-]+:\d+(/.*)?", re.ASCII)
_SERVED = re.compile(r"(?:(?P<model>.+?)@)?(?P<url>https?://\S+)")


def parse_location(text: str | os.PathLike[str]) -> Place | ServerAddress:
    """The location of a model: a folder, a repository on the Hub, MODEL@URL, or the URL of a server with one model.

    A PathLike is a folder. Raises OptionError for an invalid URL, an empty text, and what is neither text nor path.
    """
    require_type("model", text, (str, os.PathLike), "pass a folder, a repository's name, or MODEL@URL")
    if not isinstance(text, str):
        return Path(text)
    match = _SERVED.fullmatch(text)
    if match is None:
        place = parse_place(text)
        if isinstance(place, Path) and _NO_SCHEME.fullmatch(text) and not os.path.lexists(place):
            what, remedy = "is a server's address without http:// or https://", "write it like http://localhost:8000/v1"
            raise OptionError(Problem("invalid-url", text, what, remedy))
        return place
    try:
        address = urlsplit(match["url"])
        is_valid = bool(address.hostname) and address.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise OptionError(
            Problem("invalid-url", match["url"], "is not a valid URL", "write it like http://localhost:8000/v1")
        )
    return ServerAddress(match["model"], match["url"])


def parse_model(text: str | os.PathLike[str]) -> NamedModel:
    """`LABEL=MODEL`, or a model whose label is the last part of its location. Raises OptionError."""
    match = _LABELLED.fullmatch(text) if isinstance(text, str) else None
    at = parse_location(match["rest"] if match else text)
    if match:
        return NamedModel(match["label"], at)
    if isinstance(at, Path):
        return NamedModel(at.resolve().name, at)
    name = (at.model or at.place) if isinstance(at, ServerAddress) else at.name
    return NamedModel(name.rstrip("/").rpartition("/")[2] or name, at)


def parse_models(models: ModelNames) -> list[NamedModel]:
    """The models with their labels. Raises OptionError where there is none, or two have the same label."""
    if isinstance(models, Mapping):
        named = [NamedModel(label, parse_location(location)) for label, location in models.items()]
    else:
        require_type("models", models, (str, os.PathLike, Iterable), "pass models, or a dict of them by label")
        listed = [models] if isinstance(models, str | os.PathLike) else models
        named = [model if isinstance(model, NamedModel) else parse_model(model) for model in listed]
    named = [replace(model, label=printable(model.label)) for model in named]
    labels = [model.label for model in named]
    if not labels:
        raise OptionError(Problem("empty", "models", "there is no model to evaluate", "give at least one"))
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        what = f"two models have the label {repeated[0]}"
        raise OptionError(Problem("duplicate-label", "models", what, "write LABEL=MODEL"))
    return named
