"""Texts as vectors: a sentence-transformers model in this process, or an embeddings endpoint."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slrmerge.errors import Problem, UnsupportedModelError, first_line, require_extra
from slrmerge.evaluate.server import ServerModel
from slrmerge.repository import Repository, Source


class Embedder(Protocol):
    """What gives texts a place among others; `name` is what a report calls it."""

    @property
    def name(self) -> str: ...

    def check(self) -> None:
        """Raise ServerError where it is plain that it cannot be asked now."""
        ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.floating]:
        """Shape (texts, width)."""
        ...

    def cut_off(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than it reads, as far as can be told."""
        ...


class LocalEmbeddings:
    """Any model that sentence-transformers loads; it is loaded when it is first used.

    Raises UnsupportedModelError and HubError at once for what is not there, the first later for what does not load.
    """

    def __init__(self, at: Source, *, device: str) -> None:
        require_extra("eval", "sentence_transformers")
        self._at, self._device = at, device
        if isinstance(at, Repository):
            from slrmerge.hub.snapshots import pin

            self._at = Repository(at.name, pin(at).commit)
        elif not at.is_dir():
            what = "is no folder here, and no repository on the Hub could be called so"
            raise UnsupportedModelError(Problem(str(at), what, "name a sentence-transformers model, or MODEL@URL"))

    @property
    def name(self) -> str:
        return str(self._at)

    def check(self) -> None:
        pass

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]
        at = self._at
        place, revision = (at.name, at.revision) if isinstance(at, Repository) else (str(at), None)
        try:
            return SentenceTransformer(place, revision=revision, device=self._device)
        except Exception as error:
            what = f"cannot be loaded by sentence-transformers ({type(error).__name__}: {first_line(error)})"
            raise UnsupportedModelError(Problem(self.name, what)) from error

    def embed(self, texts: Sequence[str]) -> NDArray[np.floating]:
        vectors: NDArray[np.floating] = self._model.encode(list(texts), show_progress_bar=False)
        return vectors

    def cut_off(self, texts: Sequence[str]) -> int:
        limit = self._model.max_seq_length
        if not limit:
            return 0
        tokens = self._model.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return sum(len(ids) > limit for ids in tokens)


class ServedEmbeddings:
    """An embeddings endpoint."""

    def __init__(self, model: ServerModel) -> None:
        self._model = model

    @property
    def name(self) -> str:
        return self._model.asked_of

    def check(self) -> None:
        self._model.check()

    def embed(self, texts: Sequence[str]) -> NDArray[np.floating]:
        return self._model.embed(texts)

    def cut_off(self, texts: Sequence[str]) -> int:  # noqa: ARG002 (servers refuse what is too long, or do not tell)
        return 0
