"""An evaluation from options to a folder: open everything, ask for what is missing, measure, write."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from slrmerge import files
from slrmerge.errors import NoSpaceError, OutputError, Problem, SlrmergeError, open_all, require_extra
from slrmerge.evaluate.embeddings import Embedder, LocalEmbeddings, ServedEmbeddings
from slrmerge.evaluate.judge import Judge
from slrmerge.evaluate.models import Model, NamedModel, Served, ask_missing, keys_of, parse_place
from slrmerge.evaluate.options import VERBALIZED_TOKENS, EvaluationOptions
from slrmerge.evaluate.questions import questions_of, read_data
from slrmerge.evaluate.report import Report, summarise, values_of
from slrmerge.evaluate.results import claim, write_results
from slrmerge.evaluate.samples import Key, SampleFile, Settings
from slrmerge.evaluate.server import ServerModel
from slrmerge.evaluate.tasks import TASKS, Answered, Helpers
from slrmerge.evaluate.verbalized import parse_verbalized, verbalize
from slrmerge.merge import resolve_target
from slrmerge.progress import Progress, Silent
from slrmerge.repository import Source
from slrmerge.writer import os_errors_at

SAMPLES, GREEDY, JUDGED = "samples.jsonl", "greedy.jsonl", "judge.jsonl"

FEW_PROMPTS = 10
"""Percentiles of a bootstrap over fewer prompts cover less than they say."""


class Evaluation:
    """An evaluation that is ready to run: the data is read, and every model is known.

    The first of `models` is the one that the others are held against. Raises DataError for questions that the task
    cannot use, and the errors of all models at once.
    """

    def __init__(
        self, models: Sequence[NamedModel], options: EvaluationOptions, *, progress: Progress | None = None
    ) -> None:
        require_extra("eval", "openai", "scipy", "matplotlib", "jinja2", "tenacity")
        self.options, self.task = options, TASKS[options.task]()
        self._progress = progress or Silent()
        self.samples = options.samples or self.task.samples
        data = read_data(options.data, subset=options.subset, split=options.split)
        self._data_name, self._data = data.name, questions_of(self.task.question, data.rows)
        places = [named.at for named in models] + ([parse_place(options.judge)] if options.judge else [])
        opened = open_all(self._open, places, SlrmergeError)
        self.models = dict(zip((named.label for named in models), opened, strict=False))
        self._judge = opened[-1] if options.judge else None
        self._embedder = self._open_embedder(parse_place(options.embeddings)) if options.embeddings else None

    def run(self, out: Path) -> Report:
        """Ask whatever is not yet in the folder `out`, measure, and write table, picture and page there.

        Ended in any way, the same evaluation goes on where it was. Raises OutputError where `out` holds something else,
        or samples made by other settings; ServerError and UnsupportedModelError.
        """
        target = resolve_target(out)
        if not target.name:
            raise OutputError(Problem(str(target), "is no folder for an evaluation", "name one inside it"))
        with os_errors_at(target):
            files.create_folder(target.parent, fsync=False)
            with files.exclusive(target):
                claim(target, self.task.name)
                with _samples(target) as (kept, greedy, judged):
                    questions, note = self._choose(greedy)
                    self._ask(questions, kept)
                    report = self._measure(questions, kept, judged, note)
                    write_results(target, report)
        return report

    def _open(self, at: Source | Served) -> Model:
        if isinstance(at, Served):
            return self._server(at)
        require_extra("eval", "transformers")
        from slrmerge.evaluate.local import LocalModel

        return LocalModel(at, device=self.options.device, batch=self.options.batch, progress=self._progress)

    def _server(self, at: Served) -> ServerModel:
        return ServerModel(at, concurrency=self.options.concurrency, timeout_s=self.options.timeout_s)

    def _open_embedder(self, at: Source | Served) -> Embedder:
        if isinstance(at, Served):
            return ServedEmbeddings(self._server(at))
        return LocalEmbeddings(at, device=self.options.device)

    def _choose(self, file: SampleFile) -> tuple[list[Any], str]:
        """The questions to ask, in the order of the data, and what to know of them.

        Which ones depends on the seed; more hold those of fewer.
        """
        drawn = list(self._data)
        random.Random(self.options.seed).shuffle(drawn)
        label, model = next(iter(self.models.items()))

        def greedy(questions: Sequence[Any]) -> list[str]:
            self._ask_one(label, model, {question.id: question.text for question in questions}, file, greedy=True)
            answers = [file.answer(Key(label, question.id, 0)) for question in questions]
            return [answer.text for answer in answers if answer is not None]

        chosen, note = self.task.choose(drawn, self.options.questions, greedy)
        ids = {question.id for question in chosen}
        return [question for question in self._data if question.id in ids], note

    def _ask(self, questions: Sequence[Any], file: SampleFile) -> None:
        """Ask every model for what is missing, once all that will be asked are known to be there."""
        k = self.options.verbalized
        prompts = {each.id: verbalize(each.text, k) if k else each.text for each in questions}
        keys = {label: keys_of(label, prompts, self.calls) for label in self.models}
        for label, model in self.models.items():
            file.require_same(keys[label], self._settings(model))
        to_ask = [model for label, model in self.models.items() if file.missing(keys[label])]
        for needed in (*to_ask, self._judge, self._embedder) if to_ask else ():
            if needed:
                needed.check()
        for label, model in self.models.items():
            with closing(model):
                self._ask_one(label, model, prompts, file)

    def _ask_one(
        self, label: str, model: Model, prompts: Mapping[str, str], file: SampleFile, *, greedy: bool = False
    ) -> None:
        settings, samples = self._settings(model, greedy=greedy), 1 if greedy else self.calls
        ask_missing(model, label, prompts, file, settings, samples=samples, progress=self._progress)

    def _settings(self, model: Model, *, greedy: bool = False) -> Settings:
        options = self.options
        return Settings(
            model.asked_of,
            temperature=0.0 if greedy else options.temperature,
            min_p=options.min_p,
            max_tokens=self.max_tokens,
            seed=options.seed,
            verbalized=None if greedy else options.verbalized,
        )

    @property
    def calls(self) -> int:
        """Questions asked of a model for each prompt."""
        return self.samples // (self.options.verbalized or 1)

    @property
    def max_tokens(self) -> int:
        least = VERBALIZED_TOKENS if self.options.verbalized else 0
        return self.options.max_tokens or max(self.task.max_tokens, least)

    def _measure(self, questions: Sequence[Any], kept: SampleFile, judged: SampleFile, note: str) -> Report:
        """Everything that follows from the samples."""
        notes = [note] if note else []
        answered = [
            Answered(label, question, self._texts(label, question.id, kept))
            for question in questions
            for label in self.models
        ]
        notes += self._remarks(answered, kept)
        judge = Judge(self._judge, judged, self._progress) if self._judge else None
        helpers = Helpers(self.samples, judge, self._embedder, notes)
        if len(questions) < FEW_PROMPTS:
            notes.append(f"intervals over {len(questions)} prompts are narrower than they should be")
        with closing(self._judge) if self._judge else nullcontext():
            scored = self.task.score(answered, helpers)
        metrics = self.task.metrics(self.samples)
        return Report(
            task=self.task.name,
            metrics=metrics,
            models={label: model.asked_of for label, model in self.models.items()},
            prompts=len(questions),
            settings=self._described(),
            cells=summarise(values_of(answered, scored, metrics)),
            notes=tuple(notes),
            answered=answered,
            scored=scored,
            plot=self.task.plot,
        )

    def _described(self) -> dict[str, object]:
        """What a report says of how it came about."""
        options = self.options
        return {
            "data": self._data_name,
            "samples": self.samples,
            "temperature": options.temperature,
            "min_p": options.min_p,
            "max_tokens": self.max_tokens,
            "seed": options.seed,
            "verbalized": options.verbalized,
            "judge": self._judge and self._judge.asked_of,
            "embeddings": self._embedder and self._embedder.name,
        }

    def _texts(self, label: str, prompt: str, kept: SampleFile) -> list[str | None]:
        texts: list[str | None] = []
        for key in keys_of(label, [prompt], self.calls):
            answer = kept.answer(key)
            assert answer is not None  # it was asked for
            k = self.options.verbalized
            texts += parse_verbalized(answer.text, k) if k else [answer.text]
        return texts

    def _remarks(self, answered: Sequence[Answered], kept: SampleFile) -> Iterator[str]:
        """What a reader of the table has to know of the samples: cut off, unreadable, empty."""
        prompts = list(dict.fromkeys(each.question.id for each in answered))
        for label in self.models:
            answers = [kept.answer(key) for key in keys_of(label, prompts, self.calls)]
            cut = sum(answer is not None and answer.finish_reason == "length" for answer in answers)
            texts = [text for each in answered if each.model == label for text in each.texts]
            counts = {
                f"of {len(answers):,} answers were cut off at {self.max_tokens} tokens": cut,
                f"of {len(texts):,} verbalized samples were missing or malformed": sum(text is None for text in texts),
                f"of {len(texts):,} samples are empty": sum(text is not None and not text.strip() for text in texts),
            }
            for what, count in counts.items():
                if count:
                    yield f"{label}: {count:,} {what}"


@contextmanager
def _samples(folder: Path) -> Iterator[list[SampleFile]]:
    """The files of samples; whatever ends the work, it is said what is kept."""
    with ExitStack() as stack:
        opened = [stack.enter_context(SampleFile(folder / name)) for name in (SAMPLES, GREEDY, JUDGED)]
        try:
            yield opened
        except BaseException as error:
            refused = isinstance(error, OutputError) and not isinstance(error, NoSpaceError)
            if (kept := sum(map(len, opened))) and not refused:
                error.add_note(f"{kept:,} answers are kept in {folder}; the same command goes on from there")
            raise
