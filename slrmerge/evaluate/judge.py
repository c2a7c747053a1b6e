"""A model that judges what others said. It is asked about the same thing once: what it replied is kept."""

from collections.abc import Iterable

from slrmerge.evaluate.models import Model, ask_missing
from slrmerge.evaluate.questions import prompt_id
from slrmerge.evaluate.samples import Key, SampleFile, Settings
from slrmerge.progress import Progress

MAX_TOKENS = 8192
"""Room for a judge that thinks before it replies."""


class Judge:
    """A model asked with greedy decoding, its replies kept in a file of samples under its own name."""

    def __init__(self, model: Model, file: SampleFile, progress: Progress) -> None:
        self._model, self._file, self._progress = model, file, progress
        self._settings = Settings(model.asked_of, temperature=0.0, min_p=0.0, max_tokens=MAX_TOKENS)

    @property
    def name(self) -> str:
        return self._model.asked_of

    def replies(self, asked: Iterable[str]) -> dict[str, str]:
        """The reply to each text in `asked`, which are prompts as the judge reads them."""
        prompts = {prompt_id(text): text for text in asked}
        ask_missing(self._model, self.name, prompts, self._file, self._settings, samples=1, progress=self._progress)
        found = {text: self._file.answer(Key(self.name, prompt, 0)) for prompt, text in prompts.items()}
        return {text: answer.text for text, answer in found.items() if answer is not None}
