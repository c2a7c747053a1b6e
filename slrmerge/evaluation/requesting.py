"""Requesting the samples that are missing from a file; a judge, whose replies are samples too."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, overload

from slrmerge.errors import SlrmergeError
from slrmerge.evaluation.models import MOST_REFUSED, ChatModel, SampleRequest
from slrmerge.evaluation.samples import REFUSED, Answer, SampleFile, SampleKey, Settings, sample_keys, seed_of
from slrmerge.io.progress import Progress

V = TypeVar("V")

JUDGE_TOKENS = 8192
"""Includes the tokens of a judge that reasons before it replies."""


def settings_of(
    model: ChatModel, *, temperature: float, min_p: float, max_tokens: int, seed: int = 0, verbalized: int | None = None
) -> Settings:
    """The settings of a model's answers."""
    dtype = None if model.dtype == "float32" else model.dtype
    return Settings(model.model_id, temperature, min_p, max_tokens, seed, verbalized, dtype)


def request_missing(
    model: ChatModel,
    label: str,
    prompts: Mapping[str, str],
    file: SampleFile,
    settings: Settings,
    *,
    samples: int,
    progress: Progress,
) -> None:
    """Request answers until `file` holds `samples` samples of each of `prompts` (text by id).

    A prompt that the model refuses is recorded as such, unless it refuses all of them, or the first MOST_REFUSED.
    Raises OutputError where the file holds samples with other settings, ServerError and UnsupportedModelError; answers
    received before an error are kept.
    """
    keys = sample_keys(label, prompts, samples)
    file.require_same(keys, settings)
    missing = file.missing(keys)
    if not missing:
        return
    if len(missing) < len(keys):
        progress.message(f"{label}: reusing {len(keys) - len(missing):,} of {len(keys):,} samples")
    model.load()
    progress.start(label, len(missing), " samples")

    wanted = set(missing)
    known = file.answers(key for key in keys if key not in wanted)
    is_accepted = any(not answer.is_refusal for answer in known)
    recorder = _Recorder(file, settings, progress, is_accepted=is_accepted)
    model.answer(_Requests(missing, prompts, settings.seed), settings, recorder)
    recorder.finish()


class _Requests(Sequence[SampleRequest]):
    """Requests for samples, each made when it is asked for: their prompts may be too many to hold in memory."""

    def __init__(self, keys: Sequence[SampleKey], prompts: Mapping[str, str], seed: int) -> None:
        self._keys, self._prompts, self._seed = keys, prompts, seed

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, at: int) -> SampleRequest: ...
    @overload
    def __getitem__(self, at: slice) -> list[SampleRequest]: ...
    def __getitem__(self, at: int | slice) -> SampleRequest | list[SampleRequest]:
        return [*map(self._request, self._keys[at])] if isinstance(at, slice) else self._request(self._keys[at])

    def _request(self, key: SampleKey) -> SampleRequest:
        return SampleRequest(key, self._prompts[key.prompt], seed_of(self._seed, key.prompt, key.sample))


class _Recorder:
    """Writes answers to a file. Holds refusals back until the model accepts a prompt: it may refuse all of them."""

    def __init__(self, file: SampleFile, settings: Settings, progress: Progress, *, is_accepted: bool) -> None:
        self._file, self._settings, self._progress, self._is_accepted = file, settings, progress, is_accepted
        self._refusals: dict[SampleRequest, SlrmergeError] = {}

    def keep(self, request: SampleRequest, answer: Answer) -> None:
        """See `AnswerSink`."""
        self._is_accepted = True
        self._write(request, answer)
        self._write_refusals()

    def refuse(self, request: SampleRequest, error: SlrmergeError) -> None:
        """See `AnswerSink`."""
        self._refusals[request] = error
        if self._is_accepted:
            self._write_refusals()
        elif len({refused.prompt for refused in self._refusals}) >= MOST_REFUSED:
            self.finish()

    def finish(self) -> None:
        """Raise the first refusal where no prompt was accepted."""
        for error in self._refusals.values():
            raise error

    def _write_refusals(self) -> None:
        for request, error in self._refusals.items():
            self._write(request, Answer("", REFUSED, "; ".join(problem.what for problem in error.problems)))
        self._refusals.clear()

    def _write(self, request: SampleRequest, answer: Answer) -> None:
        self._file.append(request.key, answer, self._settings)
        self._progress.advance(1)


class Judge:
    """A model that grades texts by greedy decoding; its replies are kept in a sample file under the model's id."""

    def __init__(self, model: ChatModel, file: SampleFile, progress: Progress) -> None:
        self._model, self._file, self._progress = model, file, progress
        self._settings = settings_of(model, temperature=0.0, min_p=0.0, max_tokens=JUDGE_TOKENS)

    @property
    def model_id(self) -> str:
        return self._model.model_id

    def grades(self, prompts: Mapping[str, str], read: Callable[[str, str], V]) -> dict[str, V]:
        """What `read` makes of the id of each prompt and the reply to it, by id; `prompts` are texts by id."""
        label = self.model_id
        request_missing(self._model, label, prompts, self._file, self._settings, samples=1, progress=self._progress)
        answers = self._file.answers(SampleKey(label, prompt, 0) for prompt in prompts)
        return {prompt: read(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True)}
