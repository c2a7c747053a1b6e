"""Fast stand-ins: models that answer by a function, embeddings from a table."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from slrmerge.errors import SlrmergeError
from slrmerge.evaluation.models import AnswerSink, SampleRequest
from slrmerge.evaluation.samples import Answer, Settings


class Kept:
    """An AnswerSink that keeps answers and refusals by request; the first refusal is raised where it `raises`."""

    def __init__(self, *, raises: bool = False) -> None:
        self.answers: dict[SampleRequest, Answer] = {}
        self.refusals: dict[SampleRequest, SlrmergeError] = {}
        self._raises = raises

    def keep(self, request: SampleRequest, answer: Answer) -> None:
        assert request not in self.answers
        self.answers[request] = answer

    def refuse(self, request: SampleRequest, error: SlrmergeError) -> None:
        if self._raises:
            raise error
        self.refusals[request] = error


class Answering:
    """A ChatModel that answers by `reply`, and records its requests and their settings."""

    dtype: str | None = None

    def __init__(self, reply: Callable[[str], str], model_id: str = "a-model") -> None:
        self.reply, self.model_id = reply, model_id
        self.requests: list[SampleRequest] = []
        self.settings: list[Settings] = []

    def check(self) -> None:
        pass

    def load(self) -> None:
        pass

    def answer(self, requests: Sequence[SampleRequest], settings: Settings, sink: AnswerSink) -> None:
        for request in requests:
            self.requests.append(request)
            self.settings.append(settings)
            sink.keep(request, Answer(self.reply(request.prompt), "stop"))

    def close(self) -> None:
        pass


class Embeddings:
    """An Embedder with a vector for each text; texts longer than `reads` characters are truncated."""

    model_id = identity = "a-table"

    def __init__(self, vectors: Mapping[str, Sequence[float]], reads: int = 100) -> None:
        self.vectors, self.reads = vectors, reads

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)

    def check(self) -> None:
        pass

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        return np.array([len(text) > self.reads for text in texts], bool)
