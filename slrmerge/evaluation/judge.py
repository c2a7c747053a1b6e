"""A model that grades other models' samples. Its replies are kept, so that it never judges the same text twice."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from slrmerge.evaluation.models import ChatModel
from slrmerge.evaluation.requesting import request_missing, settings_of
from slrmerge.evaluation.samples import SampleFile, SampleKey
from slrmerge.io.progress import Progress

V = TypeVar("V")

MAX_TOKENS = 8192
"""Includes the tokens of a judge that reasons before it replies."""


class Judge:
    """A model with greedy decoding, whose replies are kept in a sample file under the model's id."""

    def __init__(self, model: ChatModel, file: SampleFile, progress: Progress) -> None:
        self._model, self._file, self._progress = model, file, progress
        self._settings = settings_of(model, temperature=0.0, min_p=0.0, max_tokens=MAX_TOKENS)

    @property
    def model_id(self) -> str:
        return self._model.model_id

    def grades(self, prompts: Mapping[str, str], read: Callable[[str, str], V]) -> dict[str, V]:
        """What `read` makes of the id of each prompt and the reply to it, by id; `prompts` are texts by id."""
        label = self.model_id
        request_missing(self._model, label, prompts, self._file, self._settings, samples=1, progress=self._progress)
        answers = self._file.answers(SampleKey(label, prompt, 0) for prompt in prompts)
        return {prompt: read(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True)}
