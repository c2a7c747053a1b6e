"""Running an evaluation: open the data and the models, request missing samples, score them, write the results."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from slrmerge.checkpoint.location import Place
from slrmerge.errors import OptionError, Problem, SlrmergeError, did_you_mean, open_all, require_extra, require_type
from slrmerge.evaluation.embedding_file import KeptEmbeddings
from slrmerge.evaluation.embeddings import Embedder, LocalEmbeddings
from slrmerge.evaluation.every_eval_ever import write_every_eval_ever
from slrmerge.evaluation.generations import GenerationsFile, is_generations
from slrmerge.evaluation.inspect_log import write_inspect
from slrmerge.evaluation.models import ChatModel, ModelNames, ServerAddress, parse_location, parse_models
from slrmerge.evaluation.options import EvaluationOptions
from slrmerge.evaluation.output import claim, require_no_links, write_noveltybench, write_results
from slrmerge.evaluation.questions import parse_questions, read_data
from slrmerge.evaluation.result import EvaluationResult
from slrmerge.evaluation.server import ServerModel
from slrmerge.evaluation.session import OpenModels, Session, sample_files
from slrmerge.evaluation.tasks import TASKS
from slrmerge.evaluation.tasks.base import Task
from slrmerge.io.options import checks_types, make_options, takes_options
from slrmerge.io.output_folder import OutputFolder
from slrmerge.io.progress import Progress


@checks_types
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
            with sample_files(folder.path) as files:
                session = Session(self.task, self.options, self.samples, opened, files, self.progress)
                chosen = session.choose(questions)
                session.request_samples(chosen.questions)
                result = session.score(chosen, data.name)
                write_results(folder.path, result)
                sampled_s = files.samples.path.stat().st_mtime
                if self.options.export == "noveltybench":
                    write_noveltybench(folder.path, result)
                elif self.options.export == "inspect":
                    write_inspect(folder.path, result, sampled_s=sampled_s)
                elif self.options.export == "every-eval-ever":
                    write_every_eval_ever(folder.path, result, opened.by_label, sampled_s=sampled_s)
        return result

    def _open_models(self) -> OpenModels:
        """Open all models. Raises the errors of all models and the judge together."""
        places = [*(model.at for model in self.models), *([self._judge] if self._judge else [])]
        opened = open_all(self._open_model, places, SlrmergeError)
        by_label = dict(zip((model.label for model in self.models), opened, strict=False))
        embedder = self._open_embedder(self._embeddings) if self._embeddings else None
        return OpenModels(by_label, opened[-1] if self._judge else None, embedder)

    def _open_model(self, at: Place | ServerAddress) -> ChatModel:
        if isinstance(at, ServerAddress):
            return self._server(at)
        if isinstance(at, Path) and is_generations(at):
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

    def _check_options(self) -> None:
        """Raise OptionError for options that do not fit together, or this machine, and MissingExtraError."""
        if self.options.export == "inspect":
            require_extra("inspect", "inspect_ai")
        verbalized = self.options.verbalized
        if verbalized and self.samples % verbalized:
            what = f"{self.samples} is not a multiple of verbalized, which is {verbalized}"
            raise OptionError(Problem("not-a-multiple", "samples", what, "change one of them"))
        if self._judge is not None and is_generations(self._judge):
            what, remedy = "is a file of generations, which cannot judge others", "name a model"
            raise OptionError(Problem("not-a-judge", "judge", what, remedy))
        scoring = [at for at in (self._judge, self._embeddings) if at is not None]
        places = [*(model.at for model in self.models), *scoring]
        if not all(isinstance(at, ServerAddress) or is_generations(at) for at in places):
            from slrmerge.searching.device import require_device

            require_device(self.options.device)
