"""Running an evaluation: open the data and the models, request missing samples, score them, write the results."""

import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from slrmerge.checkpoint.location import Place
from slrmerge.errors import (
    NoSpaceError,
    OptionError,
    OutputError,
    Problem,
    SlrmergeError,
    did_you_mean,
    open_all,
    require_extra,
    require_type,
)
from slrmerge.evaluation.embedding_file import KeptEmbeddings
from slrmerge.evaluation.embeddings import Embedder, LocalEmbeddings
from slrmerge.evaluation.every_eval_ever import write_every_eval_ever
from slrmerge.evaluation.generations import SUFFIX, GenerationsFile, noveltybench_folder
from slrmerge.evaluation.inspect_log import write_inspect
from slrmerge.evaluation.judge import Judge
from slrmerge.evaluation.lexical import LEXICAL, lexical_metrics
from slrmerge.evaluation.models import (
    ChatModel,
    ModelNames,
    ServerAddress,
    parse_location,
    parse_models,
)
from slrmerge.evaluation.novelty import Novelty
from slrmerge.evaluation.options import EvaluationOptions
from slrmerge.evaluation.output import claim, require_no_links, write_noveltybench, write_results
from slrmerge.evaluation.questions import Question, parse_questions, read_data
from slrmerge.evaluation.requesting import request_missing, settings_of
from slrmerge.evaluation.result import EvaluationResult, summarise, values_of
from slrmerge.evaluation.samples import REFUSED, SampleFile, SampleKey, Settings, sample_keys
from slrmerge.evaluation.server import ServerModel
from slrmerge.evaluation.tasks import TASKS
from slrmerge.evaluation.tasks.base import ChosenQuestions, Helpers, ModelResponses, Task
from slrmerge.evaluation.texts import StoredTexts, texts_of
from slrmerge.evaluation.verbalized import VERBALIZED_TOKENS, verbalize
from slrmerge.io.options import make_options, takes_options
from slrmerge.io.output_folder import OutputFolder
from slrmerge.io.progress import Progress

FEW_PROMPTS = 10
"""Bootstrap intervals over fewer prompts are too narrow."""


@takes_options(EvaluationOptions)
def evaluate(
    task: str,
    data: str | os.PathLike[str],
    models: ModelNames,
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    **options: Any,
) -> EvaluationResult:
    """Run a task on several models, and write samples, tables, chart and page to the folder `out`.

    `task` is open-qa, creative or reasoning. `data` is a file of questions or a dataset on the Hub. `models` maps
    labels to models (a folder, a repository on the Hub, MODEL@URL of an OpenAI-compatible server, or a .jsonl file of
    generations), or lists them, with or without `LABEL=`; the others are compared with the first. The options are those
    of `EvaluationOptions`.

    An interrupted evaluation continues when called again, and requests no sample twice. Raises OptionError before
    anything is opened; DataError, OutputError, CheckpointError, HubError, UnsupportedModelError, ServerError.
    """
    return Evaluation(task, data, models, make_options(EvaluationOptions, options), progress=progress).run(out)


