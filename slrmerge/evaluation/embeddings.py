"""Text embeddings by a sentence-transformers model in this process; `ServerModel` is the other Embedder."""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from slrmerge.checkpoint.location import Place, Repository
from slrmerge.errors import Problem, UnsupportedModelError, first_line, require_extra


class Embedder:
    """A model that embeds texts."""

    @property
    def model_id(self) -> str:
        """See `ChatModel`."""
        raise NotImplementedError

    @property
    def identity(self) -> str:
        """Identifies the model, one behind a server by its name: embeddings are only reused for the same identity."""
        return self.model_id

    def check(self) -> None:
        """Raise ServerError if the model cannot be used now, as far as is cheap to find out."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.floating]:
        """Embeddings, shape (texts, width); NaN for a text that the model refuses."""
        raise NotImplementedError

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which texts are longer than the model reads, as far as is known: a server rejects one, or is silent."""
        return np.zeros(len(texts), bool)


class LocalEmbeddings(Embedder):
    """A sentence-transformers model, loaded at the first use.

    Raises UnsupportedModelError and HubError for a model that does not exist; `embed` raises UnsupportedModelError for
    one that cannot be loaded.
    """

    def __init__(self, at: Place, *, device: str) -> None:
        require_extra("eval", "sentence_transformers")
        self._at, self._device = at, device
        if isinstance(at, Repository):
            from slrmerge.checkpoint.hub.repository import current_commit

            self._at = Repository(at.name, current_commit(at))
        elif not at.is_dir():
            what = "is neither a local folder nor a valid name of a repository on the Hub"
            remedy = "name a sentence-transformers model, or MODEL@URL"
            raise UnsupportedModelError(Problem("model-not-found", str(at), what, remedy))

    @property
    def model_id(self) -> str:
        return str(self._at)

    @cached_property
    def identity(self) -> str:
        """See `Embedder`; for a folder, also its files with their sizes and times."""
        if isinstance(self._at, Repository):
            return self.model_id
        files = sorted(path for path in self._at.rglob("*") if path.is_file())
        described = [(path.relative_to(self._at).as_posix(), path.stat()) for path in files]
        listed = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in described)
        return f"{self._at.resolve()} {xxhash.xxh3_64_hexdigest(os.fsencode(listed))}"

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own
        at = self._at
        place, revision = (at.name, at.revision) if isinstance(at, Repository) else (str(at), None)
        try:
            return SentenceTransformer(place, revision=revision, device=self._device)
        except Exception as error:  # a model's files may raise anything while they are loaded
            what = f"sentence-transformers cannot load it ({type(error).__name__}: {first_line(error)})"
            raise UnsupportedModelError(Problem("model-not-loadable", self.model_id, what)) from error

    def embed(self, texts: Sequence[str]) -> NDArray[np.floating]:
        vectors: NDArray[np.floating] = self._model.encode(list(texts), show_progress_bar=False)
        return vectors

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        limit = self._model.max_seq_length
        if not (limit and texts):
            return np.zeros(len(texts), bool)
        tokens = self._model.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return np.array([len(ids) > limit for ids in tokens])
