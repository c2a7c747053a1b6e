"""Opening the models of an evaluation: those evaluated, and those that score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slrmerge.checkpoint.location import Place
from slrmerge.errors import SlrmergeError, open_all, require_extra
from slrmerge.evaluation.embeddings import Embedder, LocalEmbeddings
from slrmerge.evaluation.generations import SUFFIX, GenerationsFile
from slrmerge.evaluation.models import ChatModel, NamedModel, ServerAddress
from slrmerge.evaluation.options import EvaluationOptions
from slrmerge.evaluation.server import ServerModel
from slrmerge.io.progress import Progress


@dataclass(frozen=True)
class OpenModels:
    """The models of an evaluation: those evaluated, by label, and those that score."""

    by_label: Mapping[str, ChatModel]
    judge: ChatModel | None
    embedder: Embedder | None


@dataclass(frozen=True)
class Opener:
    """Opens models as the options say."""

    options: EvaluationOptions
    progress: Progress

    def open(
        self,
        models: Sequence[NamedModel],
        judge: Place | ServerAddress | None,
        embeddings: Place | ServerAddress | None,
    ) -> OpenModels:
        """Open all models. Raises the errors of all models and the judge together."""
        places = [*(model.at for model in models), *([judge] if judge else [])]
        opened = open_all(self._model, places, SlrmergeError)
        by_label = dict(zip((model.label for model in models), opened, strict=False))
        return OpenModels(by_label, opened[-1] if judge else None, self._embedder(embeddings) if embeddings else None)

    def _model(self, at: Place | ServerAddress) -> ChatModel:
        if isinstance(at, ServerAddress):
            return self._server(at)
        if isinstance(at, Path) and is_generations(at):
            return GenerationsFile(at)
        require_extra("eval", "transformers")
        from slrmerge.evaluation.local import LocalModel

        options = self.options
        batch = options.batch if isinstance(options.batch, int) else None
        return LocalModel(at, device=options.device, batch=batch, dtype=options.dtype, progress=self.progress)

    def _embedder(self, at: Place | ServerAddress) -> Embedder:
        return self._server(at) if isinstance(at, ServerAddress) else LocalEmbeddings(at, device=self.options.device)

    def _server(self, at: ServerAddress) -> ServerModel:
        options = self.options
        return ServerModel(at, concurrency=options.concurrency, timeout_s=options.timeout_s, progress=self.progress)


def is_generations(at: Place | ServerAddress) -> bool:
    """Whether the place is a file of generations rather than a model."""
    return isinstance(at, Path) and at.suffix == SUFFIX and not at.is_dir()