class Evaluation:
    """An evaluation with valid options. Opens no model and no data before `run`. Raises OptionError."""

    def __init__(
        self,
        task: str,
        data: str | os.PathLike[str],
        models: ModelNames,
        options: EvaluationOptions | None = None,
        *,
        progress: Progress | None = None,
    ) -> None:
        require_extra("eval", "openai", "scipy", "matplotlib", "jinja2")
        require_type("task", task, str, did_you_mean("", TASKS))
        if task not in TASKS:
            raise OptionError(Problem("invalid-choice", "task", f"{task!r} is not a task", did_you_mean(task, TASKS)))
        self.options = options = options or EvaluationOptions()
        self.task: Task[Any] = TASKS[task](options)
        self.data, self.models = data, parse_models(models)
        self.samples = options.samples or self.task.samples
        self._judge = parse_location(options.judge) if options.judge else None
        self._embeddings = parse_location(options.embeddings) if options.embeddings else None
        self.progress = progress or Progress()
        self._check_options()

    def __repr__(self) -> str:
        return f"<Evaluation {self.task.name} of {', '.join(model.label for model in self.models)}>"

    def run(self, out: str | os.PathLike[str]) -> EvaluationResult:
        """See `evaluate`."""
        folder = OutputFolder(out, overwrite=True, durable=False)
        folder.check()
        data = read_data(self.data, subset=self.options.subset, split=self.options.split)
        questions = parse_questions(self.task.question, data.rows)
        opened = self._open_models()
        with folder.locked(self.progress):
            claim(folder.path, self.task.name)
            if self.options.export:
                require_no_links(folder.path / self.options.export)
            if opened.embedder:
                opened = replace(opened, embedder=KeptEmbeddings(opened.embedder, folder.path))
            with _sample_files(folder.path) as files:
                run = _Run(self, opened, files)
                chosen = run.choose(questions)
                run.request_samples(chosen.questions)
                result = run.score(chosen, data.name)
                write_results(folder.path, result)
                sampled_s = files.samples.path.stat().st_mtime
                if self.options.export == "noveltybench":
                    write_noveltybench(folder.path, result)
                elif self.options.export == "inspect":
                    write_inspect(folder.path, result, sampled_s=sampled_s)
                elif self.options.export == "every-eval-ever":
                    write_every_eval_ever(folder.path, result, opened.by_label, sampled_s=sampled_s)
        return result

    @property
    def requests_per_prompt(self) -> int:
        return self.samples // (self.options.verbalized or 1)

    @property
    def max_tokens(self) -> int:
        minimum = VERBALIZED_TOKENS if self.options.verbalized else 0
        return self.options.max_tokens or max(self.task.max_tokens, minimum)

    def _check_options(self) -> None:
        """Raise OptionError for options that do not fit together, or this machine, and MissingExtraError."""
        if self.options.export == "inspect":
            require_extra("inspect", "inspect_ai")
        verbalized = self.options.verbalized
        if verbalized and self.samples % verbalized:
            what = f"{self.samples} is not a multiple of verbalized, which is {verbalized}"
            raise OptionError(Problem("not-a-multiple", "samples", what, "change one of them"))
        if self._judge is not None and _is_generations(self._judge):
            what, remedy = "is a file of generations, which cannot judge others", "name a model"
            raise OptionError(Problem("not-a-judge", "judge", what, remedy))
        scoring = [at for at in (self._judge, self._embeddings) if at is not None]
        places = [*(model.at for model in self.models), *scoring]
        if not all(isinstance(at, ServerAddress) or _is_generations(at) for at in places):
            from slrmerge.searching.device import require_device

            require_device(self.options.device)

    def _open_models(self) -> "_Models":
        """Open all models. Raises the errors of all models and the judge together."""
        places = [*(model.at for model in self.models), *([self._judge] if self._judge else [])]
        opened = open_all(self._open_model, places, SlrmergeError)
        embedder = self._open_embedder(self._embeddings) if self._embeddings else None
        by_label = dict(zip((model.label for model in self.models), opened, strict=False))
        return _Models(by_label, opened[-1] if self._judge else None, embedder)

    def _open_model(self, at: Place | ServerAddress) -> ChatModel:
        if isinstance(at, ServerAddress):
            return self._server(at)
        if isinstance(at, Path) and _is_generations(at):
            return GenerationsFile(at)
        require_extra("eval", "transformers")
        from slrmerge.evaluation.local import LocalModel

        options = self.options
        batch = options.batch if isinstance(options.batch, int) else None
        return LocalModel(at, device=options.device, batch=batch, dtype=options.dtype, progress=self.progress)

    def _open_embedder(self, at: Place | ServerAddress) -> Embedder:
        return self._server(at) if isinstance(at, ServerAddress) else LocalEmbeddings(at, device=self.options.device)

    def _server(self, at: ServerAddress) -> ServerModel:
        options = self.options
        return ServerModel(at, concurrency=options.concurrency, timeout_s=options.timeout_s, progress=self.progress)


@dataclass(frozen=True)
class _Models:
    """The models of an evaluation: those evaluated, by label, and those that score."""

    by_label: Mapping[str, ChatModel]
    judge: ChatModel | None
    embedder: Embedder | None


@dataclass(frozen=True)
class _Files:
    """The sample files in the folder of an evaluation."""

    samples: SampleFile
    greedy: SampleFile
    judge: SampleFile


