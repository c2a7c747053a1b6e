"""Stand-ins for what costs time: models that answer by a function, embeddings by table."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from slrmerge.evaluate.models import Ask
from slrmerge.evaluate.samples import Answer, Settings


class Answering:
    """A Model that answers by `reply`, and remembers what it was asked."""

    def __init__(self, reply: Callable[[str], str], asked_of: str = "a-model") -> None:
        self.reply, self.asked_of = reply, asked_of
        self.asks: list[Ask] = []
        self.settings: list[Settings] = []

    def check(self) -> None:
        pass

    def answer(self, asks: Sequence[Ask], settings: Settings, keep: Callable[[Ask, Answer], None]) -> None:
        for ask in asks:
            self.asks.append(ask)
            self.settings.append(settings)
            keep(ask, Answer(self.reply(ask.prompt), "stop"))

    def close(self) -> None:
        pass


class Embeddings:
    """An Embedder with a vector for each text; texts past `reads` characters are cut off."""

    name = "a-table"

    def __init__(self, vectors: Mapping[str, Sequence[float]], reads: int = 100) -> None:
        self.vectors, self.reads = vectors, reads

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)

    def check(self) -> None:
        pass

    def cut_off(self, texts: Sequence[str]) -> int:
        return sum(len(text) > self.reads for text in texts)
