"""A model that grades other models' samples. Its replies are kept, so that it never judges the same text twice."""

from collections.abc import Iterable

from slrmerge.evaluation.models import ChatModel, request_missing, settings_of
from slrmerge.evaluation.questions import prompt_id
from slrmerge.evaluation.samples import SampleFile, SampleKey
from slrmerge.io.progress import Progress

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

    def replies(self, texts: Iterable[str]) -> dict[str, str]:
        """The reply to each of the prompts `texts`."""
        prompts = {prompt_id(text): text for text in texts}
        label = self.model_id
        request_missing(self._model, label, prompts, self._file, self._settings, samples=1, progress=self._progress)
        answers = self._file.answers(SampleKey(label, prompt, 0) for prompt in prompts)
        return {text: answer.text for text, answer in zip(prompts.values(), answers, strict=True)}