@dataclass(frozen=True)
class _Run:
    """A run of an evaluation, with everything open."""

    evaluation: Evaluation
    models: _Models
    files: _Files

    def choose(self, questions: Sequence[Question]) -> ChosenQuestions[Question]:
        """The questions to ask, in the order of the data.

        They depend on the seed; with a larger number of them, the earlier ones are among them.
        """
        options, task = self.evaluation.options, self.evaluation.task
        shuffled = list(questions)
        random.Random(options.seed).shuffle(shuffled)
        label, model = next(iter(self.models.by_label.items()))

        def greedy(asked: Sequence[Question]) -> list[str]:
            file = self.files.greedy
            prompts = {question.id: question.text for question in asked}
            settings = self._settings(model, greedy=True)
            request_missing(model, label, prompts, file, settings, samples=1, progress=self.evaluation.progress)
            return [answer.text for answer in file.answers(SampleKey(label, question.id, 0) for question in asked)]

        chosen = task.choose(shuffled, options.questions, greedy)
        ids = {question.id for question in chosen.questions}
        return ChosenQuestions([question for question in questions if question.id in ids], chosen.note)

    def request_samples(self, questions: Sequence[Question]) -> None:
        """Request the missing samples of all models, after checking every model that will be needed."""
        file, count, k = self.files.samples, self.evaluation.requests_per_prompt, self.evaluation.options.verbalized
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
                request_missing(model, label, prompts, file, settings, samples=count, progress=self.evaluation.progress)

    def score(self, chosen: ChosenQuestions[Question], data_name: str) -> EvaluationResult:
        """The result, computed from the samples."""
        evaluation, models = self.evaluation, self.models
        responses = [
            ModelResponses(label, question, self._texts(label, question.id))
            for question in chosen.questions
            for label in models.by_label
        ]
        notes = [*([chosen.note] if chosen.note else []), *self._sample_notes(responses)]
        if read := [label for label, model in models.by_label.items() if isinstance(model, GenerationsFile)]:
            settings = "temperature, min_p and max_tokens"
            notes.append(f"{', '.join(read)}: answers from a file, to which {settings} do not apply")
        if len(chosen.questions) < FEW_PROMPTS:
            notes.append(f"confidence intervals over only {len(chosen.questions)} prompts are too narrow")
        judge = Judge(models.judge, self.files.judge, evaluation.progress) if models.judge else None
        with closing(models.judge) if models.judge else nullcontext():
            scored = evaluation.task.score(responses, Helpers(evaluation.samples, judge, models.embedder))
        folder = self.files.samples.path.parent
        novelty = {label: Novelty.read(noveltybench_folder(folder, label)) for label in models.by_label}
        more = tuple(dict.fromkeys(chain.from_iterable(found.metrics for found in novelty.values())))
        metrics = (*evaluation.task.metrics(evaluation.samples), *more, *LEXICAL)
        scores = [
            replace(
                score,
                metrics={**score.metrics, **novelty[each.model].values(each, more), **lexical_metrics(each.texts)},
            )
            for each, score in zip(responses, scored.scores, strict=True)
        ]
        return EvaluationResult(
            task=evaluation.task.name,
            metrics=metrics,
            models={label: model.model_id for label, model in models.by_label.items()},
            prompts=len(chosen.questions),
            settings=self._described(data_name),
            cells=summarise(values_of(responses, scores, metrics)),
            notes=(*notes, *scored.notes),
            plot=evaluation.task.plot,
            responses=responses,
            scores=scores,
        )

    def _settings(self, model: ChatModel, *, greedy: bool = False) -> Settings:
        options = self.evaluation.options
        return settings_of(
            model,
            temperature=0.0 if greedy else options.temperature,
            min_p=options.min_p,
            max_tokens=self.evaluation.max_tokens,
            seed=options.seed,
            verbalized=None if greedy else options.verbalized,
        )

    def _described(self, data_name: str) -> dict[str, object]:
        """The settings that a result reports."""
        options = self.evaluation.options
        dtypes = sorted({model.dtype for model in self.models.by_label.values() if model.dtype})
        return {
            "data": data_name,
            "samples": self.evaluation.samples,
            "temperature": options.temperature,
            "min_p": options.min_p,
            "max_tokens": self.evaluation.max_tokens,
            "seed": options.seed,
            "verbalized": options.verbalized,
            "dtype": ", ".join(dtypes) or None,
            "judge": self.models.judge and self.models.judge.model_id,
            "embeddings": self.models.embedder and self.models.embedder.model_id,
        }

    def _texts(self, label: str, prompt: str) -> StoredTexts:
        evaluation = self.evaluation
        requests, verbalized = evaluation.requests_per_prompt, evaluation.options.verbalized
        return StoredTexts(self.files.samples, label, prompt, requests=requests, verbalized=verbalized)

    def _sample_notes(self, responses: Sequence[ModelResponses[Question]]) -> Iterator[str]:
        """Notes on samples that are refused, truncated, malformed or empty."""
        evaluation, k = self.evaluation, self.evaluation.options.verbalized or 1
        prompts = list(dict.fromkeys(each.question.id for each in responses))
        for label in self.models.by_label:
            keys = sample_keys(label, prompts, evaluation.requests_per_prompt)
            reasons: Counter[str] = Counter()
            texts: Counter[str] = Counter()
            refusal = ""
            for answer in self.files.samples.answers(keys):
                reasons[answer.finish_reason] += 1
                refusal = refusal or answer.error
                for text in texts_of(answer, evaluation.options.verbalized):
                    texts["missing" if text is None else "full" if text.strip() else "empty"] += 1
            refused = reasons[REFUSED]
            counts = {
                f"of {len(keys):,} requests were refused, and count as no answer ({refusal})": refused,
                f"of {len(keys):,} answers were truncated at {evaluation.max_tokens} tokens": reasons["length"],
                f"of {texts.total():,} verbalized samples were missing or malformed": texts["missing"] - k * refused,
                f"of {texts.total():,} samples are empty": texts["empty"],
            }
            for what, count in counts.items():
                if count:
                    yield f"{label}: {count:,} {what}"


def _is_generations(at: Place | ServerAddress) -> bool:
    return isinstance(at, Path) and at.suffix == SUFFIX and not at.is_dir()


@contextmanager
def _sample_files(folder: Path) -> Iterator[_Files]:
    """The sample files; an error gets a note of how many samples are kept, where running again continues."""
    with ExitStack() as stack:
        names = ("samples.jsonl", "greedy.jsonl", "judge.jsonl")
        opened = [stack.enter_context(SampleFile(folder / name)) for name in names]
        try:
            yield _Files(*opened)
        except BaseException as error:
            is_refusal = isinstance(error, OutputError) and not isinstance(error, NoSpaceError)
            if (kept := sum(map(len, opened))) and not is_refusal:
                error.add_note(f"{kept:,} samples are kept in {folder}; run again to continue")
            raise
