"""A session of an evaluation: choose questions, request the missing samples, score them."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from slrmerge.errors import NoSpaceError, OutputError
from slrmerge.evaluation.embeddings import Embedder
from slrmerge.evaluation.generations import GenerationsFile, noveltybench_folder
from slrmerge.evaluation.metrics import LEXICAL, lexical_metrics
from slrmerge.evaluation.models import ChatModel
from slrmerge.evaluation.novelty import Novelty
from slrmerge.evaluation.options import EvaluationOptions
from slrmerge.evaluation.questions import Question
from slrmerge.evaluation.requesting import Judge, request_missing, settings_of
from slrmerge.evaluation.result import EvaluationResult, summarise, values_of
from slrmerge.evaluation.samples import REFUSED, SampleFile, SampleKey, Settings, sample_keys
from slrmerge.evaluation.tasks.base import ChosenQuestions, Helpers, ModelResponses, Task
from slrmerge.evaluation.texts import VERBALIZED_TOKENS, StoredTexts, texts_of, verbalize
from slrmerge.io.progress import Progress

FEW_PROMPTS = 10
"""Bootstrap intervals over fewer prompts are too narrow."""


@dataclass(frozen=True)
class OpenModels:
    """The models of an evaluation: those evaluated, by label, and those that score."""

    by_label: Mapping[str, ChatModel]
    judge: ChatModel | None
    embedder: Embedder | None


@dataclass(frozen=True)
class SampleFiles:
    """The sample files in the folder of an evaluation."""

    samples: SampleFile
    greedy: SampleFile
    judge: SampleFile


@contextmanager
def sample_files(folder: Path) -> Iterator[SampleFiles]:
    """The sample files; an error gets a note of how many samples are kept, where running again continues."""
    with ExitStack() as stack:
        names = ("samples.jsonl", "greedy.jsonl", "judge.jsonl")
        opened = [stack.enter_context(SampleFile(folder / name)) for name in names]
        try:
            yield SampleFiles(*opened)
        except BaseException as error:
            is_refusal = isinstance(error, OutputError) and not isinstance(error, NoSpaceError)
            if (kept := sum(map(len, opened))) and not is_refusal:
                error.add_note(f"{kept:,} samples are kept in {folder}; run again to continue")
            raise


@dataclass(frozen=True)
class Session:
    """An evaluation with its models and sample files open."""

    task: Task[Any]
    options: EvaluationOptions
    samples: int
    models: OpenModels
    files: SampleFiles
    progress: Progress

    def choose(self, questions: Sequence[Question]) -> ChosenQuestions[Question]:
        """The questions to ask, in the order of the data.

        They depend on the seed; with a larger number of them, the earlier ones are among them.
        """
        shuffled = list(questions)
        random.Random(self.options.seed).shuffle(shuffled)
        label, model = next(iter(self.models.by_label.items()))

        def greedy(asked: Sequence[Question]) -> list[str]:
            file = self.files.greedy
            prompts = {question.id: question.text for question in asked}
            settings = self._settings(model, greedy=True)
            request_missing(model, label, prompts, file, settings, samples=1, progress=self.progress)
            return [answer.text for answer in file.answers(SampleKey(label, question.id, 0) for question in asked)]

        chosen = self.task.choose(shuffled, self.options.questions, greedy)
        ids = {question.id for question in chosen.questions}
        return ChosenQuestions([question for question in questions if question.id in ids], chosen.note)

    def request_samples(self, questions: Sequence[Question]) -> None:
        """Request the missing samples of all models, after checking every model that will be needed."""
        file, count, k = self.files.samples, self._requests_per_prompt, self.options.verbalized
        prompts = {each.id: verbalize(each.text, k) if k else each.text for each in questions}
        keys = {label: sample_keys(label, prompts, count) for label in self.models.by_label}
        for label, model in self.models.by_label.items():
            file.require_same(keys[label], self._settings(model))
        needed = [model for label, model in self.models.by_label.items() if file.missing(keys[label])]
        for helper in (*needed, self.models.judge, self.models.embedder) if needed else ():
            if helper:
                helper.check()
        for label, model in self.models.by_label.items():
            with closing(model):
                settings = self._settings(model)
                request_missing(model, label, prompts, file, settings, samples=count, progress=self.progress)

    def score(self, chosen: ChosenQuestions[Question], data_name: str) -> EvaluationResult:
        """The result, computed from the samples."""
        task, models = self.task, self.models
        responses = [
            ModelResponses(label, question, self._texts(label, question.id))
            for question in chosen.questions
            for label in models.by_label
        ]
        notes = list(self._notes(chosen, responses))
        judge = Judge(models.judge, self.files.judge, self.progress) if models.judge else None
        with closing(models.judge) if models.judge else nullcontext():
            scored = task.score(responses, Helpers(self.samples, judge, models.embedder))
        folder = self.files.samples.path.parent
        novelty = {label: Novelty.read(noveltybench_folder(folder, label)) for label in models.by_label}
        more = tuple(dict.fromkeys(chain.from_iterable(found.metrics for found in novelty.values())))
        metrics = (*task.metrics(self.samples), *more, *LEXICAL)
        scores = [
            replace(
                score,
                metrics={**score.metrics, **novelty[each.model].values(each, more), **lexical_metrics(each.texts)},
            )
            for each, score in zip(responses, scored.scores, strict=True)
        ]
        return EvaluationResult(
            task=task.name,
            metrics=metrics,
            models={label: model.model_id for label, model in models.by_label.items()},
            prompts=len(chosen.questions),
            settings=self._described(data_name),
            cells=summarise(values_of(responses, scores, metrics)),
            notes=(*notes, *scored.notes),
            plot=task.plot,
            responses=responses,
            scores=scores,
        )

    @property
    def _requests_per_prompt(self) -> int:
        return self.samples // (self.options.verbalized or 1)

    @property
    def _max_tokens(self) -> int:
        minimum = VERBALIZED_TOKENS if self.options.verbalized else 0
        return self.options.max_tokens or max(self.task.max_tokens, minimum)

    def _settings(self, model: ChatModel, *, greedy: bool = False) -> Settings:
        options = self.options
        return settings_of(
            model,
            temperature=0.0 if greedy else options.temperature,
            min_p=options.min_p,
            max_tokens=self._max_tokens,
            seed=options.seed,
            verbalized=None if greedy else options.verbalized,
        )

    def _described(self, data_name: str) -> dict[str, object]:
        """The settings that a result reports."""
        options = self.options
        dtypes = sorted({model.dtype for model in self.models.by_label.values() if model.dtype})
        return {
            "data": data_name,
            "samples": self.samples,
            "temperature": options.temperature,
            "min_p": options.min_p,
            "max_tokens": self._max_tokens,
            "seed": options.seed,
            "verbalized": options.verbalized,
            "dtype": ", ".join(dtypes) or None,
            "judge": self.models.judge and self.models.judge.model_id,
            "embeddings": self.models.embedder and self.models.embedder.model_id,
        }

    def _texts(self, label: str, prompt: str) -> StoredTexts:
        requests, verbalized = self._requests_per_prompt, self.options.verbalized
        return StoredTexts(self.files.samples, label, prompt, requests=requests, verbalized=verbalized)

    def _notes(self, chosen: ChosenQuestions[Question], responses: Sequence[ModelResponses[Question]]) -> Iterator[str]:
        """Notes on the questions and the samples."""
        if chosen.note:
            yield chosen.note
        yield from self._sample_notes(responses)
        if read := [label for label, model in self.models.by_label.items() if isinstance(model, GenerationsFile)]:
            settings = "temperature, min_p and max_tokens"
            yield f"{', '.join(read)}: answers from a file, to which {settings} do not apply"
        if 1 < len(chosen.questions) < FEW_PROMPTS:
            yield f"confidence intervals over only {len(chosen.questions)} prompts are too narrow"

    def _sample_notes(self, responses: Sequence[ModelResponses[Question]]) -> Iterator[str]:
        """Notes on samples that are refused, truncated, malformed or empty."""
        verbalized = self.options.verbalized
        prompts = list(dict.fromkeys(each.question.id for each in responses))
        for label in self.models.by_label:
            keys = sample_keys(label, prompts, self._requests_per_prompt)
            reasons: Counter[str] = Counter()
            texts: Counter[str] = Counter()
            refusal = ""
            for answer in self.files.samples.answers(keys):
                reasons[answer.finish_reason] += 1
                refusal = refusal or answer.error
                for text in texts_of(answer, verbalized):
                    texts["missing" if text is None else "full" if text.strip() else "empty"] += 1
            refused = reasons[REFUSED]
            malformed = texts["missing"] - refused * (verbalized or 1)
            counts = {
                f"of {len(keys):,} requests were refused, and count as no answer ({refusal})": refused,
                f"of {len(keys):,} answers were truncated at {self._max_tokens} tokens": reasons["length"],
                f"of {texts.total():,} verbalized samples were missing or malformed": malformed,
                f"of {texts.total():,} samples are empty": texts["empty"],
            }
            for what, count in counts.items():
                if count:
                    yield f"{label}: {count:,} {what}"
