"""Fast stand-ins: models that answer by a function, embeddings from a table."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from slrmerge.evaluation.models import SampleRequest
from slrmerge.evaluation.samples import Answer, Settings


class Answering:
    """A ChatModel that answers by `reply`, and records its requests and their settings."""

    def __init__(self, reply: Callable[[str], str], model_id: str = "a-model") -> None:
        self.reply, self.model_id = reply, model_id
        self.requests: list[SampleRequest] = []
        self.settings: list[Settings] = []

    def check(self) -> None:
        pass

    def answer(
        self, requests: Sequence[SampleRequest], settings: Settings, keep: Callable[[SampleRequest, Answer], None]
    ) -> None:
        for request in requests:
            self.requests.append(request)
            self.settings.append(settings)
            keep(request, Answer(self.reply(request.prompt), "stop"))

    def close(self) -> None:
        pass


class Embeddings:
    """An Embedder with a vector for each text; texts longer than `reads` characters are truncated."""

    model_id = "a-table"

    def __init__(self, vectors: Mapping[str, Sequence[float]], reads: int = 100) -> None:
        self.vectors, self.reads = vectors, reads

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)

    def check(self) -> None:
        pass

    def truncated(self, texts: Sequence[str]) -> int:
        return sum(len(text) > self.reads for text in texts)
