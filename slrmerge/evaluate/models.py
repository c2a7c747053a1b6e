"""Which models are asked, and asking one for what is not yet in a file of samples."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from slrmerge.errors import Problem, ServerError
from slrmerge.evaluate.samples import Answer, Key, SampleFile, Settings, seed_of
from slrmerge.progress import Progress
from slrmerge.repository import Source, parse_source


@dataclass(frozen=True, slots=True)
class Served:
    """A model behind an OpenAI-compatible server; without a name the only one it has."""

    model: str | None
    url: str

    def __str__(self) -> str:
        return f"{self.model}@{self.url}" if self.model else self.url


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model and the label that tables give it."""

    label: str
    at: Source | Served


class Ask(NamedTuple):
    """A sample to be made: its key, the prompt as text, its own seed."""

    key: Key
    prompt: str
    seed: int


class Model(Protocol):
    """What can be asked. Weights are loaded at the first question."""

    @property
    def asked_of(self) -> str:
        """What is asked, exactly: samples of something else are not taken for its own."""
        ...

    def check(self) -> None:
        """Raise ServerError or UnsupportedModelError where it is plain that it cannot be asked now."""
        ...

    def answer(self, asks: Sequence[Ask], settings: Settings, keep: Callable[[Ask, Answer], None]) -> None:
        """Answer all `asks`, each handed to `keep` as soon as it is there, in any order."""
        ...

    def close(self) -> None:
        """Free what answering took; it may be asked again."""
        ...


_LABELLED = re.compile(r"(?P<label>\w[\w.+-]*)=(?P<rest>.+)", re.DOTALL)
_SERVED = re.compile(r"(?:(?P<model>.+?)@)?(?P<url>https?://[^\s@]+)")


def parse_place(written: str) -> Source | Served:
    """Where a model is: a folder, a repository on the Hub, or MODEL@URL, or only the URL of a server with one model.

    Raises ServerError for a URL that is none.
    """
    match = _SERVED.fullmatch(written)
    if match is None:
        return parse_source(written)
    try:
        address = urlsplit(match["url"])
        sound = bool(address.hostname) and address.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise ServerError(Problem(match["url"], "is no address", "write it as http://localhost:8000/v1"))
    return Served(match["model"], match["url"])


def parse_model(written: str) -> NamedModel:
    """`LABEL=MODEL`; a label that is not given is the last part of where the model is."""
    match = _LABELLED.fullmatch(written)
    at = parse_place(match["rest"] if match else written)
    if match:
        return NamedModel(match["label"], at)
    if isinstance(at, Path):
        return NamedModel(at.resolve().name, at)
    name = (at.model or at.url.partition("://")[2]) if isinstance(at, Served) else at.name
    return NamedModel(name.rstrip("/").rpartition("/")[2] or name, at)


def keys_of(label: str, prompts: Iterable[str], samples: int) -> list[Key]:
    """The samples that a model is to give, prompt by prompt."""
    return [Key(label, prompt, sample) for prompt in prompts for sample in range(samples)]


def ask_missing(
    model: Model,
    label: str,
    prompts: Mapping[str, str],
    file: SampleFile,
    settings: Settings,
    *,
    samples: int,
    progress: Progress,
) -> None:
    """Ask `model` until `file` holds that many `samples` of every one of the `prompts` (text by id).

    Raises OutputError where the file holds some that were made by other settings, ServerError and
    UnsupportedModelError; what was answered until then is kept.
    """
    keys = keys_of(label, prompts, samples)
    file.require_same(keys, settings)
    missing = file.missing(keys)
    if not missing:
        return
    asks = [Ask(key, prompts[key.prompt], seed_of(settings.seed, key.prompt, key.sample)) for key in missing]
    if len(missing) < len(keys):
        progress.say(f"{label}: {len(keys) - len(missing):,} of {len(keys):,} samples are there already")
    progress.start(label, len(missing), " samples")

    def keep(ask: Ask, answer: Answer) -> None:
        file.append(ask.key, answer, settings)
        progress.advance(1)

    model.answer(asks, settings, keep)
